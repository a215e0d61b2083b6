"""The choice of micro-batches, and the options it starts from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_peer.config import TrainConfig
from moe_peer.cut import GOOD_ENOUGH, Cut, Measured, choose_in_flight, measured, open_cuts, predicted_s

TRIPS = 8
ALL = open_cuts(sequences=64, micro_batches=0, in_flight=0)


def chosen(compute_s: float, trip_s: float, cuts: tuple[Cut, ...] = ALL, **more: float) -> Cut:
    seen = Measured(compute_s=compute_s, wait_s=trip_s * TRIPS, trips=TRIPS, shortest_wait_s=trip_s)
    return choose_in_flight(cuts, seen, sequences=64, **more)


@pytest.mark.parametrize("compute_s", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("trip_s", [0.0, 0.002, 0.006])
def test_a_loopback_swarm_keeps_the_cut_it_began_with(compute_s: float, trip_s: float) -> None:
    assert chosen(compute_s, trip_s) == Cut(micro_batches=1, in_flight=1)
    assert chosen(compute_s, trip_s, open_cuts(sequences=64, micro_batches=16, in_flight=0)).in_flight == 1


def test_waits_half_as_long_as_the_work_are_hidden_by_a_few_micro_batches() -> None:
    # Two micro-batches would take 4/2 + 2 = 4 s and have no slack; one takes 6 s.
    assert chosen(4.0, 0.25).in_flight in (2, 4)


def test_work_that_cannot_cover_the_waits_is_cut_no_finer_than_pays() -> None:
    # The step waits 1.6 s whatever is done: of its own 0.2 s at most as much can be saved.
    cut = chosen(0.2, 0.2)
    assert cut.in_flight <= 4


def test_given_micro_batches_fill_the_round_trip() -> None:
    cuts = open_cuts(sequences=64, micro_batches=64, in_flight=0)
    # 0.1 s of work each, 1.6 s of waiting: 17 keep the trainer busy.
    assert 16 <= chosen(6.4, 0.2, cuts).in_flight <= 22


def test_memory_bounds_what_is_in_flight_but_never_the_first_cut() -> None:
    cuts = open_cuts(sequences=64, micro_batches=64, in_flight=0)
    assert chosen(6.4, 0.2, cuts, max_sequences=5).in_flight == 5
    assert chosen(6.4, 0.2, cuts, max_sequences=0).in_flight == 1


@given(
    compute_s=st.floats(1e-4, 100), trip_s=st.floats(0, 5), sequences=st.integers(1, 96), max_sequences=st.floats(0, 96)
)
def test_the_choice_is_open_fits_and_is_nearly_the_best(
    compute_s: float, trip_s: float, sequences: int, max_sequences: float
) -> None:
    cuts = open_cuts(sequences=sequences, micro_batches=0, in_flight=0)
    seen = Measured(compute_s=compute_s, wait_s=trip_s * TRIPS, trips=TRIPS, shortest_wait_s=trip_s)
    cut = choose_in_flight(cuts, seen, sequences=sequences, max_sequences=max_sequences)
    assert cut in cuts
    fitting = [c for c in cuts if c.sequences_alive(sequences) <= max_sequences]
    assert cut == cuts[0] or cut in fitting
    if cut != cuts[0]:
        assert predicted_s(cut, seen) < predicted_s(cuts[0], seen)
        assert all(predicted_s(cut, seen) <= GOOD_ENOUGH * predicted_s(c, seen) for c in fitting)


def test_a_loopback_swarm_on_a_busy_machine_is_still_one() -> None:
    seen = measured([1.0, 1.5, 1.2], [0.002, *[0.05] * 23], trips=TRIPS)
    assert choose_in_flight(ALL, seen, sequences=64) == ALL[0]


def test_one_slow_wait_of_many_is_not_taken_for_the_network() -> None:
    seen = measured([1.0, 5.0, 1.0], [0.002] * 20 + [0.9] * 4, trips=TRIPS)
    assert seen.wait_s == pytest.approx(0.016)
    assert seen.compute_s == 1.0


@pytest.mark.parametrize(
    ("micro_batches", "in_flight", "first", "how_many"),
    [
        (0, 0, Cut(micro_batches=1, in_flight=1), 4),  # 1, 2, 4, 8
        (4, 0, Cut(micro_batches=4, in_flight=1), 4),
        (4, 2, Cut(micro_batches=4, in_flight=2), 1),
        (0, 4, Cut(micro_batches=4, in_flight=4), 1),
    ],
)
def test_options_leave_these_cuts_open(micro_batches: int, in_flight: int, first: Cut, how_many: int) -> None:
    cuts = TrainConfig(sequences=8, micro_batches=micro_batches, in_flight=in_flight).cuts
    assert cuts[0] == first
    assert len(cuts) == how_many


@pytest.mark.parametrize(
    ("micro_batches", "in_flight", "words"),
    [(3, 0, "does not divide"), (0, 3, "does not divide"), (2, 4, "more than"), (-1, 0, "negative")],
)
def test_options_that_contradict_each_other_are_refused(micro_batches: int, in_flight: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(sequences=8, micro_batches=micro_batches, in_flight=in_flight)
