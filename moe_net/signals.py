"""Signals on the running loop, given back when done: uvloop would leave its own handlers behind, which do nothing."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from typing import Any


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a process to stop. Without SIGHUP (the terminal was closed) where it is ignored, as nohup
    wants it."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return (signal.SIGTERM, signal.SIGINT)
    return (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def on_signals(call: Callable[[int], None], numbers: Sequence[signal.Signals]) -> Generator[None]:
    """While within, each of these signals calls `call(number)` on the running loop."""
    loop = asyncio.get_running_loop()
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        loop.add_signal_handler(number, call, int(number))
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            loop.remove_signal_handler(number)
            # The loop leaves the default, by which a second SIGTERM would end what has just been ended cleanly.
            signal.signal(number, handler)


async def until_signalled(work: Coroutine[Any, Any, None]) -> None:
    """`work`, which the first signal cancels wherever it is; returns when it has cleared up. Its errors are raised."""
    working = asyncio.create_task(work)
    stopping = False

    def stop(_: int) -> None:
        nonlocal stopping
        # A second signal must not cut short the leaving that the first one began.
        if not stopping:
            stopping = True
            working.cancel()

    with on_signals(stop, stop_signals()):
        await asyncio.wait([working])
    if not (stopping and working.cancelled()):
        working.result()
