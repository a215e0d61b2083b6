"""The arithmetic of a bad network, without any."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_coordinator.shaping import JITTER_HOLD_S, MIB, PERFECT, Conditions, Line, Schedule

arrivals = st.lists(
    st.tuples(st.floats(0.0, 0.5, allow_nan=False), st.integers(0, 1 << 18)), min_size=1, max_size=20
)  # fmt: skip
conditions = st.builds(
    Conditions,
    delay_s=st.floats(0.0, 1.0),
    jitter_s=st.floats(0.0, 1.0),
    tail_probability=st.floats(0.0, 1.0),
    tail_s=st.floats(0.0, 1.0),
    bandwidth_mib_s=st.none() | st.floats(0.01, 100.0),
)


def due_times(schedule: Schedule, gaps: list[tuple[float, int]]) -> list[tuple[float, float]]:
    """(sent, due) of chunks sent so long after one another."""
    now_s, found = 100.0, []
    for gap_s, n_bytes in gaps:
        now_s += gap_s
        found.append((now_s, schedule.due_s(now_s, n_bytes)))
    return found


@given(conditions=conditions, gaps=arrivals, seed=st.text(max_size=4))
def test_bytes_arrive_in_order_never_before_the_delay_and_equally_for_equal_seeds(
    conditions: Conditions, gaps: list[tuple[float, int]], seed: str
) -> None:
    times = due_times(Schedule(Line(conditions), seed), gaps)
    assert all(due_s >= sent_s + conditions.delay_s for sent_s, due_s in times)
    dues = [due_s for _, due_s in times]
    assert dues == sorted(dues)
    assert times == due_times(Schedule(Line(conditions), seed), gaps)


def test_a_perfect_line_delivers_at_once() -> None:
    assert due_times(Schedule(Line(), "0"), [(0.0, 10), (1.0, MIB)]) == [(100.0, 100.0), (101.0, 101.0)]


def test_a_line_has_one_bandwidth_for_all_its_connections_and_no_credit_for_idle_time() -> None:
    line = Line(Conditions(bandwidth_mib_s=2.0, delay_s=0.5))
    one, other = Schedule(line, "0"), Schedule(line, "1")
    assert one.due_s(10.0, 2 * MIB) == 11.5
    assert other.due_s(10.0, MIB) == 12.0
    assert one.due_s(60.0, 2 * MIB) == 61.5
    assert one.due_s(60.0, MIB) == 62.0


def test_delays_have_the_mean_and_the_tail_that_were_asked_for() -> None:
    gaps = [(100.0, 1)] * 20_000
    jitter = [due - sent for sent, due in due_times(Schedule(Line(Conditions(jitter_s=0.2)), "a"), gaps)]
    assert statistics.mean(jitter) == pytest.approx(0.2, rel=0.03)
    assert statistics.median(jitter) == pytest.approx(0.2 * math.log(2), rel=0.03)
    tails = Conditions(tail_probability=0.1, tail_s=0.5)
    late = sorted(due - sent for sent, due in due_times(Schedule(Line(tails), "a"), gaps) if due > sent)
    assert len(late) / len(gaps) == pytest.approx(0.1, rel=0.1)
    assert late[0] == pytest.approx(0.5, rel=0.01)
    assert statistics.median(late) == pytest.approx(0.5 * 2 ** (2 / 3), rel=0.05)
    assert 4.9 < late[-1] < 5.0 + 1e-6


def test_chunks_of_one_message_share_a_draw() -> None:
    schedule = Schedule(Line(Conditions(jitter_s=1.0)), "0")
    first_s = schedule.due_s(0.0, 1)
    assert [schedule.due_s(t * JITTER_HOLD_S / 4, 1) for t in (1, 2, 3)] == pytest.approx(
        [first_s + t * JITTER_HOLD_S / 4 for t in (1, 2, 3)]
    )


def test_connections_draw_for_themselves() -> None:
    line = Line(Conditions(jitter_s=1.0))
    assert len({Schedule(line, f"0/{i}/up").due_s(0.0, 1) for i in range(20)}) == 20


@given(cuts=st.lists(st.integers(1, 300_000), max_size=30), seed=st.text(max_size=4))
def test_damage_depends_on_positions_and_not_on_how_the_stream_is_cut(cuts: list[int], seed: str) -> None:
    line = Line(Conditions(corrupt_per_mib=8.0))
    whole = Schedule(line, seed).flips(sum(cuts))
    pieces, start, schedule = [], 0, Schedule(line, seed)
    for n_bytes in cuts:
        pieces += [(start + position, mask) for position, mask in schedule.flips(n_bytes)]
        start += n_bytes
    assert pieces == whole


def test_as_many_bytes_are_damaged_as_were_asked_for_and_none_stays_as_it_was() -> None:
    flips = Schedule(Line(Conditions(corrupt_per_mib=5.0)), "0").flips(400 * MIB)
    assert len(flips) == pytest.approx(2000, rel=0.1)
    assert all(0 < mask < 256 for _, mask in flips)
    assert Schedule(Line(), "0").flips(1 << 40) == []


def test_new_conditions_count_for_what_is_sent_from_then_on() -> None:
    line = Line(Conditions(delay_s=1.0))
    schedule = Schedule(line, "0")
    assert schedule.due_s(0.0, 1) == 1.0
    line.conditions = PERFECT
    assert schedule.due_s(0.5, 1) == 1.0, "it does not overtake"
    assert schedule.due_s(1.5, 1) == 1.5


def test_what_may_be_on_its_way_follows_bandwidth_times_delay() -> None:
    line = Line(Conditions(bandwidth_mib_s=10.0, delay_s=0.3, jitter_s=0.1))
    assert 4 * MIB <= line.window_bytes <= 6 * MIB


@pytest.mark.parametrize(
    "wrong",
    [
        {"delay_s": -1.0},
        {"jitter_s": math.nan},
        {"tail_probability": 1.5},
        {"tail_s": math.inf},
        {"bandwidth_mib_s": 0.0},
        {"corrupt_per_mib": -0.1},
    ],
)
def test_conditions_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if "b" in next(iter(wrong)) else "negative"):
        Conditions(**wrong)  # type: ignore[arg-type]
