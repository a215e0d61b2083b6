# pyright: basic, reportArgumentType=false
"""Echo over a bare TCP connection of uvloop: an 8-byte length, then the payload. The bar for all the others.

Both sides own the whole message as one bytes object before they go on, as a gRPC handler does: pieces are joined.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Mapping
from typing import cast

from _processes import say
from _wire_common import RoundTrip, run_side
from torch import Tensor

LENGTH = struct.Struct("<Q")


class Framed(asyncio.Protocol):
    """Calls `on_message` with each whole message."""

    def __init__(self, on_message: Callable[[Framed, bytes], None]) -> None:
        self._on_message = on_message
        self._pieces: list[bytes] = []
        self._have_bytes = 0
        self._need_bytes = LENGTH.size
        self._in_header = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit asyncio.Transport.
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._pieces.append(data)
        self._have_bytes += len(data)
        while self._have_bytes >= self._need_bytes:
            whole = b"".join(self._pieces) if len(self._pieces) > 1 else self._pieces[0]
            message, rest = whole[: self._need_bytes], whole[self._need_bytes :]
            self._pieces, self._have_bytes = [rest], len(rest)
            if self._in_header:
                (self._need_bytes,) = LENGTH.unpack(message)
            else:
                self._need_bytes = LENGTH.size
                self._on_message(self, message)
            self._in_header = not self._in_header

    def send(self, payload: bytes | memoryview) -> None:
        self.transport.write(LENGTH.pack(len(payload)))
        self.transport.write(payload)


async def serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Framed(lambda link, message: link.send(message)), "127.0.0.1", 0)
    say(event="ready", address=str(server.sockets[0].getsockname()[1]))
    await server.serve_forever()


async def connect(port: str) -> Mapping[str, RoundTrip]:
    loop = asyncio.get_running_loop()
    waiting: list[asyncio.Future[bytes]] = []
    _, link = await loop.create_connection(
        lambda: Framed(lambda _link, message: waiting.pop().set_result(message)), "127.0.0.1", int(port)
    )

    async def round_trip(x_RD: Tensor) -> int:
        waiting.append(asyncio.get_running_loop().create_future())
        # Contiguous CPU memory as bytes, without a copy.
        link.send(memoryview(x_RD.numpy()).cast("B"))
        return len(await waiting[0])

    return {"tcp": round_trip}


if __name__ == "__main__":
    run_side(serve, connect)
