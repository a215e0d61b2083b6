"""Protobuf's wire format around big arrays: everything but them is protobuf's own work.

Writing: protobuf writes the small fields; arrays and tensors are put behind it by hand, each as tag, length, memory,
all joined once, or cut into pieces (pieces.py). A `padding` field of 2 to 17 bytes makes tensors start at a multiple of
16 within the message, and so in memory: CPython puts the content of `bytes` at a multiple of 16, numpy that of arrays.
Reading: one walk over the top-level fields finds arrays and tensors as views of the message, protobuf reads the rest.
So it takes whatever a protobuf library writes, and any protobuf library reads it.
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from moe_net.errors import LimitError, WireError
from moe_net.wire.validate import Limits, check_message_bytes

MessageT = TypeVar("MessageT", bound=Message)
Parts = Sequence[bytes | memoryview]
"""What, joined, is a message: small fields written out, arrays and tensors as views of their memory as bytes."""

# The same number in each message of expert.proto. Its numbers are all below 16, so a tag is one byte.
PADDING = 10
ALIGNMENT = 16
MAX_VARINT_BYTES = 10

VARINT, FIXED64, LENGTH_DELIMITED, START_GROUP, END_GROUP, FIXED32 = range(6)
# Everything but arrays and tensors: experts and versions of an answer take at most 15 bytes per expert of a layer.
MAX_HEADER_BYTES = 256 * 1024
# A field takes 0.5 us to walk over. Our own messages have at most 15; unpacked arrays have one per value.
MAX_WALKED_FIELDS = 4096
# Protobuf turns a byte into at most 8 (packed varints of one byte into uint64).
STOCK_GROWTH = 8


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def lay_out(
    header: Message, arrays: Sequence[tuple[int, memoryview]], tensors: Sequence[tuple[int, memoryview]]
) -> Parts:
    """One message: the fields of `header`, then by field number the `arrays` (4-byte values, packed) and `tensors`."""
    parts: list[bytes | memoryview] = [header.SerializeToString()]
    position = len(parts[0])
    for number, view in arrays:
        tag = bytes((number << 3 | LENGTH_DELIMITED,)) + varint(view.nbytes)
        parts += (tag, view)
        position += len(tag) + view.nbytes
    for number, view in tensors:
        tag = bytes((number << 3 | LENGTH_DELIMITED,)) + varint(view.nbytes)
        if (position + len(tag)) % ALIGNMENT:
            n_zeros = -(position + 2 + len(tag)) % ALIGNMENT
            tag = bytes((PADDING << 3 | LENGTH_DELIMITED, n_zeros)) + bytes(n_zeros) + tag
        parts += (tag, view)
        position += len(tag) + view.nbytes
    return parts


class _BadVarint(Exception):
    pass


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """(value, position behind it) of a tag or a length: 5 bytes at most, below 2**32, as protobuf itself has it."""
    value = 0
    for shift in range(0, 35, 7):
        if position >= len(data):
            raise _BadVarint("the message ends within it")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 32:
                break
            return value, position
    raise _BadVarint("a varint of more than 32 bits")


def walk(data: memoryview, limits: Limits, kind: type[Message]) -> Iterator[tuple[int, int, int, int, int]]:
    """(field number, wire type, start of the tag, start of the value, end) of each top-level field.

    For values with a length, the value starts behind it. Groups, which end elsewhere, are not looked into: their tags
    come one by one, without a value.
    """
    end, size = 0, len(data)
    while end < size:
        start = end
        tag, value = data[start], start + 1
        if tag > 0x7F:  # not of our fields: their numbers are below 16
            try:
                tag, value = _read_varint(data, start)
            except _BadVarint as error:
                raise WireError(f"{kind.__name__}: tag at byte {start}: {error}") from error
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise WireError(f"{kind.__name__}: tag at byte {start}: field number 0")
        if wire_type == LENGTH_DELIMITED:
            try:
                length, value = _read_varint(data, value)
            except _BadVarint as error:
                raise WireError(f"{_name(kind, number)}: its length: {error}") from error
            if length > limits.max_message_bytes:
                raise LimitError(
                    f"{_name(kind, number)}: claims {length} bytes, the limit is {limits.max_message_bytes}"
                )
            end = value + length
        elif wire_type == VARINT:
            end = value
            while end < size and data[end] > 0x7F and end < value + MAX_VARINT_BYTES:  # protobuf looks at the value
                end += 1
            end += 1
        elif wire_type in (START_GROUP, END_GROUP):
            end = value
        elif wire_type in (FIXED32, FIXED64):
            end = value + (4 if wire_type == FIXED32 else 8)
        else:
            raise WireError(f"{_name(kind, number)}: there is no wire type {wire_type}")
        if end > size:
            raise WireError(f"{_name(kind, number)}: the message ends {end - size} bytes before it does")
        yield number, wire_type, start, value, end


def _name(kind: type[Message], number: int) -> str:
    field = kind.DESCRIPTOR.fields_by_number.get(number)
    return field.name if field is not None else f"unknown field {number}"


def parse(kind: type[MessageT], data: bytes, what: str) -> MessageT:
    """By protobuf; WireError with its reason, behind `what`."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        # Protobuf says the reason behind its message's name; ours is the better place.
        raise WireError(f"{what}: {str(error).rpartition(': ')[2]}") from error


def take_apart(
    kind: type[MessageT], data: bytes | memoryview, limits: Limits, *, arrays: Sequence[int], tensors: Sequence[int]
) -> tuple[MessageT, dict[int, memoryview]]:
    """(message, views): the message without its fields `arrays` (repeated fixed32 or float) and `tensors` (bytes), and
    the content of those, by field number, as views of `data` (empty for absent fields).

    A message of the stock path below has them too; nobody reads them there. WireError and LimitError as in codec.py.
    """
    view = memoryview(data)
    check_message_bytes(view.nbytes, limits)
    chunks: dict[int, list[memoryview]] = {number: [] for number in (*arrays, *tensors)}
    header: list[memoryview] = []
    run_start = run_end = header_bytes = 0
    for n_walked, (number, wire_type, start, value, end) in enumerate(walk(view, limits, kind)):
        if wire_type in (START_GROUP, END_GROUP) or n_walked == MAX_WALKED_FIELDS:
            return _take_apart_stock(kind, view, limits, arrays, tensors)
        if number in tensors and wire_type == LENGTH_DELIMITED:
            chunks[number] = [view[value:end]]  # the last one counts
        elif number in arrays and wire_type in (LENGTH_DELIMITED, FIXED32):
            if (end - value) % 4:
                raise WireError(f"{_name(kind, number)}: {end - value} bytes are no array of 4 bytes each")
            chunks[number].append(view[value:end])  # unpacked: each value is a chunk
        else:
            header_bytes += end - start
            if start != run_end:  # fields side by side are one piece
                header.append(view[run_start:run_end])
                run_start = start
            run_end = end
    header.append(view[run_start:run_end])
    if header_bytes > MAX_HEADER_BYTES:
        raise LimitError(
            f"{kind.__name__}: {header_bytes} bytes besides arrays and tensors, the limit is {MAX_HEADER_BYTES}"
        )
    try:
        message = parse(kind, b"".join(header), kind.__name__)
    except WireError:
        for number, wire_type, start, _, end in walk(view, limits, kind):  # which field was it?
            if number not in chunks or wire_type not in (LENGTH_DELIMITED, FIXED32):
                parse(kind, bytes(view[start:end]), _name(kind, number))
        raise
    views = {number: parts[0] if len(parts) == 1 else memoryview(b"".join(parts)) for number, parts in chunks.items()}
    return message, views


def _take_apart_stock(
    kind: type[MessageT], view: memoryview, limits: Limits, arrays: Sequence[int], tensors: Sequence[int]
) -> tuple[MessageT, dict[int, memoryview]]:
    """The same by protobuf alone, with its copies: for messages with groups or of very many fields."""
    # Without arrays and tensors all of it is header.
    largest = max(MAX_HEADER_BYTES, limits.max_message_bytes // STOCK_GROWTH if arrays or tensors else 0)
    if view.nbytes > largest:
        raise LimitError(
            f"{kind.__name__}: {view.nbytes} bytes with groups or more than {MAX_WALKED_FIELDS} fields, "
            f"the limit for such messages is {largest}"
        )
    message = parse(kind, bytes(view), kind.__name__)
    views: dict[int, memoryview] = {}
    for number in arrays:
        field = kind.DESCRIPTOR.fields_by_number[number]
        dtype = "<f4" if field.type == FieldDescriptor.TYPE_FLOAT else "<u4"
        views[number] = memoryview(np.array(getattr(message, field.name), dtype).tobytes())
    for number in tensors:
        views[number] = memoryview(getattr(message, _name(kind, number)))
    return message, views
