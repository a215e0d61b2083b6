"""Signals on the running loop, given back when done: uvloop would leave its own handlers behind, which do nothing."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

STOP = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def on_signals(call: Callable[[int], None], numbers: Sequence[signal.Signals] = STOP) -> Generator[None]:
    """While within, each of these signals calls `call(number)` on the running loop."""
    loop = asyncio.get_running_loop()
    for number in numbers:
        loop.add_signal_handler(number, call, int(number))
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
