"""A TCP proxy that is a bad network on demand: delay, bandwidth, cuts, silence and damage, in front of one server.

One proxy stands in front of one server, so its line is that server's. What the bytes suffer is decided in
`shaping.py`; `link.py` moves them. With perfect conditions a chunk is written the moment it is read: 1 MiB there and
back over loopback costs 0.5 ms more than without the proxy.

Opening a connection costs the client no round trip: the kernel accepts before anybody is asked.
"""

from __future__ import annotations

import asyncio
import math
import socket
from types import TracebackType

from moe_coordinator.link import Link
from moe_coordinator.shaping import PERFECT, Conditions, Line

BACKLOG = 512
# To the server; it is meant to be near.
CONNECT_TIMEOUT_S = 10.0


class Proxy:
    """Listens while it is open (`async with`) and carries every connection to `target`.

    `up` is from the client to the server, `down` the way back. Setting either takes effect at once, also for open
    connections: what is on its way keeps the time it was given, what is sent from now on gets the new conditions.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        seed: int | str = 0,
        up: Conditions = PERFECT,
        down: Conditions = PERFECT,
    ) -> None:
        self.target = target
        """host:port that new connections go to; while it is None, or nobody listens there, they are reset."""
        self.accepted = 0
        """Connections so far."""
        self.bytes_up = 0
        """Delivered to the server so far."""
        self.bytes_down = 0
        """Delivered to clients so far."""
        self._bind = (host, port)
        self._seed = seed
        self._up, self._down = up, down
        self._lines = Line(up), Line(down)
        self._links: set[Link] = set()
        self._listener: socket.socket | None = None
        self._holder: socket.socket | None = None
        self._blackhole = False
        self._end_of_blackhole: asyncio.TimerHandle | None = None
        self._end_of_cut: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        # Bound and never listening, it keeps the port ours while connections are refused.
        self._holder = _bound(*self._bind)
        self._listen()
        self._conditions_changed()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for timer in (self._end_of_cut, self._end_of_blackhole):
            if timer is not None:
                timer.cancel()
        self._stop_listening()
        links = tuple(self._links)
        for link in links:
            link.reset()
        for link in links:
            await link.closed
        assert self._holder is not None
        self._holder.close()
        for task in self._tasks:
            task.result()

    @property
    def address(self) -> str:
        """host:port it listens on; known once it is open."""
        assert self._holder is not None
        host, port = self._holder.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def connections(self) -> int:
        """Open now."""
        return len(self._links)

    @property
    def up(self) -> Conditions:
        """From the client to the server."""
        return self._up

    @up.setter
    def up(self, conditions: Conditions) -> None:
        self._up = conditions
        self._conditions_changed()

    @property
    def down(self) -> Conditions:
        """From the server to the client."""
        return self._down

    @down.setter
    def down(self, conditions: Conditions) -> None:
        self._down = conditions
        self._conditions_changed()

    def shape(self, both: Conditions) -> None:
        """The same conditions in both directions."""
        self._up = self._down = both
        self._conditions_changed()

    def cut(self, duration_s: float = 0.0) -> None:
        """Reset every connection now, and refuse new ones for so long (`math.inf`: until `end_cut`)."""
        self._stop_listening()
        for link in tuple(self._links):
            link.reset()
        if self._end_of_cut is not None:
            self._end_of_cut.cancel()
            self._end_of_cut = None
        if duration_s <= 0:
            self.end_cut()
        elif math.isfinite(duration_s):
            self._end_of_cut = asyncio.get_running_loop().call_later(duration_s, self.end_cut)

    def end_cut(self) -> None:
        """Accept connections again; nothing to do when it does."""
        if self._end_of_cut is not None:
            self._end_of_cut.cancel()
            self._end_of_cut = None
        if self._listener is None:
            self._listen()

    def blackhole(self, duration_s: float = math.inf) -> None:
        """For so long (or until `end_blackhole`) keep and accept connections, and carry nothing in either direction.

        Nothing is lost: like TCP, which sends again, it delivers afterwards what has been sent meanwhile.
        """
        self.end_blackhole()
        self._blackhole = True
        self._conditions_changed()
        if math.isfinite(duration_s):
            self._end_of_blackhole = asyncio.get_running_loop().call_later(duration_s, self.end_blackhole)

    def end_blackhole(self) -> None:
        """Carry bytes again, those that wait first; nothing to do when there is no blackhole."""
        if self._end_of_blackhole is not None:
            self._end_of_blackhole.cancel()
            self._end_of_blackhole = None
        if self._blackhole:
            self._blackhole = False
            self._conditions_changed()

    def _conditions_changed(self) -> None:
        for line, conditions in zip(self._lines, (self._up, self._down), strict=True):
            line.conditions = conditions
            if self._blackhole:
                line.silent, line.perfect = True, False
        for link in tuple(self._links):
            link.line_changed()

    def _listen(self) -> None:
        host, port = self._holder.getsockname()[:2] if self._holder is not None else self._bind
        self._listener = _bound(host, port)
        self._listener.listen(BACKLOG)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # the client went away meanwhile
        accepted.setblocking(False)
        link = Link(
            self._lines, f"{self._seed}/{self.accepted}", accepted, count=self._count, forget=self._links.discard
        )
        self.accepted += 1
        self._links.add(link)
        link.opening = asyncio.create_task(self._open(link))
        self._tasks.add(link.opening)
        link.opening.add_done_callback(link.opened)
        link.opening.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:  # a bug is raised when the proxy is left
            self._tasks.discard(task)

    async def _open(self, link: Link) -> None:
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: link.client, link.accepted)
        await link.may_connect.wait()
        if link.dead:
            return
        if self.target is None:
            link.reset()
            return
        host, _, port = self.target.rpartition(":")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await loop.create_connection(lambda: link.server, host.strip("[]"), int(port))
        except (OSError, TimeoutError):
            link.reset()

    def _count(self, line: Line, n_bytes: int) -> None:
        if line is self._lines[0]:
            self.bytes_up += n_bytes
        else:
            self.bytes_down += n_bytes


def _bound(host: str, port: int) -> socket.socket:
    """A socket of ours at host:port. Others of ours may be bound there as well: see `Proxy.__aenter__`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.setblocking(False)
        bound.bind((host.strip("[]"), port))
    except OSError:
        bound.close()
        raise
    return bound
