"""What a process may use: trees of `proc` and `sys` as machines and containers show them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from moe_net.machine import available_memory_bytes, processors

MIB = 2**20
V1_UNLIMITED = "9223372036854771712"
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw"


def v1_mounts(shown: str = "/") -> str:
    return "\n".join(
        [
            # A file system without a source, as some containers have.
            "20 1 0:20 / /tmp rw - tmpfs  rw",
            "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755",
            f"32 31 0:29 {shown} /sys/fs/cgroup/cpu,cpuacct rw,relatime master:3 - cgroup cgroup rw,cpu,cpuacct",
            f"35 31 0:32 {shown} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory",
            "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw",
        ]
    )


def v1_groups(path: str) -> str:
    return f"4:memory:{path}\n1:cpu,cpuacct:{path}\n0::/"


def tree(root: Path, groups: str, mounts: str, files: Mapping[str, object]) -> Path:
    """A machine: /proc/self/cgroup, /proc/self/mountinfo, and files below /sys/fs/cgroup."""
    content = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts}
    content |= {f"sys/fs/cgroup/{name}": str(value) for name, value in files.items()}
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def v2_memory(folder: str, limit: object, usage: int, cache: int = 0) -> dict[str, object]:
    stat = f"anon {usage - cache}\nfile {cache}\ninactive_file {cache}"
    return {f"{folder}memory.max": limit, f"{folder}memory.current": usage, f"{folder}memory.stat": stat}


def v1_memory(folder: str, limit: object, usage: int, cache: int = 0) -> dict[str, object]:
    # The line without `total_` leaves out the groups below.
    stat = f"inactive_file 0\nhierarchical_memory_limit {limit}\ntotal_inactive_file {cache}"
    return {
        f"memory{folder}/memory.limit_in_bytes": limit,
        f"memory{folder}/memory.usage_in_bytes": usage,
        f"memory{folder}/memory.stat": stat,
    }


@pytest.fixture(autouse=True)
def machine_with_1000_mib_and_6_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    available = psutil.virtual_memory()._replace(available=1000 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))


def test_without_cgroups_all_that_the_machine_has_counts(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) == 1000 * MIB
    assert processors(tmp_path) == 6


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "left_mib"),
    [
        ("0::/a", V2_MOUNT, v2_memory("a/", 256 * MIB, 100 * MIB), 156),
        ("0::/a", V2_MOUNT, v2_memory("a/", 256 * MIB, 100 * MIB, cache=60 * MIB), 216),
        ("0::/a", V2_MOUNT, v2_memory("a/", "max", 100 * MIB), 1000),
        ("0::/a", V2_MOUNT, v2_memory("a/", 64_000 * MIB, 100 * MIB), 1000),
        ("0::/a", V2_MOUNT, {**v2_memory("a/", "max", 100 * MIB), "a/memory.high": 200 * MIB}, 100),
        ("0::/a", V2_MOUNT, v2_memory("a/", 100 * MIB, 101 * MIB), 0),
        # The group around it has less left: its other members use much.
        ("0::/a/b", V2_MOUNT, v2_memory("a/b/", 256 * MIB, 100 * MIB) | v2_memory("a/", 512 * MIB, 500 * MIB), 12),
        # A container with a cgroup name space, and one that sees only its own group, at the mount's root.
        ("0::/", V2_MOUNT, v2_memory("", 256 * MIB, 100 * MIB), 156),
        ("0::/docker/0a", V2_MOUNT, v2_memory("", 256 * MIB, 100 * MIB), 156),
        (v1_groups("/a"), v1_mounts(), v1_memory("/a", 256 * MIB, 100 * MIB, cache=60 * MIB), 216),
        (v1_groups("/a"), v1_mounts(), v1_memory("/a", V1_UNLIMITED, 100 * MIB), 1000),
        (
            v1_groups("/a/b"),
            v1_mounts(),
            v1_memory("/a/b", V1_UNLIMITED, 100 * MIB) | v1_memory("/a", 300 * MIB, 100 * MIB),
            200,
        ),
        (v1_groups("/docker/0a"), v1_mounts("/docker/0a"), v1_memory("", 256 * MIB, 100 * MIB), 156),
        (v1_groups("/docker/0a/b"), v1_mounts("/docker/0a"), v1_memory("/b", 256 * MIB, 100 * MIB), 156),
        (v1_groups("/docker/0a"), v1_mounts("/elsewhere"), v1_memory("", 256 * MIB, 100 * MIB), 156),
        # gVisor shows no memory.stat.
        ("0::/", V2_MOUNT, {"memory.max": 256 * MIB, "memory.current": 100 * MIB}, 156),
    ],
)
def test_a_process_can_take_what_the_tightest_group_leaves(
    tmp_path: Path, groups: str, mounts: str, files: Mapping[str, object], left_mib: int
) -> None:
    assert available_memory_bytes(tree(tmp_path, groups, mounts, files)) == left_mib * MIB


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "n"),
    [
        ("0::/a", V2_MOUNT, {"a/cpu.max": "100000 100000"}, 1),
        ("0::/a", V2_MOUNT, {"a/cpu.max": "max 100000"}, 6),
        ("0::/a", V2_MOUNT, {"a/cpu.max": "250000 100000"}, 2),
        ("0::/a", V2_MOUNT, {"a/cpu.max": "20000 100000"}, 1),
        ("0::/a", V2_MOUNT, {"a/cpu.max": "9900000 100000"}, 6),
        ("0::/a/b", V2_MOUNT, {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/", V2_MOUNT, {"cpu.max": "200000 100000"}, 2),
        (
            v1_groups("/a"),
            v1_mounts(),
            {"cpu,cpuacct/a/cpu.cfs_quota_us": 40_000, "cpu,cpuacct/a/cpu.cfs_period_us": 20_000},
            2,
        ),
        (
            v1_groups("/a"),
            v1_mounts(),
            {"cpu,cpuacct/a/cpu.cfs_quota_us": -1, "cpu,cpuacct/a/cpu.cfs_period_us": 100_000},
            6,
        ),
        (
            v1_groups("/docker/0a"),
            v1_mounts("/docker/0a"),
            {"cpu,cpuacct/cpu.cfs_quota_us": 150_000, "cpu,cpuacct/cpu.cfs_period_us": 100_000},
            1,
        ),
    ],
)
def test_processors_are_whole_ones_of_the_tightest_quota_and_at_least_one(
    tmp_path: Path, groups: str, mounts: str, files: Mapping[str, object], n: int
) -> None:
    assert processors(tree(tmp_path, groups, mounts, files)) == n


def test_a_process_may_run_on_fewer_processors_than_its_quota_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert processors(tree(tmp_path, "0::/", V2_MOUNT, {"cpu.max": "400000 100000"})) == 1
