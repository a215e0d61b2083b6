"""A program as a user has it: on a terminal of its own, into a pipe, or with its stdout in a file on a disk."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import psutil

Screen = Literal["terminal", "pipe", "disk"]
STEP_S = 60.0
"""What is waited for has happened by then, on a machine that does other things besides."""
LOOK_EVERY_S = 0.05


async def until(what: Callable[[], bool], *, within_s: float = STEP_S, why: Callable[[], str] = str) -> float:
    """Seconds until `what` was true; AssertionError, with what `why` says then, when it never is."""
    began_s = time.monotonic()
    while not what():
        assert time.monotonic() < began_s + within_s, why()
        await asyncio.sleep(LOOK_EVERY_S)
    return time.monotonic() - began_s


class Program:
    """Made by `on_screen`."""

    def __init__(self, process: asyncio.subprocess.Process, ours: int, stdout: Path | None) -> None:
        self._process = process
        self._ours = ours
        self._stdout = stdout
        self._shown = bytearray()
        self._family: list[psutil.Process] = []
        asyncio.get_running_loop().add_reader(ours, self._read)

    def _read(self) -> None:
        try:
            chunk = os.read(self._ours, 1 << 16)
        except OSError:  # a terminal that nobody has open any more
            chunk = b""
        self._shown += chunk
        if not chunk:
            self.close()

    @property
    def screen(self) -> str:
        """What it has shown to somebody who looks: not what is in the file, nor what came after `close`."""
        return self._shown.decode(errors="replace")

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    def close(self) -> None:
        """Close the terminal, or the pipe's end that is read."""
        if self._ours >= 0:
            asyncio.get_running_loop().remove_reader(self._ours)
            os.close(self._ours)
            self._ours = -1

    def press_ctrl_c(self) -> None:
        os.write(self._ours, b"\x03")

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def _all(self) -> list[psutil.Process]:
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]

    def fill_disk(self) -> None:
        """No file can grow any more that it, or what it has started, writes to."""
        for process in self._all():
            _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
            process.rlimit(psutil.RLIMIT_FSIZE, (0, hard))

    async def until(self, what: Callable[[], bool]) -> None:
        """AssertionError, with what it has said, when it ends before `what` is true."""
        await until(lambda: not self.running or what(), why=lambda: self.screen)
        assert what(), self.screen

    async def ready(self) -> dict[str, Any]:
        """The event by which it says that it is there."""
        found: list[dict[str, Any]] = []

        def said() -> bool:
            text = self.screen + (self._stdout.read_text() if self._stdout else "")
            found.extend(map(json.loads, re.findall(r'^\{"event": "ready".*\}\r?$', text, re.MULTILINE)))
            return bool(found)

        await self.until(said)
        return found[0]

    def remember_family(self) -> None:
        """Of what it has started by now, nothing may be there once it has `ended`."""
        self._family = self._all()[1:]

    async def ended(self, *, within_s: float) -> int:
        """Its exit code, once it and all that it had started are gone, in so many seconds."""
        async with asyncio.timeout(within_s):
            code = await self._process.wait()
        await until(lambda: not any(p.is_running() and p.status() != "zombie" for p in self._family), within_s=within_s)
        return code

    async def kill(self) -> None:
        if self.running:
            self.signal(signal.SIGKILL)
        await self._process.wait()
        self.close()


@asynccontextmanager
async def on_screen(screen: Screen, argv: Sequence[str], *, tmp: Path) -> AsyncGenerator[Program]:
    """The program on a `terminal`; with stdout and stderr in one `pipe`; or, on a `disk`, with stdout in a file and
    stderr in a pipe. Its temporary files lie in `tmp`. It is killed at the end of the block if it runs still."""
    with tempfile.TemporaryDirectory(prefix="moe-disk-") as disk:
        ours, its = os.openpty() if screen == "terminal" else os.pipe()
        file = Path(disk) / "stdout"
        stdout = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if screen == "disk" else os.dup(its)
        process = await asyncio.create_subprocess_exec(
            *(("setsid", "--ctty") if screen == "terminal" else ()),
            *argv,
            stdin=its if screen == "terminal" else asyncio.subprocess.DEVNULL,
            stdout=stdout,
            stderr=its,
            start_new_session=screen != "terminal",
            env={**os.environ, "TMPDIR": str(tmp), "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        )
        os.close(its)
        os.close(stdout)
        program = Program(process, ours, file if screen == "disk" else None)
        try:
            yield program
        finally:
            await program.kill()
