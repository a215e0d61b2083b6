"""Proof that tests leave nothing behind: no process, no listening port after each test, no temporary file in the end.

Every process a test starts inherits `MARK`, so that those that outlive their parent (which then belong to init) are
found as well. Temporary files of tests and of their processes go below one folder, which must be empty in the end, and
the repository's root must have nothing new. Generated tests draw the same examples every time, and take their time.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir

MARK = "MOE_NET_TEST_SESSION"
# A process that was sent SIGKILL, and a socket that was closed, may take this long to vanish on a loaded machine.
PATIENCE_S = 5.0

ROOT = Path(__file__).resolve().parents[1]
# What Python, and tools that a developer may run meanwhile, make there.
CACHES = frozenset({".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".import_linter_cache"})

hypothesis.settings.register_profile("moe-net", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("moe-net")

# Triton's kernels run on a CPU through its interpreter, if it is told so before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Two threads for matrices of 24 columns wait for each other more than they compute: 7 s of tests took a minute.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # Even without a database it keeps what it read from our sources, by default in the current folder.
    folder = tempfile.mkdtemp(prefix="moe-hypothesis-")
    set_hypothesis_home_dir(folder)
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


class ProcessTable:
    """Finds the processes of this session. It looks into each other process once: 0.3 ms a look instead of 8."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._others: set[int] = {os.getpid()}

    def ours(self) -> dict[int, str]:
        """Living processes that carry the mark or are children of this one: pid -> command line."""
        pids = set(psutil.pids())
        self._others &= pids
        found: dict[int, str] = {}
        for pid in pids - self._others:
            try:
                process = psutil.Process(pid)
                if process.environ().get(MARK) != self._mark and process.ppid() != os.getpid():
                    self._others.add(pid)
                elif process.status() != psutil.STATUS_ZOMBIE:
                    found[pid] = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


def listening_ports() -> set[int]:
    """Ports this process listens on."""
    connections = psutil.Process().net_connections(kind="inet")
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


def left_behind(table: ProcessTable, processes: dict[int, str], ports: set[int]) -> list[str]:
    """What is there now and was not before; waits a little for what is about to go."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        new = [f"process {pid}: {text}" for pid, text in table.ours().items() if pid not in processes]
        new += [f"listening port {port}" for port in listening_ports() - ports]
        if not new or time.monotonic() > deadline_s:
            return new
        os.sched_yield()


def in_the_root() -> set[str]:
    """What lies at the top of the repository, caches left out."""
    return {path.name for path in ROOT.iterdir()} - CACHES


@pytest.fixture(scope="session")
def process_table() -> ProcessTable:
    """Knows this session's processes by what stands in their environment."""
    mark = secrets.token_hex(8)
    os.environ[MARK] = mark
    return ProcessTable(mark)


@pytest.fixture(scope="session", autouse=True)
def _no_file_survives(process_table: ProcessTable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    tmp_path_factory.getbasetemp()  # pytest keeps its own where it always does
    # Not a folder of pytest's: a unix socket's path has at most 107 bytes, and pytest's folders take half of that.
    folder = Path(tempfile.mkdtemp(prefix="moe-test-"))
    before, root_before = (os.environ.get("TMPDIR"), tempfile.tempdir), in_the_root()
    # torch makes itself a cache folder as soon as an optimizer is built: a name of its own, so that it is known.
    cache = folder / "torch"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
        shutil.rmtree(cache, ignore_errors=True)
        left = left_behind(process_table, {}, set()) + [str(path.relative_to(folder)) for path in folder.iterdir()]
        left += sorted(in_the_root() - root_before)
        assert not left, f"left behind by the whole session: {left}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("TMPDIR")
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        if before[0] is not None:
            os.environ["TMPDIR"] = before[0]
        tempfile.tempdir = before[1]


@pytest.fixture(autouse=True)
def _nothing_is_left_running(process_table: ProcessTable) -> Iterator[None]:
    # Fixtures of modules start before this one: what they keep running is in the first look already.
    processes, ports = process_table.ours(), listening_ports()
    yield
    left = left_behind(process_table, processes, ports)
    assert not left, f"left behind: {left}"
