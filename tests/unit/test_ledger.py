"""What a trainer owes its peers, over generated histories."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moe_net.rpc.ledger import MAX_OWED, Ledger, Used
from moe_net.types import PeerInfo
from moe_net.wire.messages import CommitAnswer

PEERS = {name: PeerInfo(peer_id=name, address="", experts=()) for name in "abc"}
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["use", "close", "hear"]), st.sampled_from("abc"), st.integers(0, 5)), max_size=80
)


@given(ACTIONS, st.sets(st.sampled_from("abc")))
def test_a_commit_names_the_calls_of_its_step_in_their_order_and_commits_stay_in_theirs(
    actions: list[tuple[str, str, int]], in_directory: set[str]
) -> None:
    ledger, step = Ledger("t"), 0
    used: dict[str, dict[bytes, int]] = {name: {} for name in PEERS}
    heard: dict[str, list[int]] = {name: [] for name in PEERS}
    for action, name, number in actions:
        if action == "use":
            call_id = bytes([step % 256, 7 * number % 256])
            ledger.used(PEERS[name], call_id, Used(order=(number // 2, -number), pairs=number))
            used[name][call_id] = number
        elif action == "close":
            concerned = ledger.close_step(step, 64, [PEERS[n] for n in sorted(in_directory)])
            assert concerned.keys() == in_directory | {n for n, calls in used.items() if calls}
            assert concerned.keys() <= set(ledger.owing)
            for n in concerned:
                commit = ledger._owed[n][-1].commit
                assert commit.step == step
                expected = sorted(used[n], key=lambda call_id, of=used[n]: (of[call_id] // 2, -of[call_id]))
                assert list(commit.calls) == expected
            used = {n: {} for n in PEERS}
            step += 1
        elif (owed := ledger.next_commit(name)) is not None:
            heard[name].append(owed.commit.step)
            ledger.heard(name, owed)
    for steps in heard.values():
        assert steps == sorted(set(steps))


def test_what_a_peer_did_not_count_is_told_in_pairs() -> None:
    ledger = Ledger("t")
    for number in range(3):
        ledger.used(PEERS["a"], bytes([number]), Used(order=(number, 0), pairs=10**number))
    ledger.close_step(0, 64, [])
    owed = ledger.next_commit("a")
    assert owed is not None
    answer = CommitAnswer(
        repeated=False, stepped=True, committed_tokens=0, missing=(b"\0", b"\0", b"?"), not_finite=(b"\2",)
    )
    assert owed.lost_pairs(answer) == (1, 100)


def test_a_peer_that_is_away_for_long_is_owed_the_first_commits_and_the_last() -> None:
    ledger = Ledger("t")
    for step in range(1000):
        ledger.close_step(step, 1, [PEERS["a"]])
    steps = [owed.commit.step for owed in ledger._owed["a"]]
    assert len(steps) == MAX_OWED
    assert steps[0] == 0
    assert steps[-1] == 999
