"""Large messages as a stream of `Piece`s and back: they are cut while they are sent, and put together as they come.

gRPC copies a message three times between Python and the socket's buffers, on either side. Of one of 16 MiB each copy
goes through main memory, and the receiver's begin when the sender's are done; of a piece they stay in the caches, and
both sides work at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moe_net.errors import WireError
from moe_net.proto.v1 import expert_pb2
from moe_net.wire.framing import LENGTH_DELIMITED, Parts, take_apart, varint
from moe_net.wire.matrices import ON_CPU
from moe_net.wire.validate import Limits, check_message_bytes

PIECE_BYTES = 2 * 2**20
"""Of data. A Forward without work, in ms, whole and in pieces of 1, 2 and 4 MiB: 16 MiB 30.5 / 23.9 / 24.8 / 24.8;
8 MiB 13.9 / 10.5 / 10.6 / 12.2; 4 MiB 6.4 / 5.4 / 5.9 / 7.7 (whole 8.1, in pieces of 2 MiB 8.8, on a busy machine)."""
MIN_PIECE_BYTES = 64 * 1024
"""Of all but the last: each costs a receiver 0.1 ms, so that small ones would be a cheap way to keep it busy."""
IN_PIECES_BYTES = 6 * 2**20
"""Messages up to this size are sent whole."""
DATA = 2


def cut(parts: Parts) -> Iterator[bytes]:
    """The pieces of the message that `parts` joined would be."""
    head = expert_pb2.Piece(total_bytes=sum(len(part) for part in parts)).SerializeToString()
    within: list[memoryview] = []
    n_bytes = 0
    for part in parts:
        view = memoryview(part)
        while view:
            taken = view[: PIECE_BYTES - n_bytes]
            view = view[len(taken) :]
            within.append(taken)
            n_bytes += len(taken)
            if n_bytes == PIECE_BYTES:
                yield _piece(head, within, n_bytes)
                head, within, n_bytes = b"", [], 0
    if within:
        yield _piece(head, within, n_bytes)


def _piece(head: bytes, within: list[memoryview], n_bytes: int) -> bytes:
    return b"".join((head, bytes((DATA << 3 | LENGTH_DELIMITED,)), varint(n_bytes), *within))


class PieceReader:
    """Puts a message together; WireError or LimitError as soon as a piece is wrong."""

    def __init__(
        self,
        limits: Limits,
        admit: Callable[[int], None] = lambda _: None,
        room: Callable[[int], memoryview] = ON_CPU.room,
    ) -> None:
        """`admit` is told how many bytes will come, before any memory is taken; it raises when they may not. `room`
        gives that memory."""
        self._limits = limits
        self._admit = admit
        self._room = room
        self._whole: memoryview | None = None
        self._n_bytes = 0

    def feed(self, raw: bytes) -> None:
        """The next piece."""
        piece, views = take_apart(expert_pb2.Piece, raw, self._limits, arrays=(), tensors=(DATA,))
        data = views[DATA]
        if self._whole is None:
            if not piece.total_bytes:
                raise WireError("total_bytes: missing in the first piece")
            check_message_bytes(piece.total_bytes, self._limits)
            self._admit(piece.total_bytes)
            self._whole = self._room(piece.total_bytes)
        elif piece.total_bytes:
            raise WireError("total_bytes: it was in the first piece")
        end = self._n_bytes + len(data)
        if end > len(self._whole):
            raise WireError(f"data: {end} bytes, total_bytes said {len(self._whole)}")
        if len(data) < MIN_PIECE_BYTES and (end < len(self._whole) or not data):
            raise WireError(f"data: {len(data)} bytes, only the last piece may have fewer than {MIN_PIECE_BYTES}")
        self._whole[self._n_bytes : end] = data
        self._n_bytes = end

    def finish(self) -> memoryview:
        """The message."""
        if self._whole is None:
            raise WireError("no piece came")
        if self._n_bytes < len(self._whole):
            raise WireError(f"data: {self._n_bytes} bytes, total_bytes said {len(self._whole)}")
        return self._whole
