# pyright: basic
"""Processes of a benchmark: servers and workers that answer JSON lines, and that always end with the benchmark."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from moe_net.rpc.poller import OLDER as OLDER_POLLER
from moe_net.rpc.poller import VARIABLE as POLLER_VARIABLE

HERE = Path(__file__).resolve().parent
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for a SIGTERM when the process that started this one is gone, even by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_cleanly_on_sigterm() -> None:
    """Turn SIGTERM into SystemExit, so that `with` and `finally` end the children."""

    def leave(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, leave)


class Child:
    """One script of this folder in a process group of its own; a context manager that ends the whole group."""

    def __init__(self, script: str, *arguments: str, threads: int = 1) -> None:
        self.name = " ".join([script, *arguments])
        # Sockets and other leftovers of the child go here, and away with it.
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": self._folder.name,
            # As our own processes have it, for everybody's gRPC.
            POLLER_VARIABLE: OLDER_POLLER,
            # Forked helpers of hivemind write lines at INFO for every expert; warnings are enough.
            "HIVEMIND_LOGLEVEL": os.environ.get("HIVEMIND_LOGLEVEL", "WARNING"),
        }
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,
        )
        self._unread = b""

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next JSON line. RuntimeError, with the end of the child's stderr, if it is late or the child gone."""
        assert self._process.stdout is not None
        stdout_fd = self._process.stdout.fileno()
        deadline_s = time.monotonic() + timeout_s
        while True:
            while b"\n" in self._unread:
                line, self._unread = self._unread.split(b"\n", 1)
                if line.startswith(b"{"):
                    return json.loads(line)
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([stdout_fd], [], [], left_s)[0]:
                raise RuntimeError(f"{self.name}: no answer in {timeout_s:.0f} s\n{self._stderr_tail()}")
            piece = os.read(stdout_fd, 1 << 16)
            if not piece:
                raise RuntimeError(f"{self.name}: ended early\n{self._stderr_tail()}")
            self._unread += piece

    def ask(self, timeout_s: float, **request: Any) -> dict[str, Any]:
        """Send one request, return its answer; RuntimeError when the child reports an error."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        answer = self.answer(timeout_s)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}\n{self._stderr_tail()}")
        return answer

    def end(self) -> None:
        """SIGTERM to the child, five seconds, then SIGKILL to whatever is left of its group (forked helpers, p2pd)."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self._folder.cleanup()

    def _stderr_tail(self, lines: int = 25) -> str:
        self._stderr.seek(0)
        return "\n".join(self._stderr.read().decode(errors="replace").splitlines()[-lines:])


def say(**values: Any) -> None:
    """One JSON line on stdout."""
    print(json.dumps(values), flush=True)


def serve_requests(handlers: Mapping[str, Callable[..., dict[str, Any]]], **ready: Any) -> None:
    """Worker's main loop: a request `{"do": name, ...}` per line until stdin closes."""
    say(event="ready", **ready)
    for line in sys.stdin:
        request = json.loads(line)
        say(**handlers[request.pop("do")](**request))


def time_calls(call: Callable[[], object], at_least_s: float, at_most: int = 200) -> list[float]:
    """Seconds of each of several calls: until `at_least_s` has passed, never fewer than one."""
    taken_s: list[float] = []
    while not taken_s or (sum(taken_s) < at_least_s and len(taken_s) < at_most):
        start_s = time.perf_counter()
        call()
        taken_s.append(time.perf_counter() - start_s)
    return taken_s


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table: first column left, the others right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]), flush=True)
