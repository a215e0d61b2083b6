"""One client's connection through a proxy: what was read on one side is written on the other, when its time has come.

Callbacks only: no task of its own once the connection is open.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import cast

from moe_coordinator.shaping import Line, Schedule

# Of what was delivered and the receiver has not taken; beyond it nothing more is delivered.
HIGH_WATER_BYTES = 1 << 20
_LINGER_0 = struct.pack("ii", 1, 0)


class Link:
    """One client's connection: two ends, and a flow in each direction."""

    def __init__(
        self,
        lines: tuple[Line, Line],
        seed: str,
        accepted: socket.socket,
        *,
        count: Callable[[Line, int], None],
        forget: Callable[[Link], None],
    ) -> None:
        """`count` hears how many bytes have been delivered on which line, `forget` when both ends are gone."""
        self.accepted = accepted
        self.opening: asyncio.Task[None] | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.dead = False
        """It was reset: an end that is only now connected goes at once."""
        self.client, self.server = _End(self), _End(self)
        self.up = _Flow(count, lines[0], f"{seed}/up", self.client, self.server)
        self.down = _Flow(count, lines[1], f"{seed}/down", self.server, self.client)
        self.client.sends, self.client.receives = self.up, self.down
        self.server.sends, self.server.receives = self.down, self.up
        self.up.back, self.down.back = self.down, self.up
        self.may_connect = asyncio.Event()
        """The line is not silent towards the server, or there is nothing to connect any more."""
        self._lines = lines
        self._forget = forget
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
            self._forget(self)
            if not self.closed.done():
                self.closed.set_result(None)


class _End(asyncio.Protocol):
    """Our socket towards the client, or towards the server."""

    sends: _Flow
    receives: _Flow

    def __init__(self, link: Link) -> None:
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

    def __init__(self, count: Callable[[Line, int], None], line: Line, seed: str, source: _End, sink: _End) -> None:
        self.over = False
        """Its end was delivered, or nobody is there any more to deliver to."""
        self._count = count
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
        self._count(self._line, len(data))
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
