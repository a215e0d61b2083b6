"""How a training took what was done to it: from its steps and the faults to recovery times and bars that were missed.

Pure: no process, no socket, no clock. All times are Unix times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_coordinator.faults import Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a trainer's metrics say of one step."""

    step: int
    """0 is the first."""
    at_s: float
    """When it ended."""
    loss: float
    """Nats per token; nan when it was not finite."""
    live_experts: int
    """Experts with a usable replica when it ended."""
    total_experts: int
    """Experts of the run."""

    @property
    def whole(self) -> bool:
        """Every expert was there."""
        return self.live_experts == self.total_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """A fault that has begun."""

    fault: Fault
    """Which one."""
    began_s: float
    """When."""
    ended_s: float | None = None
    """When it ended; None while it lasts."""


def read_steps(text: str, *, since_s: float) -> list[Step]:
    """The steps among the lines of a metrics.jsonl, without those that ended before `since_s`."""
    steps: list[Step] = []
    for line in text.splitlines():
        values = json.loads(line)
        if values["event"] == "step" and values["at_s"] >= since_s:
            loss = math.nan if values["loss"] is None else values["loss"]
            steps.append(
                Step(
                    step=values["step"],
                    at_s=values["at_s"],
                    loss=loss,
                    live_experts=values["live_experts"],
                    total_experts=values["total_experts"],
                )
            )
    return steps


def recovery_s(event: Happened, happened: Iterable[Happened], steps: Sequence[Step]) -> float | None:
    """Seconds from the event's end until all experts were live again, and stayed so until another fault began.

    Seconds in which other faults lasted that ended meanwhile do not count: experts that those took away are not this
    one's. None while the event lasts, or when they have not been back so far.
    """
    if event.ended_s is None:
        return None
    others = [other for other in happened if other is not event]
    back_s: float | None = None
    for step in steps:
        if step.at_s < event.ended_s:
            continue
        if back_s is not None and any(back_s < other.began_s <= step.at_s for other in others):
            break
        if not step.whole:
            back_s = None
        elif back_s is None:
            back_s = step.at_s
    if back_s is None:
        return None
    # One that still lasts when they are back has not kept them away.
    meanwhile = [other for other in others if other.ended_s is not None and other.ended_s <= back_s]
    return back_s - event.ended_s - _lasted_s(meanwhile, since_s=event.ended_s)


def _lasted_s(faults: Iterable[Happened], since_s: float) -> float:
    """Seconds since then in which at least one of these, which have ended, lasted."""
    sum_s, reached_s = 0.0, since_s
    for fault in sorted(faults, key=lambda fault: fault.began_s):
        assert fault.ended_s is not None
        sum_s += max(0.0, fault.ended_s - max(reached_s, fault.began_s))
        reached_s = max(reached_s, fault.ended_s)
    return sum_s


def missed(happened: Sequence[Happened], steps: Sequence[Step], *, trainer: str | None, limit_s: float) -> list[str]:
    """What was promised and not kept, in words: the training went on, experts came back in `limit_s`, the loss fell.

    `trainer` says how the trainer ended, None when it never did.
    """
    bars: list[str] = []
    if trainer is not None:
        bars.append(f"the trainer {trainer}")
    for event in happened:
        if event.ended_s is None:
            continue
        took_s = recovery_s(event, happened, steps)
        what = f"after {event.fault.what} of {event.fault.target}"
        if took_s is None:
            bars.append(f"{what} the experts did not all come back")
        elif took_s > limit_s:
            bars.append(f"{what} it took {took_s:.1f} s until all experts were live, more than {limit_s:g} s")
    infinite = [step.step for step in steps if not math.isfinite(step.loss)]
    if infinite:
        bars.append(f"the loss was not finite at step {infinite[0]}")
    elif len(steps) < 2 or not steps[-1].loss < steps[0].loss:
        bars.append("the loss at the end is not below that at the start")
    return bars
