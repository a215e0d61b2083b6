"""rpc/policy: what a failure leads to, that no sequence of failures goes on for ever, and that hedges stay few."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_net.rpc.base import CallFailure
from moe_net.rpc.policy import CallPolicy, HedgeBudget, Move, after_backward, after_commit, after_forward, pause_s

POLICY = CallPolicy(attempts=3)
FAILURES = st.sampled_from(list(CallFailure))


@given(FAILURES, st.integers(1, 10), st.floats(-5, 5), st.booleans(), st.booleans())
def test_nothing_is_tried_past_the_deadline_and_the_same_peer_not_past_the_last_attempt(
    failure: CallFailure, attempt: int, left_s: float, replica: bool, usable: bool
) -> None:
    forward = after_forward(failure, attempt=attempt, left_s=left_s, policy=POLICY, replica=replica, usable=usable)
    backward = after_backward(failure, attempt=attempt, left_s=left_s, policy=POLICY, replica=replica, usable=usable)
    commit = after_commit(failure, attempt=attempt, left_s=left_s, policy=POLICY, usable=usable)
    if left_s <= 0:
        assert {forward, backward, commit} == {Move.GIVE_UP}
    if attempt >= POLICY.attempts:
        assert {forward, commit} == {Move.GIVE_UP}
        # Other replicas are finitely many, and each is asked once.
        assert backward in (Move.GIVE_UP, Move.ELSEWHERE)
    if not usable:
        assert Move.AGAIN not in (forward, backward, commit)
    if not replica:
        assert Move.ELSEWHERE not in (forward, backward, commit)


def test_another_replica_is_preferred_to_asking_again() -> None:
    for failure in CallFailure:
        assert after_forward(failure, attempt=1, left_s=1, policy=POLICY, replica=True, usable=True) is Move.ELSEWHERE
    for failure in (CallFailure.LATE, CallFailure.UNREACHABLE, CallFailure.BUSY, CallFailure.REFUSED):
        assert after_backward(failure, attempt=1, left_s=1, policy=POLICY, replica=True, usable=True) is Move.ELSEWHERE


def test_backward_sends_the_inputs_only_when_they_are_gone_and_drops_what_came_too_late() -> None:
    for replica in (True, False):
        moves = {
            f: after_backward(f, attempt=1, left_s=1, policy=POLICY, replica=replica, usable=True) for f in CallFailure
        }
        assert [f for f, move in moves.items() if move is Move.RESEND] == [CallFailure.INPUTS_GONE]
        assert moves[CallFailure.STALE_STEP] is Move.GIVE_UP


def test_a_full_queue_is_given_the_time_it_asked_for_within_the_deadline() -> None:
    assert pause_s(attempt=1, left_s=10, policy=POLICY, queue_s=2.0) == 2.0
    assert pause_s(attempt=1, left_s=1, policy=POLICY, queue_s=2.0) == 0.5
    assert pause_s(attempt=2, left_s=10, policy=POLICY) == 2 * POLICY.retry_pause_s


@given(st.lists(st.booleans(), max_size=400), st.floats(0.01, 1.0), st.integers(1, 20))
def test_hedges_never_exceed_their_share_of_the_calls_and_one_burst(
    wanted: list[bool], fraction: float, burst: int
) -> None:
    budget, hedges = HedgeBudget(fraction=fraction, burst=burst), 0
    for calls, hedge in enumerate(wanted, start=1):
        budget = budget.after_call()
        if hedge and budget.allows:
            budget, hedges = budget.after_hedge(), hedges + 1
        assert hedges <= burst + fraction * calls + 1e-6
    assert not HedgeBudget(fraction=0.0, burst=5).allows


def test_a_policy_without_time_or_attempts_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        CallPolicy(forward_timeout_s=0)
    with pytest.raises(ValueError, match="attempts"):
        CallPolicy(attempts=0)
    with pytest.raises(ValueError, match="hedge_fraction"):
        CallPolicy(hedge_fraction=1.5)
