"""The state of experts, tensors by names like `3.17.w_in`: what may stand in it, and how many bytes it takes.

Nobody's state is taken on trust.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from moe_net.errors import CheckpointError
from moe_net.types import ExpertId, ExpertShape

STATE_FIELDS: tuple[str, ...] = ("w_in", "w_out", "m_in", "m_out", "v_in", "v_out", "version")
SUM_FIELDS: tuple[str, ...] = ("g_in", "g_out", "committed_tokens")
"""Of an expert between two steps: its gradient sums, and the tokens committed towards its next step."""
LINEAGE_FIELD = "lineage"
"""int64 [origins, 3]: what the state has learned from whom (see `experts.lineage`); absent when that is nothing."""
MAX_ORIGINS = 32
"""Lives of peers that one expert's lineage names, those that learned last."""
MAX_COUNT = 2**53
"""Of rows or versions in a lineage: more than any run has, and sums of them stay far from int64's end."""
NOT_NEGATIVE = ("v_in", "v_out", "version", "committed_tokens")
_NUMBERS = ("version", "committed_tokens")

_HEADER_BYTES = 64 * 1024
_ENTRY_BYTES = 256
"""Of a safetensors header, for one tensor: name, dtype, shape and offsets take 90..120."""


def tensor_name(expert: ExpertId | str, field: str) -> str:
    """Of the tensor of `expert`, an id or as `str` writes it."""
    return f"{expert}.{field}"


def split_name(name: str) -> tuple[str, str]:
    """The expert, as `str` writes it, and the field, of a `tensor_name`; of another name something that is neither."""
    expert, _, field = name.rpartition(".")
    return expert, field


def experts_in(names: Iterable[str]) -> set[str]:
    """The experts that tensors of these names are of; a name that is none brings something that is no expert."""
    return {split_name(name)[0] for name in names}


def expert_id(name: str) -> ExpertId:
    """The expert of a `tensor_name`; ValueError when it is none."""
    layer, index = map(int, split_name(name)[0].split("."))
    return ExpertId(layer, index)


def max_state_bytes(n_experts: int, shape: ExpertShape) -> int:
    """More than a file of `n_experts` (see `wire.snapshot`) ever has, and little more."""
    one_bytes = 16 * shape.d_model * (shape.d_hidden + shape.d_ff) + 16 + 24 * MAX_ORIGINS
    return _HEADER_BYTES + n_experts * (one_bytes + (len(STATE_FIELDS + SUM_FIELDS) + 1) * _ENTRY_BYTES)


def max_header_bytes(n_bytes: int, shape: ExpertShape) -> int:
    """The most that the header of a file of `n_bytes` takes, whose experts have at least their gradients."""
    n_experts = n_bytes // (4 * shape.d_model * (shape.d_hidden + shape.d_ff))
    return _HEADER_BYTES + n_experts * (len(STATE_FIELDS + SUM_FIELDS) + 1) * _ENTRY_BYTES


def check_state(state: Mapping[str, Tensor], *, layer: int, indices: Collection[int], shape: ExpertShape) -> None:
    """`state` is that of the experts `indices` of `layer`: all of it, nothing else, and usable. An expert has all of
    SUM_FIELDS or none, and may have LINEAGE_FIELD.

    CheckpointError for names that lack or are too many, dtypes or shapes that do not fit, values that are not finite,
    negative second moments and versions, or a lineage that cannot be.
    """
    w_in, w_out = (shape.d_model, shape.d_hidden), (shape.d_ff, shape.d_model)
    shapes = dict(zip(STATE_FIELDS, (w_in, w_out, w_in, w_out, w_in, w_out, ()), strict=True))
    shapes |= dict(zip(SUM_FIELDS, (w_in, w_out, ()), strict=True))
    expected: dict[str, str] = {}
    for index in indices:
        expert = ExpertId(layer, index)
        has_sums = any(tensor_name(expert, field) in state for field in SUM_FIELDS)
        for field in (*STATE_FIELDS, *(SUM_FIELDS if has_sums else ())):
            expected[tensor_name(expert, field)] = field
    lineages = {tensor_name(ExpertId(layer, index), LINEAGE_FIELD) for index in indices} & state.keys()
    if unknown := sorted(state.keys() - expected.keys() - lineages):
        raise CheckpointError(f"{unknown[0]!r:.80} is none of the experts of layer {layer} that should be here")
    for name, field in expected.items():
        if name not in state:
            raise CheckpointError(f"{name} is missing")
        value = state[name]
        dtype = torch.int64 if field in _NUMBERS else torch.float32
        if value.dtype != dtype or value.shape != shapes[field]:
            raise CheckpointError(f"{name} is {value.dtype} {list(value.shape)}, not {dtype} {list(shapes[field])}")
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{name} holds values that are not finite")
        if field in NOT_NEGATIVE and bool((value < 0).any()):
            raise CheckpointError(f"{name} is negative")
        if field == "version" and int(value) > MAX_COUNT:
            raise CheckpointError(f"{name} is over {MAX_COUNT}")
    for name in sorted(lineages):
        _check_lineage(name, state[name])
        if int(state[name][:, 2].max()) > int(state[tensor_name(split_name(name)[0], "version")]):
            raise CheckpointError(f"{name} has learned at later steps than the expert has made")


def _check_lineage(name: str, value: Tensor) -> None:
    if value.dtype != torch.int64 or value.ndim != 2 or value.shape[1] != 3 or not 0 < value.shape[0] <= MAX_ORIGINS:
        raise CheckpointError(f"{name} is {value.dtype} {list(value.shape)}, not torch.int64 [1..{MAX_ORIGINS}, 3]")
    if bool((value < 0).any()) or bool((value[:, 1:] > MAX_COUNT).any()):
        raise CheckpointError(f"{name} has counts that are negative or over {MAX_COUNT}")
    if value[:, 0].unique().numel() < value.shape[0]:
        raise CheckpointError(f"{name} names an origin twice")
