"""`moe-coordinator chaos`: faults on a timetable for a swarm in containers, and whether its training takes them."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import uvloop
from rich.console import Console
from rich.table import Table

from moe_coordinator.config import ChaosOptions
from moe_coordinator.containers import Containers, Life
from moe_coordinator.faults import Action, Fault, FaultPlan, advance, describe, timetable
from moe_coordinator.recovery import Happened, Step, missed, read_steps, recovery_s
from moe_net.config import load_toml
from moe_net.errors import MoeNetError
from moe_net.preflight import must_read_file
from moe_net.signals import until_signalled

POLL_S = 0.2
# The trainer's container is looked at this often.
LOOK_S = 5.0
INTERRUPTED = 130


class ChaosError(MoeNetError):
    """The training that faults were meant for does not take place."""


def main(options: ChaosOptions) -> int:
    """Exit code: 0 when every promise was kept, 1 when one was not, 130 when it was asked to stop before the end."""
    must_read_file("--faults", options.faults)
    plan = load_toml(FaultPlan, options.faults)
    for number, fault in enumerate(plan.fault):
        if (fault.at_s or 0.0) > options.for_s:
            raise ValueError(
                f"{options.faults}: fault.{number}.at_s={fault.at_s:g} is after the end, {options.for_s:g}"
            )
    codes: list[int] = []

    async def work() -> None:
        codes.append(await _watch(options, plan))

    uvloop.run(until_signalled(work()))
    return codes[0] if codes else INTERRUPTED


class Performer(Protocol):
    """What carries faults out: `Containers`, or a stand-in of a test."""

    async def perform(self, action: Action, active: Sequence[Fault]) -> None:
        """Begin a fault or end it; `active` are those that last from now on, in the order of their beginnings."""
        ...


class Chaos:
    """One training under faults: the steps that it made, and what was done to it."""

    def __init__(
        self,
        plan: FaultPlan,
        performer: Performer,
        *,
        say: Callable[[str], None],
        clock_s: Callable[[], float] = time.time,
    ) -> None:
        """`clock_s` is Unix time, like the steps' own times."""
        self.steps: list[Step] = []
        """Made so far."""
        self.happened: list[Happened] = []
        """Faults that have begun, in that order."""
        self._performer = performer
        self._say = say
        self._clock_s = clock_s
        self._state = timetable(plan.fault)
        self._recovered: set[int] = set()

    @property
    def waiting(self) -> tuple[Fault, ...]:
        """Faults that have not begun."""
        return self._state.waiting

    @property
    def since_first_step_s(self) -> float | None:
        """None before the first step."""
        return None if self._state.began_s is None else self._clock_s() - self._state.began_s

    def over(self, *, for_s: float, limit_s: float) -> bool:
        """True once so many seconds have passed since the first step, no fault is about to end, and the experts are
        back from each, or it ended more than `limit_s` ago."""
        since_s = self.since_first_step_s
        if since_s is None or since_s < for_s or any(ends_s is not None for ends_s, _ in self._state.lasting):
            return False
        return all(
            event.ended_s is None
            or self._clock_s() > event.ended_s + limit_s
            or recovery_s(event, self.happened, self.steps) is not None
            for event in self.happened
        )

    async def advance(self, steps: Sequence[Step]) -> None:
        """`steps` were made since the last call. What is due by now has happened when this returns."""
        self.steps += steps
        self._tell_recoveries()
        step = self.steps[-1].step if self.steps else None
        self._state, actions = advance(self._state, now_s=self._clock_s(), step=step)
        for action in actions:
            await self._do(action)

    async def end_all(self) -> None:
        """End what would end later: whoever stops here finds no container paused and no network taken away."""
        for ends_s, fault in self._state.lasting:
            if ends_s is not None:
                await self._do(Action(fault=fault, phase="ended"))

    async def _do(self, action: Action) -> None:
        self._tell(describe(action))
        if action.phase == "began":
            self.happened.append(Happened(fault=action.fault, began_s=self._clock_s()))
        await self._performer.perform(action, self._state.active)
        if action.phase == "ended":
            at = max(at for at, event in enumerate(self.happened) if event.fault is action.fault)
            self.happened[at] = replace(self.happened[at], ended_s=self._clock_s())

    def _tell_recoveries(self) -> None:
        for number, event in enumerate(self.happened):
            if number in self._recovered:
                continue
            took_s = recovery_s(event, self.happened, self.steps)
            if took_s is not None:
                self._recovered.add(number)
                what = f"{event.fault.what} of {event.fault.target}"
                self._tell(f"all {self.steps[-1].total_experts} experts are live, {took_s:.1f} s after {what} ended")

    def _tell(self, what: str) -> None:
        step = f"step {self.steps[-1].step}" if self.steps else "no step"
        self._say(f"{self.since_first_step_s or 0.0:.1f} s, {step}: {what}")


class MetricsFile:
    """A trainer's metrics.jsonl while it grows."""

    def __init__(self, path: Path, *, since_s: float) -> None:
        """Steps that ended before `since_s` are those of an earlier training in the same folder."""
        self._path = path
        self._since_s = since_s
        self._read_bytes = 0

    def new_steps(self) -> list[Step]:
        """Those that have been written since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            # A training that begins takes the place of an older one's file.
            if self._path.stat().st_size < self._read_bytes:
                self._read_bytes = 0
            file.seek(self._read_bytes)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        return read_steps(whole.decode(), since_s=self._since_s)


def how_it_ended(before: Life, now: Life) -> str | None:
    """What has become of a container that was to run all the time, in words; None when it did."""
    if not now.running:
        return f"ended with exit code {now.exit_code}"
    if now.started_at != before.started_at:
        return f"ended and was started again at {now.started_at}"
    return None


async def _watch(options: ChaosOptions, plan: FaultPlan) -> int:
    containers = Containers(options.project, plan)
    await containers.check()
    before = await containers.life(options.trainer)
    began_s = datetime.fromisoformat(before.started_at).timestamp()
    chaos = Chaos(plan, containers, say=lambda text: print(text, file=sys.stderr, flush=True))
    metrics = MetricsFile(options.metrics, since_s=began_s)
    look_at_s = -math.inf
    ended: str | None = None
    try:
        while ended is None and not chaos.over(for_s=options.for_s, limit_s=options.recovery_limit_s):
            await chaos.advance(metrics.new_steps())
            if time.monotonic() >= look_at_s:
                look_at_s = time.monotonic() + LOOK_S
                ended = how_it_ended(before, await containers.life(options.trainer))
            if chaos.since_first_step_s is None and time.time() > began_s + options.ready_timeout_s:
                raise ChaosError(f"{options.trainer} made no step in {options.ready_timeout_s:g} s: {options.metrics}")
            await asyncio.sleep(POLL_S)
    finally:
        await chaos.end_all()
    ended = ended or how_it_ended(before, await containers.life(options.trainer))
    bars = missed(chaos.happened, chaos.steps, trainer=ended, limit_s=options.recovery_limit_s)
    bars += [f"{fault.what} of {fault.target} at step {fault.at_step} never began" for fault in chaos.waiting]
    print_report(chaos, ended)
    for bar in bars:
        print(f"moe-coordinator: {bar}", file=sys.stderr)
    return 1 if bars else 0


def print_report(chaos: Chaos, ended: str | None) -> None:
    """What was done to the training and how it took it, as tables on stdout."""
    console = Console(highlight=False)
    table = Table("began s", "lasted s", "what", "target", "experts back after s", title="faults")
    start_s = chaos.steps[0].at_s if chaos.steps else 0.0
    for event in chaos.happened:
        took_s = recovery_s(event, chaos.happened, chaos.steps)
        table.add_row(
            f"{event.began_s - start_s:.1f}",
            "for good" if event.ended_s is None else f"{event.ended_s - event.began_s:.1f}",
            event.fault.what,
            event.fault.target,
            "-" if took_s is None else f"{took_s:.1f}",
        )
    console.print(table)
    if not chaos.steps:
        return
    first, last = chaos.steps[0], chaos.steps[-1]
    table = Table(title="training", show_header=False)
    table.add_row("steps", f"{len(chaos.steps)} in {last.at_s - first.at_s:.0f} s")
    table.add_row("loss at the start", f"{first.loss:.3f}")
    table.add_row("loss at the end", f"{last.loss:.3f}")
    table.add_row("fewest live experts", f"{min(step.live_experts for step in chaos.steps)} of {last.total_experts}")
    table.add_row("longest step", f"{longest_gap_s(chaos.steps):.1f} s")
    table.add_row("trainer", ended or "never ended")
    console.print(table)


def longest_gap_s(steps: Sequence[Step]) -> float:
    """The longest time between the ends of two steps."""
    return max((after.at_s - step.at_s for step, after in pairwise(steps)), default=0.0)
