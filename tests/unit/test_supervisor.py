"""The supervisor with small children: the real processes of a swarm behave in each of these ways one day."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from moe_coordinator.supervisor import MAX_LINE_BYTES, Child, ChildError, ChildSpec, Event, Supervisor

READY = "import json, os, signal, sys, time\nprint(json.dumps({'event': 'ready', 'pid': os.getpid()}), flush=True)\n"
# What p2pd is to a peer: a child of the child, in a session of its own, out of reach of signals to the child's group.
GRANDCHILD = (
    "import subprocess\n"
    "command = [sys.executable, '-S', '-c', 'import signal; signal.pause()']\n"
    "grandchild = subprocess.Popen(command, start_new_session=True)\n"
    "print(json.dumps({'event': 'grandchild', 'pid': grandchild.pid}), flush=True)\n"
)
WAIT = "signal.pause()\n"
DEADLINE_S = 20.0


def script(text: str, *, name: str = "child", stderr: str = "log", wave: int = 0) -> ChildSpec:
    return ChildSpec(name=name, argv=(sys.executable, "-S", "-c", text), stderr=stderr, wave=wave)  # type: ignore[arg-type]


class Seen:
    """Events and exits, and a wait for them."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Event]] = []
        self.exits: dict[str, int] = {}
        self._changed = asyncio.Event()

    def event(self, child: Child, event: Event) -> None:
        self.events.append((child.name, event))
        self._changed.set()

    def exit(self, child: Child, code: int) -> None:
        self.exits[child.name] = code
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def of(self, kind: str) -> list[Event]:
        return [event for _, event in self.events if event["event"] == kind]


@asynccontextmanager
async def supervised(tmp_path: Path, *, grace_s: float = DEADLINE_S) -> AsyncIterator[tuple[Supervisor, Seen]]:
    seen = Seen()
    async with Supervisor(tmp_path / "logs", grace_s=grace_s, on_event=seen.event, on_exit=seen.exit) as supervisor:
        yield supervisor, seen


def ended(pid: int) -> bool:
    """No such process, or only its entry in the table, which is init's to clear."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_ended(pids: list[int]) -> list[int]:
    """Those still running after the deadline."""
    alive: list[psutil.Process] = []
    for pid in pids:
        try:
            alive.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    deadline_s = time.monotonic() + DEADLINE_S
    while alive and time.monotonic() < deadline_s:
        psutil.wait_procs(alive, timeout=0.02)
        alive = [process for process in alive if not ended(process.pid)]
    return [process.pid for process in alive]


async def test_a_ready_line_is_returned_and_other_lines_are_logged(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, _):
        child = await supervisor.start(script("print('hello')\nprint('{not json')\n" + READY + WAIT))
        ready = await child.ready(DEADLINE_S)
        assert ready == {"event": "ready", "pid": child.pid}
        assert child.log_path.read_text().splitlines() == ["hello", "{not json", json.dumps(ready)]
    assert ended(child.pid)


async def test_a_child_that_dies_before_it_is_ready_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, seen):
        child = await supervisor.start(script("import sys\nsys.exit('no such expert: 9.99')", name="peer-7"))
        with pytest.raises(ChildError, match=r"peer-7 ended with exit code 1 before it was ready(.|\n)*expert: 9\.99"):
            await child.ready(DEADLINE_S)
    assert seen.exits == {"peer-7": 1}


async def test_a_child_that_is_never_ready_is_an_error_at_the_deadline(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, _):
        child = await supervisor.start(script("import signal\nsignal.pause()"))
        with pytest.raises(ChildError, match="was not ready after 0"):
            await child.ready(0)
    assert ended(child.pid)


async def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, _):
        child = await supervisor.start(ChildSpec(name="ghost", argv=("/nonexistent/program",)))
        with pytest.raises(ChildError, match="cannot run /nonexistent/program"):
            await child.ready(DEADLINE_S)


async def test_leaving_stops_children_with_sigterm_and_they_may_exit_cleanly(tmp_path: Path) -> None:
    clean = READY.replace("print(", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nprint(", 1) + WAIT
    async with supervised(tmp_path) as (supervisor, seen):
        for name in ("a", "b"):
            await (await supervisor.start(script(clean, name=name))).ready(DEADLINE_S)
    assert seen.exits == {"a": 0, "b": 0}


async def test_who_uses_others_is_stopped_before_them(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, seen):
        for wave, name in ((0, "coordinator"), (2, "trainer"), (1, "peer")):
            await (await supervisor.start(script(READY + WAIT, name=name, wave=wave))).ready(DEADLINE_S)
    assert list(seen.exits) == ["trainer", "peer", "coordinator"]


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    stubborn = READY.replace("print(", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(", 1) + WAIT
    async with supervised(tmp_path, grace_s=0.05) as (supervisor, seen):
        child = await supervisor.start(script(stubborn))
        await child.ready(DEADLINE_S)
    assert seen.exits == {"child": -signal.SIGKILL}


async def test_a_suspended_child_makes_no_step_until_it_is_resumed_and_is_stopped_cleanly_all_the_same(
    tmp_path: Path,
) -> None:
    clean = READY.replace("print(", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nprint(", 1) + WAIT
    async with supervised(tmp_path) as (supervisor, seen):
        for name in ("resumed", "left"):
            child = await supervisor.start(script(clean, name=name))
            await child.ready(DEADLINE_S)
            child.suspend()
            deadline_s = time.monotonic() + DEADLINE_S
            while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
                assert time.monotonic() < deadline_s
                await asyncio.sleep(0)
            if name == "resumed":
                child.resume()
                while psutil.Process(child.pid).status() == psutil.STATUS_STOPPED:
                    assert time.monotonic() < deadline_s
                    await asyncio.sleep(0)
    assert seen.exits == {"resumed": 0, "left": 0}


async def test_a_suspended_child_can_be_killed(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, _):
        child = await supervisor.start(script(READY + WAIT))
        await child.ready(DEADLINE_S)
        child.suspend()
        child.kill()
        assert await child.wait() == -signal.SIGKILL


async def test_a_child_is_started_again_with_its_name_and_another_log(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, _):
        first = await supervisor.start(script(READY + WAIT))
        await first.ready(DEADLINE_S)
        first.kill()
        await first.wait()
        second = await supervisor.start(dataclasses.replace(script(READY + WAIT), log_suffix=".1"))
        ready = await second.ready(DEADLINE_S)
        assert (second.name, second.log_path.name) == ("child", "child.1.log")
        assert ready["pid"] not in (None, first.pid)
        assert str(first.pid) in first.log_path.read_text()


async def test_asking_a_second_time_kills_without_waiting_for_the_grace(tmp_path: Path) -> None:
    stubborn = READY.replace("print(", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(", 1) + WAIT
    async with supervised(tmp_path, grace_s=3600) as (supervisor, seen):
        child = await supervisor.start(script(stubborn))
        await child.ready(DEADLINE_S)
        stopping = asyncio.create_task(supervisor.stop([child]))
        supervisor.hurry()
        await stopping
    assert seen.exits == {"child": -signal.SIGKILL}


async def test_killing_a_child_kills_its_children_and_nobody_else(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, seen):
        victim = await supervisor.start(script(READY + GRANDCHILD + WAIT, name="victim"))
        other = await supervisor.start(script(READY + WAIT, name="other"))
        await other.ready(DEADLINE_S)
        await seen.until(lambda: len(seen.of("grandchild")) == 1)
        victim.kill()
        assert await victim.wait() == -signal.SIGKILL
        assert wait_until_ended([seen.of("grandchild")[0]["pid"]]) == []
        assert other.running
        assert not ended(other.pid)


async def test_a_grandchild_is_cleared_up_when_the_child_ends_by_itself(tmp_path: Path) -> None:
    # The grandchild holds the other end of stdout: the end of the pipe never comes by itself.
    async with supervised(tmp_path) as (supervisor, seen):
        child = await supervisor.start(script(READY + GRANDCHILD))
        async with asyncio.timeout(DEADLINE_S):
            assert await child.wait() == 0
        assert wait_until_ended([seen.of("grandchild")[0]["pid"]]) == []


async def test_a_flood_on_stdout_neither_blocks_the_child_nor_hides_an_event(tmp_path: Path) -> None:
    flood = (
        "import json, sys\n"
        "for i in range(20000):\n    print('x' * 100)\n"
        f"print('{{' * {2 * MAX_LINE_BYTES})\n"
        "print(json.dumps({'event': 'step', 'step': 1}))\n"
        "print(json.dumps({'event': 'done'}), end='')\n"  # no newline: the process died while it wrote
    )
    async with supervised(tmp_path) as (supervisor, seen):
        child = await supervisor.start(script(flood))
        assert await child.wait() == 0
    assert seen.events == [("child", {"event": "step", "step": 1})]
    assert child.log_path.stat().st_size > 20000 * 101 + 2 * MAX_LINE_BYTES


async def test_stderr_meant_for_the_terminal_also_stands_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with supervised(tmp_path) as (supervisor, _):
        child = await supervisor.start(script("import sys\nsys.exit('out of data')", stderr="terminal"))
        assert await child.wait() == 1
    assert "out of data" in capsys.readouterr().err
    assert "out of data" in child.report("failed")


async def test_an_error_in_the_body_still_stops_every_child(tmp_path: Path) -> None:
    children: list[Child] = []

    async def body() -> None:
        async with supervised(tmp_path) as (supervisor, _):
            children.append(await supervisor.start(script(READY + WAIT)))
            await children[0].ready(DEADLINE_S)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body()
    assert ended(children[0].pid)


async def test_a_bug_in_the_event_handler_is_raised_and_not_swallowed(tmp_path: Path) -> None:
    def broken(child: Child, event: Event) -> None:
        raise KeyError(event["event"])

    async def body() -> None:
        async with Supervisor(tmp_path, on_event=broken) as supervisor:
            child = await supervisor.start(script(READY + WAIT))
            await child.wait()

    with pytest.raises(ExceptionGroup) as caught:
        await body()
    assert caught.group_contains(KeyError)


async def test_children_write_temporary_files_where_they_are_removed(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, seen):
        text = "import tempfile\nprint(json.dumps({'event': 'path', 'path': tempfile.mkdtemp()}), flush=True)\n"
        await supervisor.start(script(READY + text + WAIT))
        await seen.until(lambda: len(seen.of("path")) == 1)
        assert await asyncio.to_thread(os.path.isdir, seen.of("path")[0]["path"])
    assert not await asyncio.to_thread(os.path.exists, seen.of("path")[0]["path"])


LAUNCHER = """
import asyncio, os, signal, sys
from pathlib import Path
from moe_coordinator.supervisor import ChildSpec, Supervisor

async def main():
    def relay(child, event):
        print(event["pid"], flush=True)
    async with Supervisor(Path(sys.argv[1]), on_event=relay) as supervisor:
        for name in ("a", "b"):
            await supervisor.start(ChildSpec(name=name, argv=(sys.executable, "-S", "-c", sys.argv[2])))
        print(supervisor._guard.pid, supervisor._tmp_dir, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def kill_a_launcher(tmp_path: Path, text: str, *, guard_first: bool) -> tuple[list[int], str]:
    """SIGKILL a launcher of two such children; returns every pid that was there, and the folder for temporary files."""
    launcher = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LAUNCHER, str(tmp_path), text), stdout=asyncio.subprocess.PIPE
    )
    assert launcher.stdout is not None
    n_lines = 1 + 2 * text.count("print(")
    async with asyncio.timeout(DEADLINE_S):
        lines = [(await launcher.stdout.readline()).decode().split() for _ in range(n_lines)]
    ((guard, folder),) = [words for words in lines if len(words) == 2]
    if guard_first:
        os.kill(int(guard), signal.SIGKILL)
    launcher.kill()
    await launcher.wait()
    pids = [int(words[0]) for words in lines]
    assert len(set(pids)) == n_lines
    return pids, folder


async def test_a_launcher_killed_outright_leaves_neither_children_nor_grandchildren(tmp_path: Path) -> None:
    pids, folder = await kill_a_launcher(tmp_path, READY + GRANDCHILD + WAIT, guard_first=False)
    assert wait_until_ended(pids) == []
    assert not await asyncio.to_thread(os.path.exists, folder)


async def test_children_end_with_a_launcher_whose_guard_was_killed_before(tmp_path: Path) -> None:
    pids, folder = await kill_a_launcher(tmp_path, READY + WAIT, guard_first=True)
    assert wait_until_ended(pids) == []
    await asyncio.to_thread(shutil.rmtree, folder)
