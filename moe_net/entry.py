"""Signals in the seconds in which a command imports what it needs, and has begun nothing. Imports next to nothing."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

CODES = {signal.SIGINT: 130, signal.SIGTERM: 0, signal.SIGHUP: 0}
"""Exit code of a process that a service manager, or a terminal that closes, asked to stop: it did as it should."""
DEFAULTS = (signal.default_int_handler, signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(CODES[signal.Signals(number)])


class LeaveAtOnce:
    """While within, SIGINT ends the process with exit code 130, SIGTERM and SIGHUP with 0, unless it is ignored, or
    something has a handler of its own for it meanwhile.

    Not by a KeyboardInterrupt: what libraries do while they are imported takes that for an import that failed, and goes
    on, or fails later on with an error about something else (one start of 36, interrupted within 4 s).
    """

    def __init__(self) -> None:
        self._before = {number: signal.getsignal(number) for number in CODES}

    def __enter__(self) -> None:
        for number, handler in self._before.items():
            if handler in DEFAULTS:
                signal.signal(number, _leave)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) is _leave:
                signal.signal(number, handler)
