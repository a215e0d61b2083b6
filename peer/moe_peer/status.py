"""What a peer does, in one line now and then: neither a busy one nor an idle one is silent, or fills a screen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

log = logging.getLogger(__name__)

EVERY_S = 30.0


class Served(NamedTuple):
    """What a peer has served since its start."""

    calls: int
    rows: int
    versions: dict[int, dict[int, int]]
    """Layer -> expert index -> optimizer steps made."""


async def say_what_is_served(served: Callable[[], Served], *, every_s: float = EVERY_S) -> None:
    """Write a line of the log for each `every_s` in which something happened, for ever."""
    before = served()
    while True:
        await asyncio.sleep(every_s)
        now = served()
        line = describe_served(before, now, every_s)
        if line is not None:
            log.info(line)
        before = now


def describe_served(before: Served, now: Served, took_s: float) -> str | None:
    """What happened in between; None when nothing did."""
    if now == before:
        return None
    steps = [version for versions in now.versions.values() for version in versions.values()]
    made = max(
        version - before.versions.get(layer, {}).get(index, version)
        for layer, versions in now.versions.items()
        for index, version in versions.items()
    )
    at = f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)}..{max(steps)}"
    return (
        f"in {took_s:.0f} s: {now.calls - before.calls} calls, {now.rows - before.rows} rows, {made} steps; "
        f"the experts are at step {at}"
    )
