"""Two ways to the same answer, one of them late: whichever brings it first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from moe_net.rpc.base import Failed

AnswerT = TypeVar("AnswerT")


class Race(NamedTuple):
    """How it ended."""

    answer: Any
    """Of the winner; the first one's `Failed` when both failed."""
    hedged: bool
    """A second one was sent."""
    hedge_won: bool
    first_unfinished: bool
    """The first was still under way, and was cancelled."""


async def race(
    first: Coroutine[Any, Any, AnswerT | Failed],
    overdue_after_s: float | None,
    second: Callable[[], Coroutine[Any, Any, AnswerT | Failed] | None],
) -> Race:
    """Run `first`; when it is not done after `overdue_after_s`, also what `second` gives (None: nothing can be sent).

    The first answer wins and the other call is cancelled; a failure waits for the other one. Cancelling the caller
    cancels both.
    """
    if overdue_after_s is None:
        return Race(await first, hedged=False, hedge_won=False, first_unfinished=False)
    running = {asyncio.create_task(first, name="first")}
    (one,) = running
    try:
        await asyncio.wait(running, timeout=overdue_after_s)
        hedge = None if one.done() else second()
        if hedge is None:
            return Race(await one, hedged=False, hedge_won=False, first_unfinished=False)
        other = asyncio.create_task(hedge, name="hedge")
        running.add(other)
        while True:
            pending = {task for task in running if not task.done()}
            for task in (one, other):
                if task.done() and not isinstance(task.result(), Failed):
                    won = task is other
                    return Race(task.result(), hedged=True, hedge_won=won, first_unfinished=won and not one.done())
            if not pending:
                return Race(one.result(), hedged=True, hedge_won=False, first_unfinished=False)
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    finally:
        left = [task for task in running if not task.done()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
