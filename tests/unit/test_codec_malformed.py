"""wire/codec: whatever arrives is a valid message or a WireError, and costs no more memory than it has bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import re
import struct
import tracemalloc
from typing import Any

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from wire_calls import KINDS, LIMITS, MANY, SMALL, assert_same, block, decode, encode, make_messages, stock, varint

from moe_net.errors import LimitError, WireError
from moe_net.types import Encoding
from moe_net.wire.codec import MAX_CALLS
from moe_net.wire.messages import (
    BackwardAnswer,
    BackwardCall,
    CommitCall,
    ForwardAnswer,
    ForwardCall,
    RoutedRows,
)


def changed(message: Any, **changes: Any) -> bytes:
    """The message as protobuf writes it, with fields of it replaced; `x.rows` is written `x_rows`."""
    theirs = stock(encode(message), type(message))
    for name, value in changes.items():
        matrix, _, field = name.rpartition("_")
        if matrix in ("x", "y", "grad", "dx") and field in ("rows", "cols", "encoding"):
            setattr(getattr(theirs, matrix), field, value)
        elif isinstance(value, list):
            del getattr(theirs, name)[:]
            getattr(theirs, name).extend(value)
        else:
            setattr(theirs, name, value)
    return theirs.SerializeToString()


FORWARD, FORWARD_ANSWER, BACKWARD, BACKWARD_AGAIN, BACKWARD_ANSWER, COMMIT, COMMIT_ANSWER = make_messages(
    2, 4, Encoding.FP32, 11
)
INPUTS = dataclasses.replace(
    FORWARD,
    trainer="t",
    rows=RoutedRows(
        x_RD=torch.ones(2, 4),
        experts_per_row_R=torch.tensor([1, 2], dtype=torch.int32),
        expert_index_P=torch.tensor([3, 3, 5], dtype=torch.int32),
        gate_P=torch.ones(3),
    ),
)
NAN_PAYLOAD = struct.pack("<8f", *[1.0] * 7, math.nan)
INF_PAYLOAD = struct.pack("<8f", *[1.0] * 7, math.inf)

MISTAKES: dict[str, tuple[type[Any], bytes, type[WireError], str]] = {
    "payload short": (ForwardCall, changed(INPUTS, x_data=bytes(31)), WireError, "x_data: 31 bytes for 2 rows of 4"),
    "payload long": (ForwardCall, changed(INPUTS, x_data=bytes(33)), WireError, "x_data: 33 bytes"),
    "payload missing": (ForwardCall, changed(INPUTS, x_data=b""), WireError, "x_data: 0 bytes"),
    "payload of bf16": (ForwardCall, changed(INPUTS, x_encoding=2), WireError, "in bf16, which take 16"),
    "payload of int8": (ForwardCall, changed(INPUTS, x_encoding=4), WireError, "in int8, which take 16"),
    "no rows": (ForwardCall, changed(INPUTS, x_rows=0, x_data=b""), WireError, "x: 0 rows of 4 columns"),
    "no columns": (ForwardCall, changed(INPUTS, x_cols=0, x_data=b""), WireError, "x: 2 rows of 0 columns"),
    "many rows": (ForwardCall, changed(INPUTS, x_rows=65_537), LimitError, "x: 65537 rows, the limit is 65536"),
    "1 GiB": (ForwardCall, changed(INPUTS, x_rows=2**14, x_cols=2**14), LimitError, "take 1073741824 bytes"),
    "overflow": (ForwardCall, changed(INPUTS, x_rows=2**16, x_cols=2**32 - 1), LimitError, "the limit is"),
    "unknown encoding": (ForwardCall, changed(INPUTS, x_encoding=9), WireError, "x.encoding: unknown encoding 9"),
    "no encoding": (ForwardCall, changed(INPUTS, x_encoding=0), WireError, "x.encoding: unknown encoding 0"),
    "unknown reply": (ForwardCall, changed(INPUTS, reply_encoding=5), WireError, "reply_encoding: unknown encoding 5"),
    "call_id short": (ForwardCall, changed(INPUTS, call_id=bytes(15)), WireError, "call_id: 15 bytes, must be 16"),
    "call_id missing": (BackwardCall, changed(BACKWARD, call_id=b""), WireError, "call_id: 0 bytes"),
    "no trainer": (CommitCall, changed(COMMIT, trainer=""), WireError, "trainer: empty"),
    "long trainer": (ForwardCall, changed(INPUTS, trainer="x" * 129), LimitError, "trainer: a name of 129 bytes"),
    "not UTF-8": (ForwardCall, encode(INPUTS) + b"\x12\x02\xff\xfe", WireError, "trainer: .*UTF-8"),
    "commit not UTF-8": (CommitCall, b"\x0a\x02\xff\xfe", WireError, "trainer: .*UTF-8"),
    "many calls": (
        CommitCall, changed(COMMIT, call_id=[bytes(16)] * (MAX_CALLS + 1)), LimitError, "8193, the limit is 8192",
    ),
    "zero count": (ForwardCall, changed(INPUTS, experts_per_row=[0, 3]), WireError, "experts_per_row: 0 in row 0"),
    "count limit": (ForwardCall, changed(INPUTS, experts_per_row=[1, 65]), LimitError, "65 in row 1, the limit is 64"),
    "count sum": (ForwardCall, changed(INPUTS, experts_per_row=[2, 2]), WireError, "sums to 4, but .* has 3"),
    "count length": (ForwardCall, changed(INPUTS, experts_per_row=[3]), WireError, "1 counts for 2 rows"),
    "no counts": (ForwardCall, changed(INPUTS, experts_per_row=[]), WireError, "0 counts for 2 rows"),
    "gates": (ForwardCall, changed(INPUTS, gate=[1.0, 1.0]), WireError, "gate: 2 gates for 3 entries"),
    "no pairs": (ForwardCall, changed(INPUTS, gate=[], expert_index=[]), WireError, "expert_index has 0 entries"),
    "duplicate": (ForwardCall, changed(INPUTS, expert_index=[3, 5, 5]), WireError, "expert 5 twice in row 1"),
    "index": (ForwardCall, changed(INPUTS, expert_index=[3, 5, 2**32 - 1]), WireError, "4294967295 is no index"),
    "x nan": (ForwardCall, changed(INPUTS, x_data=NAN_PAYLOAD), WireError, "x: holds an infinity or NaN"),
    "x inf": (ForwardCall, changed(INPUTS, x_data=INF_PAYLOAD), WireError, "x: holds an infinity or NaN"),
    "gate nan": (ForwardCall, changed(INPUTS, gate=[1.0, math.nan, 1.0]), WireError, "gate: holds an infinity or NaN"),
    "grad inf": (BackwardCall, changed(BACKWARD, grad_data=INF_PAYLOAD), WireError, "grad: holds an infinity or NaN"),
    "grad missing": (BackwardCall, changed(BACKWARD, grad_data=b""), WireError, "grad_data: 0 bytes"),
    "grad x differ": (
        BackwardCall, changed(BACKWARD_AGAIN, x_rows=1), WireError, "x: 1 rows of 4 columns, but grad has 2 of 4",
    ),
    "again, nan": (BackwardCall, changed(BACKWARD_AGAIN, x_data=NAN_PAYLOAD), WireError, "^x: holds"),
    "only gates": (BackwardCall, changed(BACKWARD, gate=[1.0]), WireError, "x: 0 rows of 0 columns, but grad"),
    "y nan": (ForwardAnswer, changed(FORWARD_ANSWER, y_data=NAN_PAYLOAD), WireError, "y: holds an infinity or NaN"),
    "y rows": (ForwardAnswer, changed(FORWARD_ANSWER, y_rows=3), WireError, "y_data: 32 bytes for 3 rows"),
    "versions": (
        ForwardAnswer, changed(FORWARD_ANSWER, expert_index=[1, 2], version=[3]), WireError, "1 versions for 2 entries",
    ),
    "version twice": (
        ForwardAnswer, changed(FORWARD_ANSWER, expert_index=[2, 2], version=[3, 4]), WireError, "only 1 of them",
    ),
    "dx nan": (BackwardAnswer, changed(BACKWARD_ANSWER, dx_data=NAN_PAYLOAD), WireError, "dx: holds"),
    "gate_grad inf": (BackwardAnswer, changed(BACKWARD_ANSWER, gate_grad=[math.inf] * 2), WireError, "gate_grad: h"),
    "gate_grad few": (BackwardAnswer, changed(BACKWARD_ANSWER, gate_grad=[1.0]), WireError, "1 gradients for 2 rows"),
    "gate_grad many": (BackwardAnswer, changed(BACKWARD_ANSWER, gate_grad=[1.0] * 129), WireError, "129 gradients"),
    "array of 5 bytes": (ForwardCall, encode(INPUTS) + block(13, b"abcde"), WireError, "gate: 5 bytes are no array"),
    "cut off": (ForwardCall, encode(INPUTS)[:-1], WireError, "x_data: the message ends 1 bytes before it does"),
    "cut in a length": (ForwardCall, b"\x7a\x80", WireError, "x_data: its length: the message ends within it"),
    "cut in a tag": (ForwardCall, encode(INPUTS) + b"\x80", WireError, "tag at byte .*: the message ends within it"),
    "trailing zeros": (ForwardCall, encode(INPUTS) + b"\0\0", WireError, "tag at byte .*: field number 0"),
    "trailing text": (ForwardCall, encode(INPUTS) + b"garbage", WireError, ""),
    "wire type": (ForwardCall, encode(INPUTS) + b"\x7e", WireError, "x_data: there is no wire type 6"),
    "stray end": (ForwardCall, encode(INPUTS) + b"\x7c", WireError, "ForwardRequest"),
    "length claim": (ForwardCall, b"\x7a" + varint(2**30), LimitError, "x_data: claims 1073741824 bytes"),
    "length overflow": (ForwardCall, b"\x7a" + b"\xff" * 9 + b"\x01", WireError, "its length: a varint of more than"),
    "tag overflow": (ForwardCall, b"\xff" * 10 + b"\x01", WireError, "tag at byte 0: a varint of more than 32 bits"),
    "tag of 33 bits": (ForwardCall, b"\xfa\x80\x80\x80\x10\x00", WireError, "tag at byte 0: a varint of more than 32"),
    "step overflow": (CommitCall, b"\x0a\x01t\x10" + b"\xff" * 10 + b"\x01", WireError, "step"),
    "step cut off": (CommitCall, b"\x0a\x01t\x10\xff", WireError, "step: the message ends 1 bytes before it does"),
    "matrix cut off": (ForwardCall, encode(INPUTS) + block(7, b"\x08"), WireError, "^x: "),
    "empty": (ForwardCall, b"", WireError, "call_id: 0 bytes"),
    "empty answer": (BackwardAnswer, b"", WireError, "dx.encoding: unknown encoding 0"),
    "header": (CommitCall, block(99, bytes(300_000)) + encode(COMMIT), LimitError, "300.* bytes besides arrays"),
    "too long": (ForwardCall, bytes(LIMITS.max_message_bytes + 1), LimitError, "message of 33554433 bytes, the limit"),
    "many fields": (ForwardCall, b"\x08\x01" * 3_000_000, LimitError, "more than 4096 fields"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_malformed_message_is_refused_with_its_field_and_the_reason(mistake: str) -> None:
    kind, data, error, text = MISTAKES[mistake]
    tracemalloc.start()
    try:
        with pytest.raises(error) as caught:
            decode(data, kind)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(caught.value) is error
    assert re.search(text, str(caught.value)), str(caught.value)
    assert peak_bytes < 2**21, "a refusal must not cost what the message claims"


class LargestAllocation(TorchDispatchMode):
    """Remembers the largest result of any operation of torch."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.n_bytes = max(self.n_bytes, value.numel() * value.itemsize)
        return result


def mutated(data: bytes, draw: random.Random) -> bytes:
    """`data` after one to four accidents."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        position = draw.randrange(len(out) + 1)
        match draw.randrange(7):
            case 0 if out:
                out[position % len(out)] ^= 1 << draw.randrange(8)
            case 1 if out:
                out[position % len(out)] = draw.choice([0, 0x7F, 0x80, 0xFF, draw.randrange(256)])
            case 2:
                del out[position:]
            case 3:
                del out[position : position + draw.randint(1, 9)]
            case 4:
                out[position:position] = draw.randbytes(draw.randint(1, 9))
            case 5:
                start = draw.randrange(len(out) + 1)
                out[position:position] = out[start : start + draw.randint(1, 40)]
            case _:
                field = draw.choice([1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 99])
                tag = varint(field << 3 | draw.randrange(8))
                out[position:position] = tag + varint(draw.choice([0, 1, 4, 2**20, 2**31, 2**40, 2**64 - 1]))
    return bytes(out)


def check_fuzzed(data: bytes, kind: type[Any]) -> bool:
    """A WireError, or the message that protobuf reads; bounded memory; nothing else. Returns whether it was one."""
    with LargestAllocation() as largest:
        try:
            got = decode(data, kind, SMALL)
        except WireError:
            got = None
    assert largest.n_bytes <= SMALL.max_matrix_bytes
    if got is None:
        return False
    # Protobuf's own reading, written in its own way: we never take more than it does, nor anything else.
    assert_same(decode(stock(data, kind).SerializeToString(), kind, SMALL), got)
    return True


def mutations(n: int) -> list[tuple[bytes, type[Any]]]:
    draw = random.Random(20)
    originals = [message for encoding in Encoding for message in make_messages(3, 5, encoding, encoding)]
    encoded = [(encode(message), type(message)) for message in originals]
    picked = [draw.choice(encoded) for _ in range(n)]
    return [(mutated(data, draw), kind) for data, kind in picked]


def test_three_thousand_mutated_messages_are_wire_errors_or_what_protobuf_reads() -> None:
    valid = sum(check_fuzzed(data, kind) for data, kind in mutations(3000))
    assert 200 < valid < 2800, "mutations that all fail, or none of which does, test nothing"


def test_no_mutated_message_costs_more_memory_than_a_small_multiple_of_itself() -> None:
    # Each alone, and without torch's dispatch mode, whose first use imports 68 MB. Measured: 26 kB at most, which is
    # mostly a traceback. Memory of torch is not seen here, but in LargestAllocation.
    worst_bytes = 0
    cases = mutations(1500)
    tracemalloc.start()
    try:
        for data, kind in cases:
            before_bytes = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            with contextlib.suppress(WireError):
                decode(data, kind, SMALL)
            worst_bytes = max(worst_bytes, tracemalloc.get_traced_memory()[1] - before_bytes)
    finally:
        tracemalloc.stop()
    assert worst_bytes < SMALL.max_message_bytes


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=80), st.sampled_from(list(KINDS)))
def test_random_bytes_are_messages_or_wire_errors(data: bytes, kind: type[Any]) -> None:
    check_fuzzed(data, kind)


@MANY
@given(st.integers(0, 2**31))
def test_what_protobuf_refuses_we_refuse(seed: int) -> None:
    draw = random.Random(seed)
    for message in make_messages(2, 3, Encoding.FP32, seed):
        data = mutated(encode(message), draw)
        try:
            stock(data, type(message))
        except DecodeError:
            with pytest.raises(WireError):
                decode(data, type(message))
