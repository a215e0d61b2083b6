"""What a training's steps say about the faults that it had."""

from __future__ import annotations

import json
import math

import pytest

from moe_coordinator.faults import Fault
from moe_coordinator.recovery import Happened, Step, missed, read_steps, recovery_s

RESTART = Fault(target="peer-1", what="restart", at_s=0.0)
PAUSE = Fault(target="peer-2", what="stop", at_s=0.0, duration_s=1.0)


def step(at_s: float, live: int = 4, *, loss: float = 1.0) -> Step:
    return Step(step=int(at_s), at_s=at_s, loss=loss, live_experts=live, total_experts=4)


def one(began_s: float, ended_s: float | None, fault: Fault = RESTART) -> Happened:
    return Happened(fault=fault, began_s=began_s, ended_s=ended_s)


def test_recovery_counts_from_the_end_to_the_step_with_all_experts() -> None:
    event = one(10.0, 12.0)
    steps = [step(9.0), step(11.0, 2), step(13.0, 3), step(16.5), step(17.0)]
    assert recovery_s(event, [event], steps) == 4.5


def test_experts_that_were_never_missed_are_back_with_the_next_step() -> None:
    event = one(10.0, 12.0)
    assert recovery_s(event, [event], [step(11.0), step(12.25)]) == 0.25


def test_a_return_that_does_not_last_is_none() -> None:
    event = one(10.0, 12.0)
    steps = [step(12.5), step(13.0, 2), step(15.0)]
    assert recovery_s(event, [event], steps) == 3.0
    assert recovery_s(event, [event], steps[:-1]) is None


def test_a_fault_that_begins_after_the_return_takes_nothing_back() -> None:
    event, later = one(10.0, 12.0), one(20.0, 22.0, PAUSE)
    steps = [step(14.0), step(21.0, 2), step(26.0)]
    assert recovery_s(event, [event, later], steps) == 2.0
    assert recovery_s(later, [event, later], steps) == 4.0


def test_a_fault_that_lasts_when_the_experts_are_back_has_not_kept_them_away() -> None:
    event, longer = one(10.0, 12.0), one(5.0, 30.0, PAUSE)
    steps = [step(13.0, 2), step(17.0), step(31.0)]
    assert recovery_s(event, [longer, event], steps) == 5.0


def test_seconds_in_which_another_fault_lasted_do_not_count() -> None:
    event, longer, inner = one(10.0, 12.0), one(5.0, 30.0, PAUSE), one(15.0, 17.0, PAUSE)
    assert recovery_s(event, [longer, event, inner], [step(13.0, 2), step(33.0)]) == 3.0
    shorter = [one(5.0, 13.0, PAUSE), one(12.5, 14.0, PAUSE)]
    assert recovery_s(event, [event, *shorter], [step(16.0)]) == 2.0, "12..14 is covered, once"


def test_what_lasts_or_has_no_step_after_it_has_no_recovery_yet() -> None:
    lasting, ended = one(10.0, None), one(10.0, 12.0)
    assert recovery_s(lasting, [lasting], [step(11.0)]) is None
    assert recovery_s(ended, [ended], [step(11.0)]) is None


def test_a_training_that_takes_it_misses_nothing() -> None:
    event = one(10.0, 12.0)
    steps = [step(9.0, loss=5.0), step(11.0, 2, loss=6.0), step(13.0, loss=4.0)]
    assert missed([event], steps, trainer=None, limit_s=30.0) == []


@pytest.mark.parametrize(
    ("steps", "trainer", "bar"),
    [
        ([step(9.0), step(50.0, loss=0.5)], None, "after restart of peer-1 it took 38.0 s until all experts were live"),
        ([step(9.0), step(13.0, 2, loss=0.5)], None, "after restart of peer-1 the experts did not all come back"),
        ([step(9.0), step(13.0)], None, "the loss at the end is not below"),
        ([step(9.0), step(13.0, loss=math.nan), step(14.0, loss=0.5)], None, "not finite at step 13"),
        ([step(9.0), step(13.0, loss=0.5)], "ended with exit code 1", "the trainer ended with exit code 1"),
    ],
)
def test_what_was_missed_is_named(steps: list[Step], trainer: str | None, bar: str) -> None:
    (found,) = missed([one(10.0, 12.0)], steps, trainer=trainer, limit_s=30.0)
    assert bar in found


def test_a_training_without_steps_has_missed_its_loss() -> None:
    assert missed([], [], trainer=None, limit_s=30.0) == ["the loss at the end is not below that at the start"]


def test_steps_are_read_without_other_records_and_without_an_earlier_training() -> None:
    line = {"event": "step", "step": 3, "at_s": 50.0, "loss": None, "live_experts": 3, "total_experts": 4, "calls": 7}
    lines = [{**line, "at_s": 49.0}, {"event": "eval", "step": 3, "val_nats_per_byte": 1.0}, line]
    (read,) = read_steps("\n".join(map(json.dumps, lines)), since_s=50.0)
    assert (read.step, read.at_s, read.whole) == (3, 50.0, False)
    assert math.isnan(read.loss)
