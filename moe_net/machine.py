"""What this process may use of the machine: memory and processors, less where a container (a cgroup) has less.

Every figure is read anew, because others use the machine as well. `root` is where `proc` and `sys` lie: tests have
trees of their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path("/")


class _Kind(NamedTuple):
    """How one version of cgroups names what counts here."""

    memory_limits: tuple[str, ...]
    memory_usage: str
    file_cache: str
    """Field of memory.stat: file cache of the whole group that the kernel gives back when memory is asked for."""


_V1 = _Kind(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Kind(("memory.max", "memory.high"), "memory.current", "inactive_file")


def available_memory_bytes(root: Path = ROOT) -> int:
    """Memory that this process can still take: what the machine has available, or what a cgroup leaves if that is
    less."""
    left = [_memory_left(kind, level) for kind, level in _levels(root, "memory")]
    return max(0, min([psutil.virtual_memory().available, *(n_bytes for n_bytes in left if n_bytes is not None)]))


def processors(root: Path = ROOT) -> int:
    """Processors that this process can keep busy: those it may run on, or the whole ones of a cgroup's quota if these
    are fewer; at least one. A fraction is left to the threads that do not compute."""
    may_run_on = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quotas = [_processors(kind, level) for kind, level in _levels(root, "cpu")]
    return max(1, min([may_run_on, *(quota for quota in quotas if quota is not None)]))


def _memory_left(kind: _Kind, level: Path) -> int | None:
    limits = [limit for name in kind.memory_limits if (limit := _number(level / name)) is not None]
    usage = _number(level / kind.memory_usage)
    if usage is None or not limits:
        return None
    stat = dict(line.split(" ", 1) for line in _text(level / "memory.stat").splitlines())
    return min(limits) - (usage - int(stat.get(kind.file_cache, 0)))


def _processors(kind: _Kind, level: Path) -> int | None:
    if kind is _V1:
        quota, period = _number(level / "cpu.cfs_quota_us"), _number(level / "cpu.cfs_period_us")
        # A quota of -1 is none.
        return None if quota is None or period is None or quota < 0 else quota // period
    quota_text, _, period_text = _text(level / "cpu.max").partition(" ")
    return None if quota_text in ("", "max") else int(quota_text) // int(period_text)


def _number(file: Path) -> int | None:
    text = _text(file)
    return None if text in ("", "max") else int(text)


def _text(file: Path) -> str:
    """What stands in the file; empty when it is not there: a root has no limits, and gVisor shows only some files."""
    return file.read_text().strip() if file.exists() else ""


def _levels(root: Path, controller: str) -> Iterator[tuple[_Kind, Path]]:
    """The folders of our own cgroup and of those around it, as far as they can be seen, in each hierarchy that may have
    the controller."""
    if not (root / "proc/self/cgroup").exists():  # not Linux
        return
    own: dict[str, str] = {}
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)  # version 2 stands under the empty name
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        # id parent device root point options [fields] - type source options-of-the-superblock
        before, _, after = line.partition(" - ")
        shown, point = before.split()[3:5]
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2" and "" in own:
            name, version = "", _V2
        elif kind == "cgroup" and controller in options.split(","):
            name, version = controller, _V1
        else:
            continue
        top = level = root / point.lstrip("/")
        # In a container the own group may lie elsewhere than its path says: then the one shown at the top is ours.
        if Path(own[name]).is_relative_to(shown):
            level = top / Path(own[name]).relative_to(shown)
        yield version, level
        while level != top:
            level = level.parent
            yield version, level
