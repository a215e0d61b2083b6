"""The driver of faults for containers, without containers: when it does what, and what it notes and says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from moe_coordinator.chaos import Chaos, MetricsFile, how_it_ended
from moe_coordinator.containers import Life
from moe_coordinator.faults import Action, Fault, FaultPlan
from moe_coordinator.recovery import Step

RESTART = Fault(target="peer-1", what="restart", at_step=2, after_s=5.0)
DISCONNECT = Fault(target="peer-2", what="disconnect", at_s=20.0, duration_s=60.0)
KILL = Fault(target="coordinator", what="kill", at_s=30.0)


class Stage:
    """A clock that stands still, and a performer that takes a second for each action."""

    def __init__(self, *faults: Fault) -> None:
        self.now_s = 1000.0
        self.done: list[tuple[str, str, int]] = []
        self.said: list[str] = []
        self.chaos = Chaos(FaultPlan(fault=faults), self, say=self.said.append, clock_s=lambda: self.now_s)

    async def perform(self, action: Action, active: Sequence[Fault]) -> None:
        self.done.append((action.fault.what, action.phase, len(active)))
        self.now_s += 1.0

    async def at(self, now_s: float, *steps: Step) -> list[tuple[str, str, int]]:
        """What is done at this time, when these steps have been made."""
        self.now_s, before = now_s, len(self.done)
        await self.chaos.advance(steps)
        return self.done[before:]


def step(number: int, at_s: float, live: int = 4) -> Step:
    return Step(step=number, at_s=at_s, loss=1.0, live_experts=live, total_experts=4)


async def test_faults_come_with_steps_and_with_seconds_since_the_first() -> None:
    stage = Stage(RESTART, DISCONNECT)
    assert await stage.at(1000.0) == []
    assert stage.chaos.since_first_step_s is None
    assert await stage.at(1010.0, step(0, 1009.9), step(1, 1009.95)) == []
    assert await stage.at(1011.0, step(2, 1010.9)) == [("restart", "began", 1)]
    assert await stage.at(1015.0) == []
    assert await stage.at(1016.0, step(3, 1015.0, 2)) == [("restart", "ended", 0)]
    assert await stage.at(1030.0, step(4, 1029.0)) == [("disconnect", "began", 1)]
    (restart, disconnect) = stage.chaos.happened
    assert (restart.began_s, restart.ended_s) == (1011.0, 1017.0), "an end has happened once it was carried out"
    assert (disconnect.began_s, disconnect.ended_s) == (1030.0, None)


async def test_each_beginning_end_and_return_is_said_once() -> None:
    stage = Stage(RESTART)
    await stage.at(1010.0, step(2, 1009.9))
    await stage.at(1020.0, step(3, 1012.0, 2))
    await stage.at(1030.0, step(4, 1028.0))
    await stage.at(1031.0, step(5, 1030.5))
    assert stage.said == [
        "0.0 s, step 2: killed peer-1 (SIGKILL)",
        "10.0 s, step 3: starting peer-1 anew",
        "20.0 s, step 4: all 4 experts are live, 7.0 s after restart of peer-1 ended",
    ]


async def test_it_is_over_when_all_experts_are_back_or_too_late() -> None:
    def over() -> bool:
        return stage.chaos.over(for_s=10.0, limit_s=30.0)

    stage = Stage(RESTART)
    assert not over(), "no step yet"
    await stage.at(1000.0, step(2, 999.0))
    stage.now_s = 1009.0
    assert not over(), "too early"
    await stage.at(1020.0, step(3, 1019.0, 2))
    assert stage.chaos.happened[0].ended_s == 1021.0
    assert not over(), "experts are missing"
    stage.now_s = 1051.5
    assert over(), "they will not be back in time"
    await stage.at(1022.0, step(4, 1021.5))
    assert over(), "they are back"


async def test_what_lasts_for_good_does_not_keep_it_from_being_over() -> None:
    stage = Stage(KILL)
    await stage.at(1000.0, step(0, 999.0))
    assert await stage.at(1030.0) == [("kill", "began", 1)]
    assert stage.chaos.over(for_s=10.0, limit_s=30.0)


async def test_who_stops_early_ends_what_would_have_ended_later() -> None:
    stage = Stage(KILL, DISCONNECT)
    await stage.at(1000.0, step(0, 999.0))
    await stage.at(1040.0)
    before = len(stage.done)
    await stage.chaos.end_all()
    assert [what for what, phase, _ in stage.done[before:] if phase == "ended"] == ["disconnect"]


def test_metrics_are_read_as_they_grow_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, since_s=0.0)

    def line(number: int) -> str:
        values = {"event": "step", "step": number, "at_s": 1.0, "loss": 1.0, "live_experts": 4, "total_experts": 4}
        return json.dumps(values) + "\n"

    def append(text: str) -> list[int]:
        with path.open("a") as file:
            file.write(text)
        return [step.step for step in metrics.new_steps()]

    assert metrics.new_steps() == []
    assert append(line(0) + line(1)[:20]) == [0]
    assert append(line(1)[20:] + line(2)) == [1, 2]
    assert append("") == []
    path.write_text("")
    assert append(line(0)) == [0], "a training that begins has a new file"


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (Life(started_at="a", running=True, exit_code=0), None),
        (Life(started_at="b", running=True, exit_code=0), "ended and was started again at b"),
        (Life(started_at="a", running=False, exit_code=137), "ended with exit code 137"),
    ],
)
def test_a_trainer_that_ends_is_noticed_even_when_it_runs_again(now: Life, words: str | None) -> None:
    assert how_it_ended(Life(started_at="a", running=True, exit_code=0), now) == words
