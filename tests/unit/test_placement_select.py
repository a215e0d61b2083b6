"""Selection and assignment over generated views."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_net.placement.assign import assign
from moe_net.placement.select import select
from moe_net.placement.view import View
from moe_net.types import ExpertId, PeerInfo

LAYER = 2
HOSTING = st.dictionaries(st.sampled_from("abcdef"), st.sets(st.integers(0, 7), max_size=8), max_size=6)
COUNTS = st.dictionaries(st.integers(0, 9), st.integers(0, 50), max_size=10)


def view_of(hosting: dict[str, set[int]]) -> View:
    return View(
        PeerInfo(
            peer_id=peer_id,
            address="h:1",
            experts=tuple(ExpertId(layer, index) for layer in (1, LAYER) for index in sorted(indices)),
        )
        for peer_id, indices in hosting.items()
    )


@given(hosting=HOSTING, counts=COUNTS, salt=st.text(max_size=3), max_rows=st.none() | st.integers(1, 60))
def test_every_wanted_expert_with_a_replica_goes_to_one_that_hosts_it(
    hosting: dict[str, set[int]], counts: dict[int, int], salt: str, max_rows: int | None
) -> None:
    view = view_of(hosting)
    chosen = select(view, LAYER, counts, salt=salt, max_rows=max_rows)
    assert set(chosen) == {i for i, n in counts.items() if n > 0 and view.replicas(ExpertId(LAYER, i))}
    assert all(index in hosting[peer_id] for index, peer_id in chosen.items())
    reordered = dict(reversed(counts.items()))
    assert select(view_of(dict(reversed(hosting.items()))), LAYER, reordered, salt=salt, max_rows=max_rows) == chosen


@given(hosting=HOSTING, counts=COUNTS)
def test_servers_are_nearly_as_few_as_possible(hosting: dict[str, set[int]], counts: dict[int, int]) -> None:
    chosen = select(view_of(hosting), LAYER, counts)
    if not chosen:
        return
    fewest = next(
        n
        for n in range(1, len(hosting) + 1)
        for some in itertools.combinations(hosting, n)
        if set(chosen) <= set().union(*(hosting[p] for p in some))
    )
    assert len(set(chosen.values())) <= fewest * (1 + math.log(len(chosen)))


def test_the_choice_does_not_change_with_the_rows_of_a_batch() -> None:
    view = view_of({"a": {0, 1, 2, 3}, "b": {4, 5, 6, 7}, "c": {0, 1, 4, 5}, "d": {2, 3, 6, 7}})
    draw = random.Random(0)
    choices = [select(view, LAYER, {i: draw.randint(1, 100) for i in range(8)}, salt="t") for _ in range(50)]
    assert all(choice == choices[0] for choice in choices)


def test_one_server_that_has_everything_is_preferred() -> None:
    view = view_of({"a": {0, 1}, "b": {2, 3}, "c": {0, 1, 2, 3}})
    assert set(select(view, LAYER, {0: 1, 1: 1, 2: 1, 3: 1}).values()) == {"c"}


def test_ties_spread_over_salts_and_stay_for_one_salt() -> None:
    view = view_of({name: {0} for name in "abcd"})
    picks = [select(view, LAYER, {0: 5}, salt=str(i))[0] for i in range(400)]
    assert all(60 < picks.count(name) < 140 for name in "abcd")
    assert picks == [select(view, LAYER, {0: 5}, salt=str(i))[0] for i in range(400)]


def test_a_limit_of_rows_shares_the_work_but_drops_nothing() -> None:
    view = view_of({"a": {0, 1, 2, 3}, "b": {1, 2, 3}})
    chosen = select(view, LAYER, {0: 10, 1: 10, 2: 10, 3: 10}, max_rows=20)
    assert chosen[0] == "a"
    assert sorted(chosen.values()) == ["a", "a", "b", "b"]
    alone = view_of({"a": {0, 1, 2}})
    assert set(select(alone, LAYER, {0: 10, 1: 10, 2: 10}, max_rows=5)) == {0, 1, 2}


ALL = [ExpertId(layer, index) for layer in (1, LAYER) for index in range(8)]


@given(hosting=HOSTING, capacity=st.integers(0, 20), peer_id=st.sampled_from("abcxyz"))
def test_an_assignment_takes_the_experts_with_the_fewest_other_replicas(
    hosting: dict[str, set[int]], capacity: int, peer_id: str
) -> None:
    view = view_of(hosting)
    mine = assign(ALL, view, capacity, peer_id)
    assert len(mine) == len(set(mine)) == min(capacity, len(ALL))
    assert list(mine) == sorted(mine)
    others = view.without([peer_id])
    left = [len(others.replicas(e)) for e in ALL if e not in mine]
    assert all(len(others.replicas(e)) <= n for e in mine for n in left)
    assert assign(reversed(ALL), view, capacity, peer_id) == mine
    # What a peer hosts already does not move it to other experts.
    assert assign(ALL, others, capacity, peer_id) == mine


def test_peers_that_join_at_the_same_moment_choose_differently() -> None:
    experts = [ExpertId(0, i) for i in range(64)]
    choices = [assign(experts, View(()), 16, f"peer{i}") for i in range(16)]
    assert len(set(choices)) == 16
    # 256 slots for 64 experts: at random 98 % are hosted; all alike, a quarter would be.
    assert len(set().union(*choices)) > 56


def test_peers_that_join_one_after_another_cover_everything_evenly() -> None:
    experts, peers = [ExpertId(0, i) for i in range(30)], list[PeerInfo]()
    for i in range(9):
        mine = assign(experts, View(peers), 10, f"peer{i}")
        peers.append(PeerInfo(peer_id=f"peer{i}", address="h:1", experts=mine))
    assert {len(View(peers).replicas(e)) for e in experts} == {3}


def test_a_negative_capacity_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        assign(ALL, View(()), -1, "a")
