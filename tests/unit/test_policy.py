"""rpc/policy: what a failure leads to, and that no sequence of failures goes on for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_net.rpc.base import CallFailure
from moe_net.rpc.policy import CallPolicy, Move, after_backward, after_commit, after_forward

POLICY = CallPolicy(attempts=3)
STEPS = (after_forward, after_backward, after_commit)


@given(st.sampled_from(STEPS), st.sampled_from(list(CallFailure)), st.integers(1, 10), st.floats(-5, 5))
def test_nothing_is_tried_past_the_deadline_or_the_last_attempt(step, failure, attempt, left_s) -> None:
    move = step(failure, attempt=attempt, left_s=left_s, policy=POLICY)
    if left_s <= 0 or attempt >= POLICY.attempts:
        assert move is Move.GIVE_UP


def test_forward_may_go_elsewhere_but_backward_stays_with_the_peer_that_has_the_book() -> None:
    for failure in CallFailure:
        assert after_forward(failure, attempt=1, left_s=1, policy=POLICY) is Move.ELSEWHERE
        assert after_backward(failure, attempt=1, left_s=1, policy=POLICY) is not Move.ELSEWHERE


def test_backward_sends_the_inputs_only_when_they_are_gone() -> None:
    moves = {f: after_backward(f, attempt=1, left_s=1, policy=POLICY) for f in CallFailure}
    assert [f for f, move in moves.items() if move is Move.RESEND] == [CallFailure.INPUTS_GONE]
    assert moves[CallFailure.STALE_STEP] is Move.GIVE_UP
    assert moves[CallFailure.LATE] is Move.AGAIN


def test_a_policy_without_time_or_attempts_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        CallPolicy(forward_timeout_s=0)
    with pytest.raises(ValueError, match="attempts"):
        CallPolicy(attempts=0)
