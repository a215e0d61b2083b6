"""A TCP proxy that is a bad network on demand: delay, bandwidth, cuts, silence and damage, in front of one server.

One proxy stands in front of one server, so its line is that server's. What the bytes suffer is decided in
`shaping.py`; this moves them, with callbacks and no task once a connection is open. With perfect conditions a chunk is
written the moment it is read: 1 MiB there and back over loopback costs 0.5 ms more than without the proxy.

Opening a connection costs the client no round trip: the kernel accepts before anybody is asked.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import struct
from collections import deque
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import cast

from moe_coordinator.shaping import PERFECT, Conditions, Line, Schedule

BACKLOG = 512
# To the server; it is meant to be near.
CONNECT_TIMEOUT_S = 10.0
# Of what was delivered and the receiver has not taken; beyond it nothing more is delivered.
HIGH_WATER_BYTES = 1 << 20
_LINGER_0 = struct.pack("ii", 1, 0)


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
        seed: int = 0,
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
        self._links: set[_Link] = set()
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
        link = _Link(self, self._lines, f"{self._seed}/{self.accepted}", accepted)
        self.accepted += 1
        self._links.add(link)
        link.opening = asyncio.create_task(self._open(link))
        self._tasks.add(link.opening)
        link.opening.add_done_callback(link.opened)
        link.opening.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:  # a bug is raised when the proxy is left
            self._tasks.discard(task)

    async def _open(self, link: _Link) -> None:
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

    def forget(self, link: _Link) -> None:
        """Both ends of the connection are gone."""
        self._links.discard(link)

    def count(self, line: Line, n_bytes: int) -> None:
        """So many bytes have been delivered."""
        if line is self._lines[0]:
            self.bytes_up += n_bytes
        else:
            self.bytes_down += n_bytes


class _Link:
    """One client's connection: two ends, and a flow in each direction."""

    def __init__(self, proxy: Proxy, lines: tuple[Line, Line], seed: str, accepted: socket.socket) -> None:
        self.accepted = accepted
        self.opening: asyncio.Task[None] | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.dead = False
        """It was reset: an end that is only now connected goes at once."""
        self.client, self.server = _End(self), _End(self)
        self.up = _Flow(proxy, lines[0], f"{seed}/up", self.client, self.server)
        self.down = _Flow(proxy, lines[1], f"{seed}/down", self.server, self.client)
        self.client.sends, self.client.receives = self.up, self.down
        self.server.sends, self.server.receives = self.down, self.up
        self.up.back, self.down.back = self.down, self.up
        self.may_connect = asyncio.Event()
        """The line is not silent towards the server, or there is nothing to connect any more."""
        self._lines = lines
        self._proxy = proxy
        self.line_changed()

    def line_changed(self) -> None:
        """Conditions did: what waited may pass, or must wait from now on."""
        if self.dead or not self._lines[0].silent:
            self.may_connect.set()
        else:
            self.may_connect.clear()
        self.up.pump()
        self.down.pump()

    def reset(self) -> None:
        """End both connections now, with RST."""
        self.dead = True
        # The opening task finds out by itself. Cancelled, uvloop would close its transport without `connection_lost`.
        self.may_connect.set()
        for flow in (self.up, self.down):
            flow.drop()
        for end in (self.client, self.server):
            end.reset()

    def opened(self, task: asyncio.Task[None]) -> None:
        """Its opening task has ended, somehow."""
        if not self.client.was_made:
            self.accepted.close()
        self.check_closed()

    def check_closed(self) -> None:
        """Called when an end is gone: the link is, once both are and none can come any more."""
        assert self.opening is not None
        if self.client.transport is None and self.server.transport is None and self.opening.done():
            self._proxy.forget(self)
            if not self.closed.done():
                self.closed.set_result(None)


class _End(asyncio.Protocol):
    """Our socket towards the client, or towards the server."""

    sends: _Flow
    receives: _Flow

    def __init__(self, link: _Link) -> None:
        self.transport: asyncio.Transport | None = None
        self.was_made = False
        self._link = link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.was_made = True
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one, and derives from nothing
        if self._link.dead:
            self.reset()
            return
        self.transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self.receives.sink_takes(True)

    def data_received(self, data: bytes) -> None:
        self.sends.feed(data)

    def eof_received(self) -> bool:
        self.sends.end(reset=False)
        return True  # the other direction goes on

    def pause_writing(self) -> None:
        self.receives.sink_takes(False)

    def resume_writing(self) -> None:
        self.receives.sink_takes(True)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.receives.drop()
        self.sends.end(reset=exc is not None)
        self._link.check_closed()

    def close(self) -> None:
        """A regular end, after what is still to be written."""
        if self.transport is not None:
            self.transport.close()

    def reset(self) -> None:
        """RST instead of a regular end: what is not yet written is lost."""
        if self.transport is None:
            return
        fd = self.transport.get_extra_info("socket").fileno()
        if fd >= 0:
            # uvloop's sockets have no setsockopt; a duplicate is the same socket.
            with suppress(OSError), socket.socket(fileno=os.dup(fd)) as duplicate:
                duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
        self.transport.abort()


class _Flow:
    """One direction of one connection: from what `source` reads to what `sink` writes, in order."""

    back: _Flow

    def __init__(self, proxy: Proxy, line: Line, seed: str, source: _End, sink: _End) -> None:
        self.over = False
        """Its end was delivered, or nobody is there any more to deliver to."""
        self._proxy = proxy
        self._line = line
        self._schedule = Schedule(line, seed)
        self._source = source
        self._sink = sink
        self._takes = False
        # (due, bytes); bytes are missing in an entry that is an end.
        self._queue: deque[tuple[float, bytes | None]] = deque()
        self._queued_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._reset_at_end = False

    def feed(self, data: bytes) -> None:
        """Bytes that the source has read just now."""
        if self.over:
            return
        if self._line.perfect and self._takes and not self._queue:
            self._deliver(data)
            return
        flips = self._schedule.flips(len(data))
        if flips:
            damaged = bytearray(data)
            for position, mask in flips:
                damaged[position] ^= mask
            data = bytes(damaged)
        self._queue.append((self._schedule.due_s(monotonic(), len(data)), data))
        self._queued_bytes += len(data)
        self.pump()

    def end(self, *, reset: bool) -> None:
        """The source has ended its direction, or (`reset`) is gone with an error; that travels like bytes."""
        if not self.over:
            self._reset_at_end |= reset
            self._queue.append((self._schedule.due_s(monotonic(), 0), None))
            self.pump()

    def sink_takes(self, takes: bool) -> None:
        """Whether the sink's buffer has room."""
        self._takes = takes
        if takes:
            self.pump()

    def drop(self) -> None:
        """Nothing more is delivered; what the source still sends is read and forgotten, so that its end is seen."""
        self.over = True
        self._queue.clear()
        self._queued_bytes = 0
        self._stop_timer()
        self._press_back()

    def pump(self) -> None:
        """Deliver what is due and may pass; see to it that this is called again when the next entry is due."""
        self._stop_timer()
        now_s = monotonic()
        while self._queue and self._takes and not self._line.silent:
            due_s, data = self._queue[0]
            if due_s > now_s:
                # Rounded up to the loop's resolution: woken a little early, it would spin until the time has come.
                wait_s = math.ceil((due_s - now_s) * 1e3) * 1e-3
                self._timer = asyncio.get_running_loop().call_later(wait_s, self.pump)
                break
            self._queue.popleft()
            if data is None:
                self._deliver_end()
            else:
                self._queued_bytes -= len(data)
                self._deliver(data)
        self._press_back()

    def _deliver(self, data: bytes) -> None:
        assert self._sink.transport is not None
        self._proxy.count(self._line, len(data))
        self._sink.transport.write(data)

    def _deliver_end(self) -> None:
        self.over = True
        if self._reset_at_end:
            self._sink.reset()
        elif self.back.over:
            self._source.close()
            self._sink.close()
        elif self._sink.transport is not None and not self._sink.transport.is_closing():
            self._sink.transport.write_eof()

    def _press_back(self) -> None:
        """Read on, or not: the queue is bounded."""
        full = self._queued_bytes >= self._line.window_bytes
        if full != self._paused and self._source.transport is not None:
            self._paused = full
            if full:
                self._source.transport.pause_reading()
            else:
                self._source.transport.resume_reading()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


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
