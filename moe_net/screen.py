"""Where a program says what it does: to a terminal that is closed meanwhile, a pipe that nobody reads any more, a file
on a disk that is full. Its work is not lost because of that: it goes on, and what it says is.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


class Lossy(io.FileIO):
    """A file whose `write` does not fail: what the file does not take is lost. `tell` is called with why, once until
    the file takes something again."""

    def __init__(self, file: Path | int, mode: str, *, name: str, tell: Callable[[str], Any]) -> None:
        super().__init__(file, mode, closefd=not isinstance(file, int))
        self._called = name
        self._tell = tell
        self._failed = False

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and (written := super().write(left)):
                left = left[written:]
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._tell(f"{self._called} cannot be written ({error.strerror}): going on without it")
        else:
            self._failed = False
        return size


@contextmanager
def lossy_screen() -> Generator[None]:
    """While within, nothing that is written to stdout and stderr fails; the one is told on the other."""
    before = sys.stdout, sys.stderr
    stdout = _lossy(sys.stdout, "stdout", lambda text: print(text, file=stderr))
    stderr = _lossy(sys.stderr, "stderr", lambda text: print(text, file=stdout))
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _lossy(stream: TextIO, name: str, tell: Callable[[str], Any]) -> TextIO:
    """Write to the file of `stream` from now on; a stream of a test, which has none, stays."""
    try:
        file = stream.fileno()
    except io.UnsupportedOperation:
        return stream
    stream.flush()
    raw = Lossy(file, "w", name=name, tell=tell)
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
