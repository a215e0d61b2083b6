"""Ctrl-C in the seconds in which a command imports what it needs, and has begun nothing. Imports next to nothing."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

INTERRUPTED = 130


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


class LeaveAtOnce:
    """While within, SIGINT ends the process with exit code 130, unless it is ignored, or something has a handler of
    its own for it meanwhile.

    Not by a KeyboardInterrupt: what libraries do while they are imported takes that for an import that failed, and goes
    on, or fails later on with an error about something else (one start of 36, interrupted within 4 s).
    """

    def __enter__(self) -> None:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _leave)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
