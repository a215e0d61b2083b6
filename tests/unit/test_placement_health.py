"""Health over generated histories of calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_net.placement.health import (
    CallFailed,
    CallSucceeded,
    HealthConfig,
    HealthEvent,
    HealthState,
    PeerGone,
    after_event,
    backoff_s,
    on_probation,
    usable,
)

CONFIG = HealthConfig(backoff_s=1.0, backoff_factor=2.0, max_backoff_s=8.0, probation_s=20.0)
EVENTS = st.lists(
    st.tuples(
        st.floats(0, 30),
        st.sampled_from("ab"),
        st.sampled_from(["ok", "late", "unreachable", "busy", "gone"]),
    ),
    max_size=40,
)


def event_of(peer_id: str, what: str) -> HealthEvent:
    match what:
        case "ok":
            return CallSucceeded(peer_id=peer_id)
        case "gone":
            return PeerGone(peer_id=peer_id)
        case _:
            return CallFailed(peer_id=peer_id, failure=what)


@given(history=EVENTS, needed=st.integers(1, 3))
def test_in_every_history_success_heals_and_no_suspension_is_longer_than_the_limit(
    history: list[tuple[float, str, str]], needed: int
) -> None:
    config = HealthConfig(failures_to_suspend=needed, backoff_s=1.0, max_backoff_s=8.0, probation_s=20.0)
    state, now_s = HealthState(), 0.0
    for wait_s, peer_id, what in history:
        now_s += wait_s
        other = "b" if peer_id == "a" else "a"
        was_usable, others = usable(state, peer_id, now_s, config), state.peers.get(other)
        state = after_event(state, event_of(peer_id, what), now_s, config)
        assert state.peers.get(other) == others
        if what in ("ok", "gone"):
            assert peer_id not in state.peers
        if what == "busy":
            assert usable(state, peer_id, now_s, config) == was_usable
        if what in ("late", "unreachable") and needed == 1:
            assert not usable(state, peer_id, now_s, config)
        assert usable(state, peer_id, now_s + config.max_backoff_s, config)


def test_each_suspension_is_twice_as_long_up_to_the_limit() -> None:
    state, now_s, lengths = HealthState(), 100.0, list[float]()
    for _ in range(6):
        state = after_event(state, CallFailed(peer_id="a", failure="late"), now_s, CONFIG)
        until_s = state.peers["a"].suspended_until_s
        lengths.append(until_s - now_s)
        assert not usable(state, "a", until_s - 0.001, CONFIG)
        assert usable(state, "a", until_s, CONFIG)
        assert on_probation(state, "a", until_s, CONFIG)
        now_s = until_s
    assert lengths == [1, 2, 4, 8, 8, 8]
    assert backoff_s(10**6, CONFIG) == 8


def test_calls_that_fail_together_count_once() -> None:
    state = HealthState()
    for _ in range(10):
        state = after_event(state, CallFailed(peer_id="a", failure="unreachable"), 5.0, CONFIG)
    assert state.peers["a"].suspended_until_s == 6.0


def test_a_quiet_probation_ends_without_a_success() -> None:
    state = after_event(HealthState(), CallFailed(peer_id="a"), 0.0, CONFIG)
    state = after_event(state, CallFailed(peer_id="a"), 1.0, CONFIG)
    assert state.peers["a"].suspended_until_s == 3.0
    assert not on_probation(state, "a", 23.1, CONFIG)
    state = after_event(state, CallFailed(peer_id="a"), 23.1, CONFIG)
    assert state.peers["a"].suspended_until_s == pytest.approx(24.1)


def test_a_tolerant_configuration_waits_for_failures_in_a_row() -> None:
    config = HealthConfig(failures_to_suspend=3)
    state = HealthState()
    for failures in (1, 2):
        state = after_event(state, CallFailed(peer_id="a", failure="late"), 0.0, config)
        assert state.peers["a"].failures == failures
        assert usable(state, "a", 0.0, config)
        assert not on_probation(state, "a", 0.0, config)
    assert not usable(after_event(state, CallFailed(peer_id="a"), 0.0, config), "a", 0.0, config)


def test_what_changes_nothing_gives_the_same_state() -> None:
    state = HealthState()
    assert after_event(state, CallSucceeded(peer_id="a"), 0.0, CONFIG) is state
    assert after_event(state, CallFailed(peer_id="a", failure="inputs_gone"), 0.0, CONFIG) is state


@pytest.mark.parametrize(
    "changes", [{"backoff_s": 0.0}, {"backoff_factor": 0.5}, {"max_backoff_s": 0.1}, {"failures_to_suspend": 0}]
)
def test_a_senseless_configuration_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"needs|at least"):
        HealthConfig(**changes)  # type: ignore[arg-type]
