"""Calls and answers of every kind, their bytes, and their bytes as protobuf alone would write them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from google.protobuf.message import Message
from hypothesis import settings
from torch import Tensor

from moe_net.proto.v1 import expert_pb2
from moe_net.types import Encoding
from moe_net.wire import codec, compress, framing
from moe_net.wire.messages import (
    BackwardAnswer,
    BackwardCall,
    CommitAnswer,
    CommitCall,
    ForwardAnswer,
    ForwardCall,
    RoutedRows,
)
from moe_net.wire.validate import Limits

LIMITS = Limits()
SMALL = Limits(max_message_bytes=64 * 1024, max_matrix_bytes=64 * 1024, max_rows=64, max_experts_per_row=4)
MANY = settings(max_examples=150, deadline=None, derandomize=True, database=None)

# What is read and written: encoder, decoder, protobuf's class.
KINDS: dict[type[Any], tuple[Callable[..., bytes], Callable[..., Any], type[Message]]] = {
    ForwardCall: (codec.encode_forward_call, codec.decode_forward_call, expert_pb2.ForwardRequest),
    ForwardAnswer: (codec.encode_forward_answer, codec.decode_forward_answer, expert_pb2.ForwardReply),
    BackwardCall: (codec.encode_backward_call, codec.decode_backward_call, expert_pb2.BackwardRequest),
    BackwardAnswer: (codec.encode_backward_answer, codec.decode_backward_answer, expert_pb2.BackwardReply),
    CommitCall: (codec.encode_commit_call, codec.decode_commit_call, expert_pb2.CommitRequest),
    CommitAnswer: (codec.encode_commit_answer, codec.decode_commit_answer, expert_pb2.CommitReply),
}


def encode(message: Any) -> bytes:
    return KINDS[type(message)][0](message)


def decode(data: bytes, kind: type[Any], limits: Limits = LIMITS) -> Any:
    return KINDS[kind][1](data, limits)


def stock(data: bytes, kind: type[Any]) -> Any:
    return KINDS[kind][2].FromString(data)


def make_rows(n_rows: int, cols: int, seed: int, *, most: int = 3) -> RoutedRows:
    generator = torch.Generator().manual_seed(seed)
    count_R = torch.randint(1, most + 1, (n_rows,), generator=generator, dtype=torch.int32)
    picked = [torch.randperm(9, generator=generator)[:count] for count in count_R.tolist()]
    index_P = torch.cat(picked).to(torch.int32)
    return RoutedRows(
        x_RD=torch.randn(n_rows, cols, generator=generator),
        experts_per_row_R=count_R,
        expert_index_P=index_P,
        gate_P=torch.rand(index_P.numel(), generator=generator),
    )


def make_messages(n_rows: int, cols: int, encoding: Encoding, seed: int) -> list[Any]:
    """One of each kind, and a BackwardCall that sends the inputs again."""
    rows = make_rows(n_rows, cols, seed)
    draw = random.Random(seed)
    names: dict[str, Any] = {
        "call_id": draw.randbytes(16),
        "trainer": draw.choice(["t", "trainer-0", "Zoë", "x" * 128]),
        "step": draw.choice([0, 1, 2**63]),
        "layer": draw.choice([0, 7, 2**32 - 1]),
        "encoding": encoding,
        "reply_encoding": draw.choice(list(Encoding)),
    }
    versions = {index: draw.choice([0, 5, 2**40]) for index in range(draw.randint(0, 9))}
    told: dict[str, Any] = {
        "versions": versions,
        "queue_us": draw.randrange(2**32),
        "compute_us": 17,
        "encoding": encoding,
    }
    grad_RD = torch.randn(n_rows, cols, generator=torch.Generator().manual_seed(seed + 1))
    return [
        ForwardCall(**names, rows=rows, train=draw.random() < 0.5),
        ForwardAnswer(y_RD=grad_RD, failed_experts=tuple(range(20, 20 + draw.randint(0, 3))), **told),
        BackwardCall(**names, grad_RD=grad_RD),
        BackwardCall(**names, grad_RD=grad_RD, rows=rows),
        BackwardAnswer(dx_RD=grad_RD, gate_grad_P=rows.gate_P - 0.5, **told),
        CommitCall(
            trainer=names["trainer"],
            step=names["step"],
            tokens=2048,
            calls=tuple(draw.randbytes(16) for _ in range(draw.randint(0, 3))),
        ),
        CommitAnswer(
            repeated=True,
            stepped=draw.random() < 0.5,
            committed_tokens=2**40,
            missing=tuple(draw.randbytes(16) for _ in range(draw.randint(0, 2))),
            not_finite=(draw.randbytes(16),),
        ),
    ]


def assert_same(got: Any, sent: Any, *, encoding: Encoding = Encoding.FP32) -> None:
    """Equal field by field; matrices as `encoding` has them."""
    assert type(got) is type(sent)
    for field in dataclasses.fields(sent):
        there, here = getattr(got, field.name), getattr(sent, field.name)
        if isinstance(here, RoutedRows):
            assert_same(there, here, encoding=encoding)
        elif isinstance(here, Tensor):
            if here.ndim == 2:
                data = memoryview(bytes(compress.encode(here, encoding)))
                here = compress.decode(data, here.shape[0], here.shape[1], encoding)
            assert there.dtype is here.dtype, field.name
            assert torch.equal(there, here), field.name
        else:
            assert there == here, field.name


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def block(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def top_level(data: bytes, kind: type[Any]) -> list[tuple[int, bytes]]:
    """(number, tag and value) of each field."""
    view = memoryview(data)
    fields = framing.walk(view, LIMITS, KINDS[kind][2])
    return [(number, bytes(view[start:end])) for number, _, start, _, end in fields]
