"""Hosts on networks of their own: namespaces joined by bridges, which end with the processes that hold them.

Two sites with one bridge each; the line between the sites can be cut. Needs root, or the right to make user namespaces
(Linux's default); no name, file or address of the machine is touched.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

HOLD = ("sleep", "infinity")


class Sites:
    """Two sites A and B. Made by `two_sites`."""

    def __init__(self, stack: ExitStack, n_hosts: int) -> None:
        self._stack = stack
        outermost = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user", "--net")
        self._middle = self._hold(outermost)
        self._hosts: list[int] = []
        self._ip("link", "add", "site-a", "type", "bridge")
        self._ip("link", "add", "site-b", "type", "bridge")
        self._ip("link", "add", "line", "type", "veth", "peer", "name", "line-b")
        self._ip("link", "set", "line", "master", "site-a")
        self._ip("link", "set", "line-b", "master", "site-b")
        for device in ("site-a", "site-b", "line", "line-b"):
            self._ip("link", "set", device, "up")
        for number in range(n_hosts):
            self._add_host(number, "site-a" if number < n_hosts // 2 else "site-b")

    @staticmethod
    def address(host: int) -> str:
        """The host's IPv4 address; the first half of the hosts is in site A, the others in site B."""
        return f"10.77.0.{host + 1}"

    def on(self, host: int, argv: Sequence[str]) -> tuple[str, ...]:
        """The command line that runs `argv` on that host."""
        return (*self._enter(self._hosts[host]), *argv)

    def part(self) -> None:
        """Cut the line between the sites: packets are lost, nobody is told."""
        self._ip("link", "set", "line", "down")

    def rejoin(self) -> None:
        """The line between the sites is there again."""
        self._ip("link", "set", "line", "up")

    def move(self, host: int, address: str) -> None:
        """The host gets another address in the place of its own, as a line that was cut and comes back."""
        self._ip("addr", "flush", "dev", "eth0", inside=self._hosts[host])
        self._ip("addr", "add", f"{address}/24", "dev", "eth0", inside=self._hosts[host])

    def _add_host(self, number: int, bridge: str) -> None:
        pid = self._hold((*self._enter(self._middle), "unshare", "--net"))
        self._hosts.append(pid)
        self._ip("link", "add", f"host-{number}", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._ip("link", "set", f"host-{number}", "master", bridge, "up")
        self._ip("addr", "add", f"{self.address(number)}/24", "dev", "eth0", inside=pid)
        for device in ("lo", "eth0"):
            self._ip("link", "set", device, "up", inside=pid)

    def _enter(self, pid: int) -> tuple[str, ...]:
        user = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
        return ("nsenter", "--target", str(pid), "--net", *user)

    def _hold(self, prefix: Sequence[str]) -> int:
        # It says a word once it is in its namespace, which is held by whatever it becomes then.
        script = f"echo there; exec {' '.join(HOLD)}"
        process = subprocess.Popen([*prefix, "sh", "-c", script], stdout=subprocess.PIPE)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == b"there\n"
        return process.pid

    def _ip(self, *arguments: str, inside: int | None = None) -> None:
        subprocess.run([*self._enter(inside or self._middle), "ip", *arguments], check=True, capture_output=True)


@contextmanager
def two_sites(n_hosts: int) -> Iterator[Sites]:
    """Hosts 0 .. n_hosts-1, half of them in each site, all in reach of each other."""
    with ExitStack() as stack:
        yield Sites(stack, n_hosts)
