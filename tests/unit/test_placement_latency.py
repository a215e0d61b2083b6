"""What is learned from latencies: when a call is overdue, when it is late, who is slow."""

from __future__ import annotations

import random
from statistics import median, median_low

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_net.placement.latency import (
    LatencyConfig,
    LatencyState,
    Sample,
    after_sample,
    late_after_s,
    overdue_after_s,
    slowness,
    split,
    without_peer,
)
from moe_net.placement.slow import latency_bias
from moe_net.placement.view import View
from moe_net.types import ExpertId, PeerInfo

CONFIG = LatencyConfig()
LIMITS = {"floor_s": 0.001, "cap_s": 20.0}


def state_of(seconds: dict[str, list[float]], rows: int = 100) -> LatencyState:
    state = LatencyState()
    for peer_id, totals_s in seconds.items():
        for total_s in totals_s:
            state = after_sample(state, peer_id, "forward", Sample(total_s=total_s, rows=rows), 0.0, CONFIG)
    return state


def overdue(state: LatencyState, peer_id: str = "a", rows: int = 100) -> float | None:
    return overdue_after_s(state, peer_id, "forward", rows, CONFIG)


def late(state: LatencyState, peer_id: str = "a", rows: int = 100) -> float:
    return late_after_s(state, peer_id, "forward", rows, CONFIG, **LIMITS)


def test_stalls_in_one_call_of_twenty_are_found_overdue_and_ordinary_calls_are_not() -> None:
    draw = random.Random(0)
    totals_s = [0.1 + draw.expovariate(100) + (1.0 if draw.random() < 0.05 else 0.0) for _ in range(2000)]
    state, found, ordinary = LatencyState(), 0, 0
    for total_s in totals_s:
        after_s = overdue(state)
        if after_s is not None and total_s > after_s:
            found, ordinary = found + (total_s > 1), ordinary + (total_s < 1)
        state = after_sample(state, "a", "forward", Sample(total_s=total_s, rows=100), 0.0, CONFIG)
    stalls = sum(total_s > 1 for total_s in totals_s)
    assert found > 0.97 * stalls
    assert ordinary < 0.02 * len(totals_s)


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 3.0]), st.integers(1, 9)), min_size=1, max_size=60))
def test_what_is_kept_in_order_is_what_the_window_holds(calls: list[tuple[float, int]]) -> None:
    config = LatencyConfig(window=8)
    state = LatencyState()
    for number, (total_s, rows) in enumerate(calls, start=1):
        state = after_sample(state, "a", "forward", Sample(total_s=total_s, rows=rows), 0.0, config)
        window, track = calls[max(0, number - 8) : number], state.track("a", "forward")
        totals_s = sorted(total_s for total_s, _ in window)
        assert track.totals_s == tuple(totals_s)
        assert track.median_s == median_low(totals_s)
        assert track.tail_s == totals_s[min(len(totals_s) - 1, int(0.8 * len(totals_s)))]
        assert track.typical_rows == median(rows for _, rows in window)


def test_too_few_calls_say_nothing() -> None:
    state = state_of({"a": [0.1] * (CONFIG.min_samples - 1)})
    assert overdue(state) is None
    assert late(state) == LIMITS["cap_s"]


def test_a_deadline_follows_the_slowest_call_and_grows_with_the_rows() -> None:
    state = state_of({"a": [0.1] * 20 + [0.5]})
    assert late(state) == pytest.approx(CONFIG.late_factor * 0.5)
    assert late(state, rows=400) == pytest.approx(4 * CONFIG.late_factor * 0.5)
    assert late(state, rows=1) == late(state)


def test_a_stranger_is_given_twice_what_the_slowest_of_the_others_is() -> None:
    """It was given the longest deadline of all before its first answer: as if it knew of calls of one row only."""
    state = state_of({"a": [0.1] * 10, "b": [0.3] * 10, "new": [0.1]})
    for stranger in ("new", "newer"):
        assert late(state, stranger) == pytest.approx(2 * CONFIG.late_factor * 0.3)
        assert late(state, stranger, rows=200) == pytest.approx(4 * CONFIG.late_factor * 0.3)
        assert overdue(state, stranger) == pytest.approx(2 * 0.3)


def test_each_call_given_up_in_a_row_doubles_the_deadline_and_an_answer_ends_that() -> None:
    state = state_of({"a": [0.1] * 10})
    deadlines_s = [late(state)]
    for _ in range(3):
        given_up = Sample(total_s=deadlines_s[-1], rows=100, answered=False)
        state = after_sample(state, "a", "forward", given_up, 0.0, CONFIG)
        deadlines_s.append(late(state))
    assert [s / deadlines_s[0] for s in deadlines_s] == pytest.approx([1, 2, 4, 8])
    state = after_sample(state, "a", "forward", Sample(total_s=0.1, rows=100), 0.0, CONFIG)
    assert late(state) == pytest.approx(deadlines_s[0])


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e6), st.integers(1, 10**6), st.booleans()), max_size=80), st.integers(1, 10**6)
)
def test_every_history_gives_deadlines_within_their_bounds_and_hedges_before_them(
    history: list[tuple[float, int, bool]], rows: int
) -> None:
    state = LatencyState()
    for total_s, sent, answered in history:
        sample = Sample(total_s=total_s, rows=sent, answered=answered)
        state = after_sample(state, "a", "forward", sample, 0.0, CONFIG)
    assert LIMITS["floor_s"] <= late(state, rows=rows) <= LIMITS["cap_s"]
    assert len(state.track("a", "forward").samples) <= CONFIG.window
    after_s = overdue(state, rows=rows)
    assert after_s is None or after_s >= state.track("a", "forward").median_s
    assert without_peer(state, "a").tracks == {}


def test_time_is_split_into_network_queue_and_compute() -> None:
    state = LatencyState()
    for _ in range(3):
        sample = Sample(total_s=0.5, queue_s=0.1, compute_s=0.15)
        state = after_sample(state, "a", "forward", sample, 0.0, CONFIG)
    parts = split(state.track("a", "forward"))
    assert (parts.network_s, parts.queue_s, parts.compute_s) == pytest.approx((0.25, 0.1, 0.15))


def test_slow_experts_lose_at_most_the_bound_in_the_selection_and_fast_ones_nothing() -> None:
    slow = slowness(state_of({"a": [0.1] * 9, "b": [0.1] * 9, "c": [0.2] * 9, "d": [9.0] * 9}), "forward", CONFIG)
    hosts = {"a": [0], "b": [1], "c": [2], "d": [3, 0], "new": [4]}
    view = View(
        PeerInfo(peer_id=p, address="", experts=tuple(ExpertId(0, i) for i in indices)) for p, indices in hosts.items()
    )
    bias = latency_bias(view, 0, 6, slow, bound=0.8)
    assert bias == pytest.approx((0.0, 0.0, -0.4, -0.8, 0.0, 0.0)), "0 has a fast replica, 4 and 5 are unknown"


@pytest.mark.parametrize("changes", [{"min_samples": 0}, {"tail_quantile": 1.0}, {"late_factor": 0.5}])
def test_a_senseless_configuration_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs"):
        LatencyConfig(**changes)  # type: ignore[arg-type]
