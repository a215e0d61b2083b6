"""Health over generated histories of calls and probes."""

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
    ProbeFailed,
    ProbeSucceeded,
    after_event,
    backoff_s,
    costs_a_deadline,
    probe_due_s,
    usable,
)

CONFIG = HealthConfig(failures_to_suspend=2, backoff_s=1.0, backoff_factor=2.0, max_backoff_s=8.0)
LATE = CallFailed(peer_id="a", failure="late")
BROKEN = CallFailed(peer_id="a", failure="unreachable")
EVENTS = st.lists(
    st.tuples(
        st.floats(0, 30),
        st.sampled_from("ab"),
        st.sampled_from(["ok", "late", "unreachable", "busy", "gone", "probe_ok", "probe_failed"]),
    ),
    max_size=40,
)


def event_of(peer_id: str, what: str) -> HealthEvent:
    match what:
        case "ok":
            return CallSucceeded(peer_id=peer_id)
        case "gone":
            return PeerGone(peer_id=peer_id)
        case "probe_ok":
            return ProbeSucceeded(peer_id=peer_id)
        case "probe_failed":
            return ProbeFailed(peer_id=peer_id)
        case _:
            return CallFailed(peer_id=peer_id, failure=what)


@given(history=EVENTS, needed=st.integers(1, 3))
def test_in_every_history_only_a_probe_ends_a_suspension_and_one_is_always_due(
    history: list[tuple[float, str, str]], needed: int
) -> None:
    config = HealthConfig(failures_to_suspend=needed, backoff_s=1.0, max_backoff_s=8.0)
    state, now_s = HealthState(), 0.0
    for wait_s, peer_id, what in history:
        now_s += wait_s
        other = "b" if peer_id == "a" else "a"
        was_usable, others = usable(state, peer_id), state.peers.get(other)
        state = after_event(state, event_of(peer_id, what), now_s, config)
        assert state.peers.get(other) == others
        if not was_usable:
            assert usable(state, peer_id) == (what in ("probe_ok", "gone"))
        if what == "late":
            assert not usable(state, peer_id)
        if what == "busy":
            assert usable(state, peer_id) == was_usable
        if not usable(state, peer_id):
            due_s = probe_due_s(state, peer_id)
            assert due_s is not None
            assert due_s <= now_s + config.max_backoff_s
        else:
            assert probe_due_s(state, peer_id) is None


def test_a_broken_connection_is_forgiven_once_and_a_late_call_is_not() -> None:
    once = after_event(HealthState(), BROKEN, 0.0, CONFIG)
    assert probe_due_s(after_event(once, BROKEN, 7.0, CONFIG), "a") == 7.0, "the first probe is due at once"
    assert usable(once, "a")
    assert usable(after_event(once, CallSucceeded(peer_id="a"), 0.0, CONFIG), "a")
    assert not usable(after_event(once, BROKEN, 0.0, CONFIG), "a")
    assert not usable(after_event(HealthState(), LATE, 0.0, CONFIG), "a")


def test_each_failed_probe_doubles_the_wait_up_to_the_limit() -> None:
    state, now_s, lengths = after_event(HealthState(), LATE, 100.0, CONFIG), 100.0, list[float]()
    for _ in range(7):
        due_s = probe_due_s(state, "a")
        assert due_s is not None
        lengths.append(due_s - now_s)
        now_s = due_s
        state = after_event(state, ProbeFailed(peer_id="a"), now_s, CONFIG)
    assert lengths == [0, 1, 2, 4, 8, 8, 8]
    assert backoff_s(10**6, CONFIG) == 8


def test_who_answers_probes_but_no_calls_is_suspended_longer_each_time() -> None:
    state, now_s, lengths = HealthState(), 0.0, list[float]()
    for _ in range(5):
        state = after_event(state, LATE, now_s, CONFIG)
        due_s = probe_due_s(state, "a")
        assert due_s is not None
        lengths.append(due_s - now_s)
        now_s = due_s
        state = after_event(state, ProbeSucceeded(peer_id="a"), now_s, CONFIG)
        assert usable(state, "a")
        # One answer in between is not the end of its probation.
        state = after_event(state, CallSucceeded(peer_id="a"), now_s, CONFIG)
    assert lengths == [0, 1, 2, 4, 8]


def test_probation_ends_with_the_first_answer_after_as_long_as_the_next_suspension_would_be() -> None:
    state = after_event(HealthState(), LATE, 0.0, CONFIG)
    state = after_event(state, ProbeFailed(peer_id="a"), 0.0, CONFIG)
    state = after_event(state, ProbeSucceeded(peer_id="a"), 1.0, CONFIG)
    assert after_event(state, CallSucceeded(peer_id="a"), 2.9, CONFIG).peers
    assert not after_event(state, CallSucceeded(peer_id="a"), 3.0, CONFIG).peers
    again = after_event(state, LATE, 300.0, CONFIG)
    assert probe_due_s(again, "a") == 302.0, "it has answered nothing since"
    assert costs_a_deadline(again, "a")
    assert not costs_a_deadline(state, "a")


@pytest.mark.parametrize("behaves_s", [0.0, 0.4, 0.9, 2.0, 5.0, 9.0, 20.0])
@pytest.mark.parametrize("grows", [1.0, 2.0])
def test_who_stalls_and_behaves_in_turns_costs_a_small_share_of_the_time(behaves_s: float, grows: float) -> None:
    config = HealthConfig()
    state, now_s, lost_s, stalls, stalls_again_s = HealthState(), 0.0, 0.0, 0, 0.0
    while now_s < 1000:
        due_s = probe_due_s(state, "a")
        if due_s is not None and now_s >= due_s:
            state = after_event(state, ProbeSucceeded(peer_id="a"), now_s, config)
        if usable(state, "a") and now_s >= stalls_again_s:
            deadline_s = min(20.0, 2.0 * grows**stalls)
            now_s, lost_s, stalls = now_s + deadline_s, lost_s + deadline_s, stalls + 1
            stalled = CallFailed(peer_id="a", failure="late", waited_s=deadline_s)
            state, stalls_again_s = after_event(state, stalled, now_s, config), now_s + behaves_s
        elif usable(state, "a"):
            state, stalls = after_event(state, CallSucceeded(peer_id="a"), now_s, config), 0
        now_s += 0.1
    assert lost_s < 0.2 * now_s


def test_what_cost_its_callers_nothing_is_suspended_as_long_as_before() -> None:
    state = HealthState()
    for now_s in (0.0, 1.0):
        for _ in range(CONFIG.failures_to_suspend):
            state = after_event(state, BROKEN, now_s, CONFIG)
        state = after_event(state, ProbeSucceeded(peer_id="a"), now_s, CONFIG)
    assert after_event(state, CallSucceeded(peer_id="a"), 2.9, CONFIG).peers
    assert not after_event(state, CallSucceeded(peer_id="a"), 3.0, CONFIG).peers


def test_calls_that_fail_together_count_once() -> None:
    state = after_event(HealthState(), LATE, 5.0, CONFIG)
    for _ in range(10):
        assert after_event(state, LATE, 5.0, CONFIG) is state
        assert after_event(state, CallSucceeded(peer_id="a"), 5.0, CONFIG) is state


def test_what_changes_nothing_gives_the_same_state() -> None:
    state = HealthState()
    assert after_event(state, CallSucceeded(peer_id="a"), 0.0, CONFIG) is state
    assert after_event(state, ProbeSucceeded(peer_id="a"), 0.0, CONFIG) is state
    assert after_event(state, CallFailed(peer_id="a", failure="inputs_gone"), 0.0, CONFIG) is state


@pytest.mark.parametrize(
    "changes", [{"backoff_s": 0.0}, {"backoff_factor": 0.5}, {"max_backoff_s": 0.1}, {"failures_to_suspend": 0}]
)
def test_a_senseless_configuration_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"needs|at least"):
        HealthConfig(**changes)  # type: ignore[arg-type]
