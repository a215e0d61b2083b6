"""Runs child processes and leaves none behind: ready lines, events, logs, stop and kill, for the local swarm and tests.

Every child leads its own session and process group, so that Ctrl-C reaches the launcher alone. A kill takes the
child's own children along, and children end with the launcher, even with a SIGKILLed one: see `guard.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

from moe_coordinator import guard
from moe_net.errors import MoeNetError
from moe_net.screen import Lossy

GUARD = [sys.executable, "-I", "-S", str(Path(guard.__file__))]
# A longer line of stdout is no event of ours; it still goes to the log.
MAX_LINE_BYTES = 1 << 20
READ_BYTES = 1 << 16
# Once a child and its descendants are dead its stdout is closed, unless one of them shed its mark (guard.py).
DRAIN_S = 1.0

Event = dict[str, Any]


class ChildError(MoeNetError):
    """A child that failed, or was not ready in time; the text ends with the tail of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What to run."""

    name: str
    """Also the log's: `NAME.log`."""
    log_suffix: str = ""
    """`NAMESUFFIX.log`, for a child that takes the place of one of the same name: `.1` for the second, and so on."""
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Added to the launcher's environment."""
    wave: int = 0
    """Higher waves are stopped first: who uses others goes before them."""
    stderr: Literal["log", "terminal"] = "log"
    """`terminal`: the launcher's own stderr when that is a terminal (so that a live display works), else both."""


def describe_exit(code: int) -> str:
    """`exit code 3`, or `SIGKILL` for -9."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of the file, at most 16 KiB of them."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (16 << 10)))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


class Child:
    """One running process. Made by `Supervisor.start`."""

    def __init__(
        self, spec: ChildSpec, mark: str, process: asyncio.subprocess.Process, log_path: Path, log: Lossy
    ) -> None:
        self.name = spec.name
        self.wave = spec.wave
        self.mark = mark
        """Stands in its environment, and so in that of all its descendants."""
        self.pid = process.pid
        self.log_path = log_path
        self.stopping = False
        """`stop` or `kill` was called: its end is no surprise."""
        self.last: dict[str, Event] = {}
        """The latest event of each kind."""
        self._process = process
        self._log = log
        self._ready: asyncio.Future[Event | None] = asyncio.get_running_loop().create_future()
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def running(self) -> bool:
        return not self._ended.done()

    async def ready(self, timeout_s: float) -> Event:
        """Its ready line; ChildError when it ends first, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                event = await asyncio.shield(self._ready)
        except TimeoutError:
            raise ChildError(self.report(f"was not ready after {timeout_s:g} s")) from None
        if event is None:
            raise ChildError(self.report(f"ended with {describe_exit(await self.wait())} before it was ready"))
        return event

    async def wait(self) -> int:
        """Its exit code (negative: the signal), once it and all its descendants are gone."""
        return await asyncio.shield(self._ended)

    def terminate(self) -> None:
        """SIGTERM: it is asked to leave. One that is suspended is woken, or it would never know."""
        self.stopping = True
        self._send(signal.SIGTERM)
        self._send(signal.SIGCONT)

    def suspend(self) -> None:
        """SIGSTOP: it makes no step until `resume`, as on a machine that hangs. Its own children go on."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: the end of `suspend`."""
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                # Not the process object's own way: that looks whether it has ended first, and so takes the exit code
                # away from the one who waits for it.
                os.kill(self.pid, number)

    async def stop(self, grace_s: float) -> int:
        """SIGTERM; SIGKILL to it and its descendants after `grace_s`. Returns the exit code."""
        self.terminate()
        try:
            async with asyncio.timeout(grace_s):
                return await self.wait()
        except TimeoutError:
            self.kill()
            return await self.wait()

    def kill(self) -> None:
        """SIGKILL to it and all its descendants, now."""
        if self.running:
            self.stopping = True
            guard.kill_family(self.pid, self.mark)

    def report(self, what: str) -> str:
        """`what` happened to this child, and the end of its log."""
        return f"{self.name} {what}. The end of {self.log_path}:\n{tail(self.log_path)}"

    def take_line(self, line: bytes, on_event: Callable[[Child, Event], None]) -> None:
        """One line of its stdout: an event is remembered and passed on, anything else is only logged."""
        if not line.startswith(b"{"):
            return
        try:
            event = json.loads(line)
        except ValueError:
            return
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            self.last[event["event"]] = event
            if event["event"] == "ready" and not self._ready.done():
                self._ready.set_result(event)
            on_event(self, event)

    async def run(self, pump: asyncio.Task[None]) -> None:
        """Until the process has ended, its descendants are dead and its stdout is read."""
        code = await self._process.wait()
        guard.kill_family(self.pid, self.mark)
        await asyncio.wait([pump], timeout=DRAIN_S)
        pump.cancel()
        await asyncio.wait([pump])
        self._log.close()
        if not self._ready.done():
            self._ready.set_result(None)
        self._ended.set_result(code)


class Supervisor:
    """Owns the children; leaving its context stops all of them (SIGTERM, grace, SIGKILL)."""

    def __init__(
        self,
        log_dir: Path,
        *,
        grace_s: float = 10.0,
        on_event: Callable[[Child, Event], None] = lambda child, event: None,
        on_exit: Callable[[Child, int], None] = lambda child, code: None,
    ) -> None:
        self.children: list[Child] = []
        self._log_dir = log_dir
        self._grace_s = grace_s
        self._on_event = on_event
        self._on_exit = on_exit
        self._tasks: set[asyncio.Task[None]] = set()
        self._guard: asyncio.subprocess.Process | None = None
        self._hurry = False
        self._token = secrets.token_hex(8)
        # Children's temporary files. Short, and not below log_dir: unix sockets in it have paths of 107 bytes at most.
        self._tmp_dir = ""

    async def __aenter__(self) -> Supervisor:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._guard = await asyncio.create_subprocess_exec(
            *GUARD, "watch", stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        self._tmp_dir = tempfile.mkdtemp(prefix="moe-")
        self._tell_guard(f"!{self._tmp_dir}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for wave in sorted({child.wave for child in self.children}, reverse=True):
                await self.stop([child for child in self.children if child.wave == wave])
        finally:
            for child in self.children:
                child.kill()  # nothing to do, unless the stop itself was cancelled
            if self._tasks:
                await asyncio.wait(self._tasks)
            await asyncio.to_thread(shutil.rmtree, self._tmp_dir, ignore_errors=True)
            assert self._guard is not None
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            await self._guard.wait()
        for task in self._tasks:
            task.result()

    def _tell_guard(self, line: str) -> None:
        assert self._guard is not None
        assert self._guard.stdin is not None
        self._guard.stdin.write(line.encode() + b"\n")

    async def start(self, spec: ChildSpec) -> Child:
        """Start a child; its ready line is not awaited."""
        log_path = self._log_dir / f"{spec.name}{spec.log_suffix}.log"
        mark = f"{self._token}.{len(self.children)}"
        inherited = spec.stderr == "terminal" and sys.stderr.isatty()
        with ExitStack() as parent_ends, ExitStack() as child_ends:
            log = parent_ends.enter_context(_new_log(log_path))
            # Pipes of our own: with asyncio's, wait() would wait for every process that holds the other end.
            stdout = _pipe(parent_ends, child_ends)
            stderr = _pipe(parent_ends, child_ends) if spec.stderr == "terminal" and not inherited else None
            process = await asyncio.create_subprocess_exec(
                *GUARD,
                "exec",
                str(os.getpid()),
                *spec.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stdout[1],
                stderr=None if inherited else stderr[1] if stderr else log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": self._tmp_dir, **spec.env, guard.MARK_NAME: mark},
                start_new_session=True,
            )
            parent_ends.pop_all()  # the tasks below close them
        self._tell_guard(f"+{process.pid} {mark}")
        child = Child(spec, mark, process, log_path, log)
        self.children.append(child)
        self._tasks.add(asyncio.create_task(self._supervise(child, log, stdout[0], stderr and stderr[0])))
        return child

    async def _supervise(self, child: Child, log: Lossy, stdout: BinaryIO, stderr: BinaryIO | None) -> None:
        def kill_when_failed(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                child.kill()  # nobody reads its pipe any more: it would block

        pump = asyncio.create_task(self._pump(child, log, stdout, stderr))
        pump.add_done_callback(kill_when_failed)
        await child.run(pump)
        self._tell_guard(f"-{child.pid}")
        self._on_exit(child, await child.wait())
        if not pump.cancelled():
            pump.result()

    async def _pump(self, child: Child, log: Lossy, stdout: BinaryIO, stderr: BinaryIO | None) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pump_stdout(child, log, stdout))
            if stderr is not None:
                tasks.create_task(self._pump_stderr(log, stderr))

    async def _pump_stdout(self, child: Child, log: Lossy, pipe: BinaryIO) -> None:
        reader, transport = await _open_pipe(pipe)
        pending, too_long = b"", False
        try:
            while chunk := await reader.read(READ_BYTES):
                log.write(chunk)
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    if not too_long:
                        child.take_line(line, self._on_event)
                    too_long = False
                if len(pending) > MAX_LINE_BYTES:
                    pending, too_long = b"", True
        finally:
            transport.close()

    async def _pump_stderr(self, log: Lossy, pipe: BinaryIO) -> None:
        reader, transport = await _open_pipe(pipe)
        try:
            while chunk := await reader.read(READ_BYTES):
                log.write(chunk)
                sys.stderr.write(chunk.decode(errors="replace"))
                sys.stderr.flush()
        finally:
            transport.close()

    async def stop(self, children: list[Child]) -> None:
        """Stop these together: SIGTERM, then SIGKILL after the grace (at once after `hurry`)."""
        await asyncio.gather(*(child.stop(0 if self._hurry else self._grace_s) for child in children))

    def hurry(self) -> None:
        """The user asks a second time: kill what runs."""
        self._hurry = True
        for child in self.children:
            child.kill()


def _new_log(path: Path) -> Lossy:
    """An empty file in append mode, so that what the child writes and what we write for it do not overlap. A disk that
    is full ends no child."""
    path.unlink(missing_ok=True)
    return Lossy(path, "a", name=str(path), tell=lambda text: print(text, file=sys.stderr))


def _pipe(parent_ends: ExitStack, child_ends: ExitStack) -> tuple[BinaryIO, BinaryIO]:
    """A pipe's two ends: the one to read is ours, the one to write the child's."""
    read, write = os.pipe()
    return (
        parent_ends.enter_context(os.fdopen(read, "rb", buffering=0)),
        child_ends.enter_context(os.fdopen(write, "wb", buffering=0)),
    )


async def _open_pipe(pipe: BinaryIO) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=READ_BYTES, loop=loop)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader, loop=loop), pipe)
    return reader, transport
