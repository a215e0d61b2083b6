"""The calls of messages.py as bytes and back: plain protobuf, without protobuf's copies (see framing.py).

R rows, D model width, P (row, expert) pairs.

Tensors of decoded fp32 matrices look at the message's bytes and keep them alive: EVERYBODY TREATS THEM AS READ-ONLY.
They are at least half of what they keep alive, so that whoever counts a tensor's bytes counts no less than half of the
memory it holds; smaller ones are copied out.
Every decoder raises WireError or LimitError, and nothing else, on whatever bytes it is given; sizes are checked before
anything of that size is allocated. All values of a decoded message are finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import cast

import numpy as np
import torch
from torch import Tensor

from moe_net.errors import LimitError, WireError
from moe_net.proto.v1 import expert_pb2, tensor_pb2
from moe_net.types import Encoding, ExpertId
from moe_net.wire import compress
from moe_net.wire.framing import Parts, lay_out, take_apart
from moe_net.wire.matrices import ON_CPU, Matrices
from moe_net.wire.messages import (
    BackwardAnswer,
    BackwardCall,
    CommitAnswer,
    CommitCall,
    ForwardAnswer,
    ForwardCall,
    RoutedRows,
)
from moe_net.wire.share import BATCH_BYTES, MAX_COMMITS, MAX_SHARED_EXPERTS, ShareCall
from moe_net.wire.validate import (
    Limits,
    check_call_id,
    check_encoding,
    check_finite,
    check_matrix,
    check_routing,
    check_trainer,
)

# Field numbers of expert.proto.
EXPERTS_PER_ROW, EXPERT_INDEX, GATE, GATE_GRAD = 11, 12, 13, 13
BACKWARD_X_DATA = 14
LAST_DATA = 15
FETCHED = 1

MAX_CALLS = 8192
"""That a commit names: 32 layers, 8 micro-batches and 32 calls each."""


def _number(encoding: Encoding) -> tensor_pb2.Encoding.ValueType:
    return cast("tensor_pb2.Encoding.ValueType", int(encoding))


def _matrix(x_RD: Tensor, encoding: Encoding) -> tensor_pb2.Matrix:
    rows, cols = x_RD.shape
    return tensor_pb2.Matrix(rows=rows, cols=cols, encoding=_number(encoding))


def _packed(values: Tensor, dtype: str) -> memoryview:
    return compress.array_memory(np.ascontiguousarray(values.detach().numpy(), dtype))


def _routing(rows: RoutedRows) -> list[tuple[int, memoryview]]:
    return [
        (EXPERTS_PER_ROW, _packed(rows.experts_per_row_R, "<i4")),
        (EXPERT_INDEX, _packed(rows.expert_index_P, "<i4")),
        (GATE, _packed(rows.gate_P, "<f4")),
    ]


def _timing(queue_us: int, compute_us: int) -> expert_pb2.Timing:
    return expert_pb2.Timing(queue_us=min(queue_us, 0xFFFFFFFF), compute_us=min(compute_us, 0xFFFFFFFF))


def encode_forward_call(call: ForwardCall) -> bytes:
    """The message in one piece."""
    return b"".join(forward_call_parts(call))


def forward_call_parts(call: ForwardCall) -> Parts:
    """A ForwardRequest; `rows.x_RD` in `call.encoding`."""
    header = expert_pb2.ForwardRequest(
        call_id=call.call_id,
        trainer=call.trainer,
        step=call.step,
        layer=call.layer,
        train=call.train,
        reply_encoding=_number(call.reply_encoding),
        x=_matrix(call.rows.x_RD, call.encoding),
    )
    return lay_out(header, _routing(call.rows), [(LAST_DATA, compress.encode(call.rows.x_RD, call.encoding))])


def encode_forward_answer(answer: ForwardAnswer, matrices: Matrices = ON_CPU) -> bytes:
    """The message in one piece."""
    return b"".join(forward_answer_parts(answer, matrices))


def forward_answer_parts(answer: ForwardAnswer, matrices: Matrices = ON_CPU) -> Parts:
    """A ForwardReply; `y_RD` in `answer.encoding`."""
    ran = sorted(answer.versions)
    header = expert_pb2.ForwardReply(
        y=_matrix(answer.y_RD, answer.encoding),
        failed_expert=answer.failed_experts,
        expert_index=ran,
        version=[answer.versions[index] for index in ran],
        timing=_timing(answer.queue_us, answer.compute_us),
    )
    return lay_out(header, (), [(LAST_DATA, matrices.write(answer.y_RD, answer.encoding))])


def encode_backward_call(call: BackwardCall) -> bytes:
    """The message in one piece."""
    return b"".join(backward_call_parts(call))


def backward_call_parts(call: BackwardCall) -> Parts:
    """A BackwardRequest; `grad_RD` and, where `rows` are sent again, `rows.x_RD` in `call.encoding`."""
    header = expert_pb2.BackwardRequest(
        call_id=call.call_id,
        trainer=call.trainer,
        step=call.step,
        layer=call.layer,
        reply_encoding=_number(call.reply_encoding),
        grad=_matrix(call.grad_RD, call.encoding),
    )
    tensors = [(LAST_DATA, compress.encode(call.grad_RD, call.encoding))]
    if call.rows is None:
        return lay_out(header, (), tensors)
    header.x.CopyFrom(_matrix(call.rows.x_RD, call.encoding))
    tensors.insert(0, (BACKWARD_X_DATA, compress.encode(call.rows.x_RD, call.encoding)))
    return lay_out(header, _routing(call.rows), tensors)


def encode_backward_answer(answer: BackwardAnswer, matrices: Matrices = ON_CPU) -> bytes:
    """The message in one piece."""
    return b"".join(backward_answer_parts(answer, matrices))


def backward_answer_parts(answer: BackwardAnswer, matrices: Matrices = ON_CPU) -> Parts:
    """A BackwardReply; `dx_RD` in `answer.encoding`, `gate_grad_P` always fp32."""
    ran = sorted(answer.versions)
    header = expert_pb2.BackwardReply(
        dx=_matrix(answer.dx_RD, answer.encoding),
        expert_index=ran,
        version=[answer.versions[index] for index in ran],
        timing=_timing(answer.queue_us, answer.compute_us),
    )
    arrays = [(GATE_GRAD, _packed(answer.gate_grad_P, "<f4"))]
    return lay_out(header, arrays, [(LAST_DATA, matrices.write(answer.dx_RD, answer.encoding))])


def encode_commit_call(call: CommitCall) -> bytes:
    """A CommitRequest."""
    return expert_pb2.CommitRequest(
        trainer=call.trainer, step=call.step, tokens=call.tokens, call_id=call.calls
    ).SerializeToString()


def encode_commit_answer(answer: CommitAnswer) -> bytes:
    """A CommitReply."""
    return expert_pb2.CommitReply(
        repeated_call=answer.repeated, stepped=answer.stepped, committed_tokens=answer.committed_tokens,
        missing_call_id=answer.missing, not_finite_call_id=answer.not_finite,
    ).SerializeToString()  # fmt: skip


def _check_matrix(matrix: tensor_pb2.Matrix, data: memoryview, name: str, limits: Limits) -> Encoding:
    encoding = check_encoding(matrix.encoding, f"{name}.encoding")
    check_matrix(name, matrix.rows, matrix.cols, encoding, data.nbytes, limits)
    return encoding


def _read_matrix(
    matrix: tensor_pb2.Matrix, data: memoryview, name: str, encoding: Encoding, matrices: Matrices = ON_CPU
) -> Tensor:
    return matrices.read(data, matrix.rows, matrix.cols, encoding, name)


def _read_floats(data: memoryview, name: str) -> Tensor:
    """A copy: it is small, and must not keep the whole message alive."""
    values = torch.from_numpy(np.frombuffer(data, "<f4").copy())
    check_finite(values, name)
    return values


def _read_rows(
    views: dict[int, memoryview], x: tensor_pb2.Matrix, x_number: int, limits: Limits, matrices: Matrices
) -> tuple[RoutedRows, Encoding]:
    x_encoding = _check_matrix(x, views[x_number], "x", limits)
    count_R, index_P = np.frombuffer(views[EXPERTS_PER_ROW], "<i4"), np.frombuffer(views[EXPERT_INDEX], "<i4")
    check_routing(x.rows, count_R, index_P, views[GATE].nbytes // 4, limits)
    rows = RoutedRows(
        x_RD=_read_matrix(x, views[x_number], "x", x_encoding, matrices),
        experts_per_row_R=torch.from_numpy(count_R.copy()),
        expert_index_P=torch.from_numpy(index_P.copy()),
        gate_P=_read_floats(views[GATE], "gate"),
    )
    return rows, x_encoding


def _versions(indices: Sequence[int], versions: Sequence[int]) -> dict[int, int]:
    if len(indices) != len(versions):
        raise WireError(f"version: {len(versions)} versions for {len(indices)} entries of expert_index")
    by_index = dict(zip(indices, versions, strict=True))
    if len(by_index) != len(indices):
        raise WireError(f"expert_index: {len(indices)} entries, only {len(by_index)} of them different")
    return by_index


def decode_forward_call(data: bytes | memoryview, limits: Limits, matrices: Matrices = ON_CPU) -> ForwardCall:
    """A ForwardRequest; checked except for what only the model knows (`validate.check_rows`)."""
    message, views = take_apart(
        expert_pb2.ForwardRequest, data, limits, arrays=(EXPERTS_PER_ROW, EXPERT_INDEX, GATE), tensors=(LAST_DATA,)
    )
    check_call_id(message.call_id)
    check_trainer(message.trainer)
    reply_encoding = check_encoding(message.reply_encoding, "reply_encoding")
    rows, encoding = _read_rows(views, message.x, LAST_DATA, limits, matrices)
    return ForwardCall(
        call_id=message.call_id,
        trainer=message.trainer,
        step=message.step,
        layer=message.layer,
        rows=rows,
        train=message.train,
        encoding=encoding,
        reply_encoding=reply_encoding,
    )


def decode_forward_answer(data: bytes | memoryview, limits: Limits) -> ForwardAnswer:
    """A ForwardReply; whether it has the shape of the call is for the caller to check."""
    message, views = take_apart(expert_pb2.ForwardReply, data, limits, arrays=(), tensors=(LAST_DATA,))
    versions = _versions(message.expert_index, message.version)
    encoding = _check_matrix(message.y, views[LAST_DATA], "y", limits)
    return ForwardAnswer(
        y_RD=_read_matrix(message.y, views[LAST_DATA], "y", encoding),
        failed_experts=tuple(message.failed_expert),
        versions=versions,
        queue_us=message.timing.queue_us,
        compute_us=message.timing.compute_us,
        encoding=encoding,
    )


def decode_backward_call(data: bytes | memoryview, limits: Limits, matrices: Matrices = ON_CPU) -> BackwardCall:
    """A BackwardRequest; `rows` is None when the message has nothing of them."""
    message, views = take_apart(
        expert_pb2.BackwardRequest,
        data,
        limits,
        arrays=(EXPERTS_PER_ROW, EXPERT_INDEX, GATE),
        tensors=(BACKWARD_X_DATA, LAST_DATA),
    )
    check_call_id(message.call_id)
    check_trainer(message.trainer)
    reply_encoding = check_encoding(message.reply_encoding, "reply_encoding")
    grad, x = message.grad, message.x
    encoding = _check_matrix(grad, views[LAST_DATA], "grad", limits)
    of_rows = (EXPERTS_PER_ROW, EXPERT_INDEX, GATE, BACKWARD_X_DATA)
    rows = None
    if message.HasField("x") or any(views[number].nbytes for number in of_rows):
        if (x.rows, x.cols) != (grad.rows, grad.cols):
            raise WireError(f"x: {x.rows} rows of {x.cols} columns, but grad has {grad.rows} of {grad.cols}")
        rows, _ = _read_rows(views, x, BACKWARD_X_DATA, limits, matrices)
    return BackwardCall(
        call_id=message.call_id,
        trainer=message.trainer,
        step=message.step,
        layer=message.layer,
        grad_RD=_read_matrix(grad, views[LAST_DATA], "grad", encoding, matrices),
        rows=rows,
        encoding=encoding,
        reply_encoding=reply_encoding,
    )


def decode_backward_answer(data: bytes | memoryview, limits: Limits) -> BackwardAnswer:
    """A BackwardReply; whether it has the shape of the call is for the caller to check."""
    message, views = take_apart(expert_pb2.BackwardReply, data, limits, arrays=(GATE_GRAD,), tensors=(LAST_DATA,))
    dx = message.dx
    versions = _versions(message.expert_index, message.version)
    encoding = _check_matrix(dx, views[LAST_DATA], "dx", limits)
    pairs = views[GATE_GRAD].nbytes // 4
    if not dx.rows <= pairs <= dx.rows * limits.max_experts_per_row:
        raise WireError(f"gate_grad: {pairs} gradients for {dx.rows} rows of 1..{limits.max_experts_per_row} experts")
    return BackwardAnswer(
        dx_RD=_read_matrix(dx, views[LAST_DATA], "dx", encoding),
        gate_grad_P=_read_floats(views[GATE_GRAD], "gate_grad"),
        versions=versions,
        queue_us=message.timing.queue_us,
        compute_us=message.timing.compute_us,
        encoding=encoding,
    )


def decode_commit_call(data: bytes | memoryview, limits: Limits | None = None) -> CommitCall:
    """A CommitRequest."""
    message, _ = take_apart(expert_pb2.CommitRequest, data, limits or Limits(), arrays=(), tensors=())
    check_trainer(message.trainer)
    return CommitCall(
        trainer=message.trainer, step=message.step, tokens=message.tokens,
        calls=_call_ids("call_id", message.call_id),
    )  # fmt: skip


def _call_ids(name: str, call_ids: Sequence[bytes]) -> tuple[bytes, ...]:
    if len(call_ids) > MAX_CALLS:
        raise LimitError(f"{name}: {len(call_ids)}, the limit is {MAX_CALLS}")
    for call_id in call_ids:
        check_call_id(call_id)
    return tuple(call_ids)


def encode_share_call(call: ShareCall) -> bytes:
    """A ShareRequest."""
    message = expert_pb2.ShareRequest(batch=call.batch, commit=call.commits)
    for layer, experts in groupby(sorted(call.experts), key=lambda expert: expert.layer):
        message.experts.add(layer=layer, expert_index=[expert.index for expert in experts])
    return message.SerializeToString()


def decode_share_call(data: bytes | memoryview, limits: Limits | None = None) -> ShareCall:
    """A ShareRequest, each expert once and ascending; at most 256 KiB are looked at."""
    message, _ = take_apart(expert_pb2.ShareRequest, data, limits or Limits(), arrays=(), tensors=())
    if len(message.batch) != BATCH_BYTES:
        raise WireError(f"batch: {len(message.batch)} bytes, must be {BATCH_BYTES}")
    if len(message.commit) > MAX_COMMITS:
        raise WireError(f"commit: {len(message.commit)}, at most {MAX_COMMITS} are named")
    n_experts = sum(len(part.expert_index) for part in message.experts)
    if n_experts > MAX_SHARED_EXPERTS:
        raise LimitError(f"experts: {n_experts}, the limit is {MAX_SHARED_EXPERTS}")
    experts = {ExpertId(part.layer, index) for part in message.experts for index in part.expert_index}
    return ShareCall(batch=message.batch, experts=tuple(sorted(experts)), commits=tuple(message.commit))


def decode_fetch_call(data: bytes | memoryview, limits: Limits | None = None) -> tuple[int, tuple[int, ...]]:
    """(layer, expert indices) of a FetchRequest, each index once and ascending; at most 256 KiB are looked at."""
    message, _ = take_apart(expert_pb2.FetchRequest, data, limits or Limits(), arrays=(), tensors=())
    return message.layer, tuple(sorted(set(message.expert_index)))


def decode_fetch_chunk(data: bytes | memoryview, limits: Limits | None = None) -> tuple[memoryview, bytes]:
    """(a piece of the file, the digest of the whole or b"") of a FetchChunk; the piece is a view."""
    message, views = take_apart(expert_pb2.FetchChunk, data, limits or Limits(), arrays=(), tensors=(FETCHED,))
    return views[FETCHED], message.sha256


def decode_info(data: bytes | memoryview, limits: Limits | None = None) -> expert_pb2.InfoReply:
    """An InfoReply: whatever its peer says of itself; at most 256 KiB."""
    message, _ = take_apart(expert_pb2.InfoReply, data, limits or Limits(), arrays=(), tensors=())
    return message


def decode_commit_answer(data: bytes | memoryview, limits: Limits | None = None) -> CommitAnswer:
    """A CommitReply."""
    message, _ = take_apart(expert_pb2.CommitReply, data, limits or Limits(), arrays=(), tensors=())
    return CommitAnswer(
        repeated=message.repeated_call, stepped=message.stepped, committed_tokens=message.committed_tokens,
        missing=_call_ids("missing_call_id", message.missing_call_id),
        not_finite=_call_ids("not_finite_call_id", message.not_finite_call_id),
    )  # fmt: skip
