"""How much of a wait was the servers' own work, known from the times in their answers.

The rest is the network's: what more micro-batches in flight can hide. A context variable, because what
waits (a layer) and what gets the answers (a transport) have the swarm between them; it follows `Portal.submit` to the
event loop and from there into every task that works for the wait.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from moe_net.wire.messages import BackwardAnswer, ForwardAnswer


@dataclass(slots=True)
class Served:
    """The servers' work on the calls of one wait."""

    slowest_s: float = 0.0
    """Of the calls, which run side by side, the one that queued and computed longest."""


_served: ContextVar[Served | None] = ContextVar("served", default=None)


@contextmanager
def noting_served() -> Generator[Served]:
    """What is submitted inside is noted in the result."""
    served = Served()
    token = _served.set(served)
    try:
        yield served
    finally:
        _served.reset(token)


def note_served(answer: ForwardAnswer | BackwardAnswer) -> None:
    """A transport calls it with every answer."""
    served = _served.get()
    if served is not None:
        served.slowest_s = max(served.slowest_s, (answer.queue_us + answer.compute_us) / 1e6)
