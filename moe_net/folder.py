"""A folder that one process writes to."""

from __future__ import annotations

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone_in(folder: Path) -> Generator[None]:
    """Make `folder`, and keep every other process that asks out of it while inside. ValueError when one is in it.

    The lock goes with the process, however that ends; its file stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process writes to {folder} just now: give it a folder of its own") from None
        yield
