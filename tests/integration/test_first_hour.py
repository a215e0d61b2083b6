"""What `docs/first-hour.md` tells a newcomer to type, typed into a shell on each of two machines, does what it says.

The machines are network namespaces with the page's own addresses: of what is typed, nothing is replaced.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import sys
import tempfile
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from networks import Sites, two_sites

from moe_coordinator import guard
from moe_net.checkpoint_folder import checkpoints_of, newest_in
from moe_peer.checkpoint import saved_versions
from moe_peer.metrics import Event, StepMetrics, read_metrics

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "first-hour.md").read_text()
ADDRESSES = {"machine one": "192.168.1.10", "machine two": "192.168.1.11"}
# Not typed: CI does as much, in a fresh clone, before it runs this.
INSTALLING = ("python3 -m venv .venv", ". .venv/bin/activate", "pip install --editable '.[plot]'")
# Commands that change nothing and take less than LOOK_S, which a reader repeats until they show what the page says.
LOOKS = ("moe-peer health ", "grep ", "ls ")
PATIENCE_S = 120.0
LOOK_S = 10.0
BETWEEN_LOOKS_S = 0.2
SEEN = "#> "
BLOCK = re.compile(r"^```(\w*)\n(?:# (.*)\n)?((?s:.*?))^```$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A line that is typed, and the lines that are seen then."""

    machine: str
    text: str
    seen: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """Text that is saved under a name."""

    machine: str
    name: str
    text: str


def instructions_of(page: str) -> Iterator[Command | File]:
    """What the page's blocks tell a reader to do, in order; ValueError for one that does not say what, or where."""
    for language, head, text in BLOCK.findall(page):
        where, _, name = head.partition(": ")
        where = where.partition(",")[0]
        if (language, where) == ("toml", "machine one") and name:
            yield File(machine=where, name=name, text=text)
        elif language == "sh" and where in (*ADDRESSES, "both machines") and not text.startswith("#"):
            for machine in ADDRESSES if where == "both machines" else (where,):
                yield from _commands_of(machine, text)
        else:
            raise ValueError(f"nobody knows what to do with this block:\n{language} {head}\n{text}")


def _commands_of(machine: str, text: str) -> Iterator[Command]:
    for part in re.split(r"\n(?!#)", text.replace("\\\n", "").rstrip()):
        command, *seen = part.split("\n")
        yield Command(machine=machine, text=command, seen=tuple(line.removeprefix(SEEN) for line in seen))


def shows(output: str, seen: tuple[str, ...]) -> bool:
    """Whether these are among the lines of `output`, in this order; `…` is anything."""
    lines = iter(output.splitlines())
    patterns = (".*".join(map(re.escape, line.split("…"))) for line in seen)
    return all(any(re.fullmatch(pattern, line) for line in lines) for pattern in patterns)


class Terminal:
    """A shell on one of the machines, in a folder of its own. Made by `terminal`."""

    def __init__(self, shell: asyncio.subprocess.Process, folder: Path) -> None:
        assert shell.stdin is not None
        assert shell.stdout is not None
        self._stdin, self._stdout = shell.stdin, shell.stdout
        self.folder = folder

    async def type(self, command: str) -> tuple[int, str]:
        """Exit code and output of `command`."""
        end = secrets.token_hex(8)
        self._stdin.write(f"{command}\necho {end} $?\n".encode())
        output: list[str] = []
        while not (line := (await self._stdout.readline()).decode()).startswith(end):
            assert line, f"{command} has ended the shell: {''.join(output)}"
            output.append(line)
        return int(line.split()[1]), "".join(output)

    async def obey(self, instruction: Command | File) -> None:
        """Do it, and see that it went as the page says."""
        if isinstance(instruction, File):
            (self.folder / instruction.name).write_text(instruction.text)
            return
        now_s = asyncio.get_running_loop().time
        deadline_s = now_s() + PATIENCE_S
        while True:
            async with asyncio.timeout_at(deadline_s):
                code, output = await self.type(instruction.text)
            if code == 0 and shows(output, instruction.seen):
                return
            if not instruction.text.startswith(LOOKS) or now_s() > deadline_s - LOOK_S:
                raise AssertionError(f"{instruction} has exit code {code}, and shows\n{output}")
            await asyncio.sleep(BETWEEN_LOOKS_S)


@asynccontextmanager
async def terminal(sites: Sites, host: int, folder: Path) -> AsyncIterator[Terminal]:
    """A shell on `host`; what it has started ends with it."""
    mark = secrets.token_hex(8)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # For sockets of processes that are killed: a short name, and gone in the end.
    with tempfile.TemporaryDirectory(prefix="moe-") as tmp:
        shell = await asyncio.create_subprocess_exec(
            *sites.on(host, ("bash",)), cwd=folder, start_new_session=True,
            env={**os.environ, "PATH": path, "TMPDIR": tmp, guard.MARK_NAME: mark},
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield Terminal(shell, folder)
        finally:
            guard.kill_family(shell.pid, mark)
            await shell.communicate()


async def test_a_newcomer_trains_on_two_machines_and_comes_back_after_a_crash(tmp_path: Path) -> None:
    terminals: dict[str, Terminal] = {}
    async with AsyncExitStack() as stack:
        sites = stack.enter_context(two_sites(len(ADDRESSES)))
        for host, (machine, address) in enumerate(ADDRESSES.items()):
            sites.move(host, address)
            clone = tmp_path / machine
            clone.mkdir()
            shutil.copy(ROOT / "README.md", clone)
            shutil.copytree(ROOT / "docs", clone / "docs")
            terminals[machine] = await stack.enter_async_context(terminal(sites, host, clone))
        for instruction in instructions_of(PAGE):
            if not (isinstance(instruction, Command) and instruction.text in INSTALLING):
                await terminals[instruction.machine].obey(instruction)
    _check_what_is_left(*(terminal.folder for terminal in terminals.values()))


def _check_what_is_left(one: Path, two: Path) -> None:
    """One curve, of experts that have made each of its steps and never began afresh; and nobody has stumbled."""
    for log in (*one.glob("*.log"), *two.glob("*.log")):
        assert "Traceback" not in log.read_text(), log.read_text()
    out = one / "runs" / "first"
    records = read_metrics(out / "metrics.jsonl")
    steps = [record for record in records if isinstance(record, StepMetrics)]
    assert len(steps) > 400
    assert [step.step for step in steps] == list(range(len(steps)))
    assert "experts_differ" not in [record.what for record in records if isinstance(record, Event)]
    newest = newest_in(checkpoints_of(out))
    assert newest is not None
    assert set(saved_versions(newest).values()) == {len(steps)}
    # The crash threw the run back to the checkpoint of step 300.
    before, after = (sum(step.loss for step in part) / len(part) for part in (steps[250:300], steps[300:350]))
    assert after < before + 0.05


def test_what_the_page_installs_is_there_to_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"plot", "data"} <= project["optional-dependencies"].keys()
    assert {"moe-peer", "moe-coordinator"} == project["scripts"].keys()
    typed = [each.text for each in instructions_of(PAGE) if isinstance(each, Command)]
    assert set(INSTALLING) <= set(typed)


@pytest.mark.parametrize("block", ["sh\nls\n", "sh\n# machine three\nls\n", "toml\na = 1\n", "text\nwhat\n", "\nls\n"])
def test_a_block_that_nobody_would_run_is_an_error(block: str) -> None:
    with pytest.raises(ValueError, match="nobody knows"):
        list(instructions_of(f"# A page\n\n```{block}```\n"))


def test_the_readme_points_to_the_page_and_is_short() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "`docs/first-hour.md`" in readme
    assert len(readme.splitlines()) < 120
