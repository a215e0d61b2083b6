"""Messages as pieces: whole again whatever they are cut into, and refused as soon as a piece does not fit."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import pytest
import torch
from wire_calls import make_messages

from moe_net.errors import LimitError, WireError
from moe_net.proto.v1 import expert_pb2
from moe_net.types import Encoding
from moe_net.wire import codec
from moe_net.wire.messages import ForwardAnswer
from moe_net.wire.pieces import MIN_PIECE_BYTES, PIECE_BYTES, PieceReader, cut
from moe_net.wire.validate import Limits

LIMITS = Limits()
FULL = bytes(MIN_PIECE_BYTES)


def together(pieces: Sequence[bytes], limits: Limits = LIMITS) -> memoryview:
    reader = PieceReader(limits)
    for piece in pieces:
        reader.feed(piece)
    return reader.finish()


def piece(data: bytes, total_bytes: int = 0) -> bytes:
    return expert_pb2.Piece(total_bytes=total_bytes, data=data).SerializeToString()


@pytest.mark.parametrize("n_bytes", [1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES, 7_000_001])
def test_a_message_is_whole_again_and_its_pieces_are_protobufs(n_bytes: int) -> None:
    message = torch.randint(256, (n_bytes,), dtype=torch.uint8).numpy().tobytes()
    middle = n_bytes // 3
    pieces = list(cut([message[:middle], memoryview(message)[middle:], b""]))
    assert together(pieces) == message
    read = [expert_pb2.Piece.FromString(raw) for raw in pieces]
    assert b"".join(one.data for one in read) == message
    assert [one.total_bytes for one in read] == [n_bytes] + [0] * (len(read) - 1)
    assert {len(one.data) for one in read[:-1]} <= {PIECE_BYTES}


@pytest.mark.parametrize("message", make_messages(5, 7, Encoding.BF16, 3)[:5])
def test_the_parts_of_a_message_joined_are_its_bytes(message: object) -> None:
    kind = type(message).__name__.replace("Forward", "forward_").replace("Backward", "backward_").lower()
    if hasattr(codec, f"{kind}_parts"):
        parts = getattr(codec, f"{kind}_parts")(message)
        assert together(list(cut(parts))) == getattr(codec, f"encode_{kind}")(message)


def test_tensors_of_a_message_in_pieces_are_aligned_and_keep_it_alive() -> None:
    answer = ForwardAnswer(y_RD=torch.randn(4099, 512), versions={3: 1})
    got = codec.decode_forward_answer(together(list(cut(codec.forward_answer_parts(answer)))), LIMITS)
    assert got.y_RD.data_ptr() % 16 == 0
    assert torch.equal(got.y_RD, answer.y_RD)


BAD: dict[str, tuple[list[bytes], str]] = {
    "nothing": ([], "no piece came"),
    "no total": ([piece(FULL)], "total_bytes: missing in the first piece"),
    "an empty first piece": ([piece(b"", 5)], "data: 0 bytes, only the last piece may"),
    "an empty last piece": ([piece(b"abcde", 5), piece(b"")], "data: 0 bytes, only the last piece may"),
    "a total again": ([piece(FULL, 2 * len(FULL)), piece(FULL, 2 * len(FULL))], "total_bytes: it was in the first"),
    "too much at once": ([piece(b"abcdef", 5)], "data: 6 bytes, total_bytes said 5"),
    "too much in the end": ([piece(FULL, len(FULL)), piece(b"x")], f"data: {len(FULL) + 1} bytes, total_bytes said"),
    "an early end": ([piece(FULL, 2 * len(FULL))], f"data: {len(FULL)} bytes, total_bytes said {2 * len(FULL)}"),
    "a small piece": ([piece(FULL[1:], 2 * len(FULL))], f"only the last piece may have fewer than {len(FULL)}"),
    "no protobuf": ([b"\xff\xff"], "Piece: tag at byte 0"),
    "data of another type": ([piece(b"", 5) + b"\x10\x01"], "data: 0 bytes"),
}


@pytest.mark.parametrize("what", BAD)
def test_pieces_that_do_not_fit_are_refused_with_the_reason(what: str) -> None:
    pieces, reason = BAD[what]
    with pytest.raises(WireError, match=reason):
        together(pieces)


def test_a_total_over_the_limit_is_refused_before_memory_is_spent() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(LimitError, match="message of 33554433 bytes, the limit is 33554432"):
            together([piece(FULL, LIMITS.max_message_bytes + 1)])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_who_admits_hears_of_the_total_first() -> None:
    heard: list[int] = []

    def admit(n_bytes: int) -> None:
        heard.append(n_bytes)
        raise LimitError("not now")

    reader = PieceReader(LIMITS, admit)
    with pytest.raises(LimitError, match="not now"):
        reader.feed(piece(FULL, 10 * len(FULL)))
    assert heard == [10 * len(FULL)]
