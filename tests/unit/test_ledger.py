"""What a trainer owes its peers, over generated histories."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moe_net.rpc.ledger import MAX_OWED, Ledger
from moe_net.types import PeerInfo

PEERS = {name: PeerInfo(peer_id=name, address="", experts=()) for name in "abc"}
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["send", "use", "close", "hear"]), st.sampled_from("abc"), st.integers(0, 5)), max_size=80
)


@given(ACTIONS, st.sets(st.sampled_from("abc")))
def test_every_gradient_without_a_used_answer_is_voided_once_with_its_step_and_commits_stay_in_order(
    actions: list[tuple[str, str, int]], in_directory: set[str]
) -> None:
    ledger, step = Ledger("t"), 0
    open_calls: dict[str, dict[bytes, bool]] = {name: {} for name in PEERS}
    heard: dict[str, list[int]] = {name: [] for name in PEERS}
    for action, name, number in actions:
        call_id = bytes([step % 256, number])
        if action == "send":
            ledger.sent(PEERS[name], call_id)
            open_calls[name][call_id] = False
        elif action == "use" and call_id in open_calls[name]:
            ledger.used(name, call_id)
            open_calls[name][call_id] = True
        elif action == "close":
            concerned = ledger.close_step(step, 64, [PEERS[n] for n in sorted(in_directory)])
            assert concerned.keys() == in_directory | {n for n, calls in open_calls.items() if calls}
            assert concerned.keys() <= set(ledger.owing)
            for n in concerned:
                last = None
                for commit in iter_owed(ledger, n):
                    last = commit
                assert last is not None
                assert last.step == step
                assert set(last.void) == {c for c, used in open_calls[n].items() if not used}
            open_calls = {n: {} for n in PEERS}
            step += 1
        elif action == "hear" and (commit := ledger.next_commit(name)) is not None:
            heard[name].append(commit.step)
            ledger.heard(name, commit)
    for steps in heard.values():
        assert steps == sorted(set(steps))


def iter_owed(ledger: Ledger, peer_id: str):
    yield from ledger._owed.get(peer_id, [])


def test_a_peer_that_is_away_for_long_is_owed_the_first_commits_and_the_last() -> None:
    ledger = Ledger("t")
    for step in range(1000):
        ledger.close_step(step, 1, [PEERS["a"]])
    steps = [commit.step for commit in iter_owed(ledger, "a")]
    assert len(steps) == MAX_OWED
    assert steps[0] == 0
    assert steps[-1] == 999
