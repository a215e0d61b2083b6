"""Which records become peers of a view: those of use to the run, and not more than a view may have."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_net.discovery import crowd as crowd_module
from moe_net.discovery import record as record_module
from moe_net.discovery.crowd import Crowd, RunExperts
from moe_net.discovery.layout import peer_subkey, read_entries
from moe_net.discovery.record import MAX_EXPERTS, Identity, Record, sign, to_ranges
from moe_net.types import ExpertId

NOW_S = 1_800_000_000.0
EXPERT_SETS = st.sets(st.builds(ExpertId, st.integers(0, 5), st.integers(0, 40)), max_size=60)


def claim(name: str, *ranges: tuple[int, int, int]) -> Record:
    return Record(
        run="r", peer_id=name, public_key=b"", address="h:1", ranges=ranges, sequence=1, expires_at_s=NOW_S,
        withdrawn=False,
    )  # fmt: skip


def names(crowd: Crowd, records: Sequence[Record], experts: RunExperts | None) -> set[str]:
    return {peer.peer_id for peer in crowd.peers(records, experts)[0]}


@given(has=EXPERT_SETS, claimed=EXPERT_SETS)
def test_a_peer_has_those_of_the_runs_experts_that_it_claims(has: set[ExpertId], claimed: set[ExpertId]) -> None:
    experts, ranges = RunExperts(has), to_ranges(claimed)
    assert experts.pick(ranges) == tuple(sorted(has & claimed))
    assert experts.count(ranges) == len(has & claimed)


def test_absurd_claims_make_no_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, mine = Identity.generate(), [ExpertId(0, 0), ExpertId(1, 5)]
    absurd = [ExpertId(60000, i) for i in range(MAX_EXPERTS)]
    entries = []
    for identity, experts in [(honest, mine), *((Identity.generate(), absurd) for _ in range(30))]:
        data = sign(identity, run="r", address="h:1", experts=experts, sequence=1, expires_at_s=NOW_S + 9)
        assert len(data) < 200
        entries.append((peer_subkey(identity.peer_id), data))
    run = RunExperts(ExpertId(layer, i) for layer in range(4) for i in range(8))

    def no_expert(*_: int) -> ExpertId:
        raise AssertionError("an expert is made of a claim")

    monkeypatch.setattr(record_module, "ExpertId", no_expert)
    records, junk = read_entries(entries, run="r", now_s=NOW_S)
    (peer,), left_out = Crowd().peers(records, run)
    assert (peer.peer_id, list(peer.experts), left_out, junk) == (honest.peer_id, mine, 0, [])
    # Whatever the number of peers that claim it, an expert is one object.
    assert run.pick([(0, 0, 1)])[0] is run.pick([(0, 0, 8)])[0]


def test_a_thousand_peers_of_four_thousand_experts_are_no_crowd() -> None:
    run = RunExperts(ExpertId(layer, i) for layer in range(10) for i in range(400))
    records = [claim(f"{i:04}", (i // 100, 4 * (i % 100), 4)) for i in range(1000)]
    peers, left_out = Crowd().peers(records, run)
    assert [p.peer_id for p in peers] == [r.peer_id for r in records]
    assert left_out == 0
    assert {e for p in peers for e in p.experts} == set(run.pick([(layer, 0, 400) for layer in range(10)]))


@pytest.mark.parametrize("known", [True, False])
def test_those_who_claim_everything_crowd_nobody_out(known: bool) -> None:
    run = RunExperts(ExpertId(0, i) for i in range(4096)) if known else None
    modest = [claim(f"modest {i}", (0, i, 4)) for i in range(1000)]
    greedy = [claim(f"greedy {i}", (0, 0, 4096)) for i in range(3000)]
    peers, left_out = Crowd().peers([*greedy, *modest], run)
    assert {r.peer_id for r in modest} < {p.peer_id for p in peers}
    assert sum(len(p.experts) for p in peers) <= crowd_module.MAX_CLAIMS
    assert left_out == 4000 - len(peers) > 0


def test_of_too_many_alike_each_reader_takes_its_own_and_stays_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd_module, "MAX_PEERS", 50)
    run, records = RunExperts([ExpertId(0, 0)]), [claim(f"{i:03}", (0, 0, 1)) for i in range(200)]
    one, other = Crowd(), Crowd()
    assert len(names(one, records, run)) == 50
    assert names(one, records, run) == names(one, records[::-1], run) != names(other, records, run)
    assert one.peers(records, run)[1] == 150
    # A peer that claims nothing the run has takes no place.
    assert names(one, [claim("none"), claim("another", (7, 0, 9)), *records], run) == names(one, records, run)
