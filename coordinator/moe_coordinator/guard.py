"""Makes sure that a launcher's children end with it, however it ends. Run as a plain script, standard library only.

`guard.py exec PID COMMAND...` becomes COMMAND, after asking the kernel to kill it once its parent (which must be PID)
dies. The request is made here and not in `preexec_fn`, which would run Python between fork and exec of a process that
has threads. It costs one start of a bare interpreter: 12 ms.

`guard.py watch` reads `+PID MARK`, `-PID` and `!FOLDER` lines. When its input ends, the launcher is gone: families
still on the list are killed and the folders removed. It is needed because the kernel's promise covers children only,
while a peer has a child of its own, hivemind's p2pd. That one does end by itself, but 2 s later if it was in use, and
up to 30 s later (its idle time-out) if it was not.

A family is a child with all its descendants. Its process group does not tell who they are: p2pd starts in a session of
its own. Their environment does: it carries `MARK_NAME` (Linux; elsewhere only the group is found).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable

PR_SET_PDEATHSIG = 1
MARK_NAME = "MOE_COORDINATOR_CHILD"
# A killed process is gone within a few looks; this bounds the wait for one that shows no environment.
LOOKS_S = 0.5


def _kill_group(group: int) -> None:
    """SIGKILL to every process of the group; nothing when it has none left."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    except PermissionError:
        return  # macOS says so of a group whose last member is a zombie


def _started_ticks(pid: int | str) -> int:
    """When the process started, in clock ticks since boot."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def _look(mark: str) -> tuple[list[int], bool]:
    """Processes whose environment carries the mark, and whether some do not show theirs yet. 3 ms with 90 processes.

    A process has no environment while it begins to execute a program, and that outlasts its parent's `Popen`: of 300
    looks taken right after one, 76 found nothing. Only younger processes than this one count: some daemons
    never show any, and children are younger than both the launcher and its guard.
    """
    entry = f"{MARK_NAME}={mark}".encode()
    found: list[int] = []
    undecided = False
    born_ticks = _started_ticks("self")
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                environment = file.read()
            if entry in environment.split(b"\0"):
                found.append(int(name))
            elif not environment and _started_ticks(name) >= born_ticks:
                os.readlink(f"/proc/{name}/exe")  # fails for zombies and the kernel's own threads
                undecided = True
        except OSError:
            continue  # it ended, or belongs to somebody else
    return found, undecided


def kill_family(leader: int, mark: str) -> None:
    """SIGKILL to the child `leader`, which leads its process group, and to every descendant that still runs."""
    _kill_group(leader)
    if sys.platform != "linux":
        return
    deadline_s = time.monotonic() + LOOKS_S
    found, undecided = _look(mark)
    # Until nobody is found: who was being forked during one look is there in the next.
    while (found or undecided) and time.monotonic() < deadline_s:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        os.sched_yield()
        found, undecided = _look(mark)


def become(parent: int, command: list[str]) -> None:
    """Replace this process by `command`, to be killed when process `parent` dies (Linux; elsewhere only replace)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request: nobody will send the signal
            raise SystemExit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise SystemExit(f"cannot run {command[0]}: {error.strerror}") from error


def watch(lines: Iterable[str]) -> None:
    """Keep the list that `lines` dictate; clear up what is on it when they end."""
    families: dict[int, str] = {}
    folders: list[str] = []
    for line in lines:
        sign, value = line[:1], line[1:].rstrip("\n")
        if sign == "+":
            leader, mark = value.split(" ", 1)
            families[int(leader)] = mark
        elif sign == "-":
            families.pop(int(value), None)
        elif sign == "!":
            folders.append(value)
    for leader, mark in families.items():
        kill_family(leader, mark)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    if sys.argv[1:2] == ["watch"]:
        # Ctrl-C and a closing terminal are the launcher's business; this one goes when its input ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        watch(sys.stdin)
    elif sys.argv[1:2] == ["exec"] and len(sys.argv) > 3:
        become(int(sys.argv[2]), sys.argv[3:])
    else:
        raise SystemExit("usage: guard.py watch | guard.py exec PARENT_PID COMMAND...")


if __name__ == "__main__":
    main()
