"""wire/codec: every message comes back as it was sent, and any protobuf library reads and writes the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wire_calls import MANY, assert_same, block, decode, encode, make_messages, stock, top_level, varint

from moe_net.errors import WireError
from moe_net.types import Encoding
from moe_net.wire import codec, compress, framing
from moe_net.wire.messages import (
    ForwardAnswer,
    ForwardCall,
)


@MANY
@given(st.integers(1, 9), st.sampled_from([1, 3, 64, 70]), st.sampled_from(Encoding), st.integers(0, 2**31))
def test_every_message_comes_back_as_it_was_sent(n_rows: int, cols: int, encoding: Encoding, seed: int) -> None:
    for message in make_messages(n_rows, cols, encoding, seed):
        assert_same(decode(encode(message), type(message)), message, encoding=encoding)


@MANY
@given(st.integers(1, 9), st.sampled_from([1, 5, 64]), st.sampled_from(Encoding), st.integers(0, 2**31))
def test_protobuf_reads_what_we_write_and_we_read_what_it_writes(
    n_rows: int, cols: int, encoding: Encoding, seed: int
) -> None:
    for message in make_messages(n_rows, cols, encoding, seed):
        ours = encode(message)
        theirs = stock(ours, type(message))
        if "padding" in theirs.DESCRIPTOR.fields_by_name:
            theirs.ClearField("padding")
        assert_same(decode(theirs.SerializeToString(), type(message)), message, encoding=encoding)
        if isinstance(message, ForwardCall):
            rows = message.rows
            assert theirs.call_id == message.call_id
            assert (theirs.trainer, theirs.step, theirs.layer) == (message.trainer, message.step, message.layer)
            assert (theirs.train, theirs.reply_encoding) == (message.train, message.reply_encoding)
            assert (theirs.x.rows, theirs.x.cols, theirs.x.encoding) == (n_rows, cols, encoding)
            assert list(theirs.experts_per_row) == rows.experts_per_row_R.tolist()
            assert list(theirs.expert_index) == rows.expert_index_P.tolist()
            assert list(theirs.gate) == rows.gate_P.tolist()
            assert theirs.x_data == bytes(compress.encode(rows.x_RD, encoding))


def test_tensors_start_at_a_multiple_of_16_and_are_not_copied() -> None:
    for seed in range(40):
        for message in make_messages(1 + seed % 5, 3, Encoding.FP32, seed)[:5]:
            data = encode(message)
            for number, field in top_level(data, type(message)):
                if number in (codec.BACKWARD_X_DATA, codec.LAST_DATA):
                    payload = field[2:] if field[1] < 0x80 else field[3:]
                    assert data.index(payload) % framing.ALIGNMENT == 0
                assert number != framing.PADDING or len(field) <= 17
    call = make_messages(4, 16, Encoding.FP32, 0)[0]
    data = encode(call)
    start = data.index(compress.encode(call.rows.x_RD, Encoding.FP32))
    address = compress.tensor_view(memoryview(data), torch.uint8).data_ptr()
    assert decode(data, ForwardCall).rows.x_RD.data_ptr() == address + start


def test_a_payload_that_does_not_lie_well_is_read_all_the_same() -> None:
    call = make_messages(4, 16, Encoding.FP32, 3)[0]
    theirs = stock(encode(call), ForwardCall)
    theirs.ClearField("padding")
    for length in range(1, 9):
        theirs.trainer = "t" * length
        got = decode(theirs.SerializeToString(), ForwardCall)
        assert got.rows.x_RD.data_ptr() % 4 == 0
        assert torch.equal(got.rows.x_RD, call.rows.x_RD)


@MANY
@given(st.integers(0, 2**31))
def test_fields_in_any_order_with_unknown_ones_between_are_the_same_message(seed: int) -> None:
    shuffle = random.Random(seed)
    unknown = [b"\xf8\x07\x2a", block(127, b"what is this"), b"\xfd\x07abcd", b"\xf9\x07abcdefgh"]  # number 127
    for message in make_messages(3, 5, Encoding.FP32, seed):
        # What is repeated stays in its order.
        of_number: dict[int, list[bytes]] = {127: unknown}
        for number, field in top_level(encode(message), type(message)):
            of_number.setdefault(number, []).append(field)
        numbers = [number for number, fields in of_number.items() for _ in fields]
        shuffle.shuffle(numbers)
        fields = {number: iter(fields) for number, fields in of_number.items()}
        shuffled = b"".join(next(fields[number]) for number in numbers)
        assert_same(decode(shuffled, type(message)), message)


def split_arrays(data: bytes, kind: type[Any], cut: Callable[[int, bytes], Sequence[bytes]]) -> bytes:
    """`data` with each packed array replaced by the fields that `cut(number, content)` gives."""
    out: list[bytes] = []
    for number, field in top_level(data, kind):
        is_array = number in (11, 12, 13)
        out += cut(number, field[-stock_length(field) :]) if is_array else [field]
    return b"".join(out)


def stock_length(field: bytes) -> int:
    """Length of the content of a field with a length and a tag of one byte."""
    position, length = 1, 0
    while True:
        length |= (field[position] & 0x7F) << (7 * (position - 1))
        if field[position] < 0x80:
            return length
        position += 1


def in_chunks(number: int, content: bytes) -> list[bytes]:
    cut = len(content) // 8 * 4
    return [block(number, content[:cut]), block(number, b""), block(number, content[cut:])]


def unpacked(number: int, content: bytes) -> list[bytes]:
    return [varint(number << 3 | 5) + content[start : start + 4] for start in range(0, len(content), 4)]


@pytest.mark.parametrize("cut", [in_chunks, unpacked])
@pytest.mark.parametrize("n_rows", [1, 6, 2000])
def test_arrays_in_chunks_or_unpacked_are_the_same_message(cut: Callable[..., Any], n_rows: int) -> None:
    for message in make_messages(n_rows, 2, Encoding.FP32, 5):
        data = split_arrays(encode(message), type(message), cut)
        assert_same(decode(data, type(message)), message)
        assert_same(decode(stock(data, type(message)).SerializeToString(), type(message)), message)


def test_groups_are_unknown_fields_too() -> None:
    group = varint(100 << 3 | 3) + block(1, b"abc") + varint(15 << 3 | 2) + b"\x01z" + varint(100 << 3 | 4)
    for message in make_messages(3, 5, Encoding.FP32, 5):
        for data in (group + encode(message), encode(message) + group):
            assert_same(decode(data, type(message)), message)
        with pytest.raises(WireError):
            decode(encode(message) + group[:-2], type(message))


def test_the_last_of_several_tensors_counts_and_sizes_are_merged() -> None:
    call = make_messages(3, 5, Encoding.FP32, 9)[0]
    data = block(15, b"not this one") + block(7, b"\x08\x63") + encode(call)
    assert_same(decode(data, ForwardCall), call)


TENSORS = [(message, codec.LAST_DATA) for message in make_messages(3, 4, Encoding.FP32, 5)[:5]]
TENSORS.append((TENSORS[3][0], codec.BACKWARD_X_DATA))


@pytest.mark.parametrize(("message", "number"), TENSORS)
@pytest.mark.parametrize("junk", ["the tensor before", "an unknown field", "padding"])
def test_a_small_tensor_does_not_keep_a_large_message_alive(message: Any, number: int, junk: str) -> None:
    """44 bytes that are kept and counted must not hold megabytes that are not."""
    field = block({"the tensor before": number, "an unknown field": 127, "padding": framing.PADDING}[junk], bytes(9000))
    whole = bytearray(field + encode(message))
    assert_same(got := decode(memoryview(whole), type(message)), message)
    whole.clear()  # BufferError while anything looks at it
    assert_same(got, message)


def test_what_is_half_of_its_message_or_more_is_not_copied() -> None:
    message = make_messages(64, 4, Encoding.FP32, 5)[1]
    whole = bytearray(encode(message))
    got = decode(memoryview(whole), type(message))
    with pytest.raises(BufferError):
        whole.clear()
    assert_same(got, message)


def test_a_memoryview_is_as_good_as_bytes() -> None:
    for message in make_messages(2, 3, Encoding.BF16, 1):
        data = memoryview(b"xx" + encode(message) + b"yy")[2:-2]
        assert_same(decode(data, type(message)), message, encoding=Encoding.BF16)  # type: ignore[arg-type]


def test_versions_are_sorted_and_long_times_are_cut_not_refused() -> None:
    answer = ForwardAnswer(y_RD=torch.ones(1, 1), versions={5: 1, 2: 9}, queue_us=2**40, compute_us=2**33)
    got = decode(encode(answer), ForwardAnswer)
    assert list(got.versions.items()) == [(2, 9), (5, 1)]
    assert (got.queue_us, got.compute_us) == (2**32 - 1, 2**32 - 1)
