"""What a call says of itself, and whether that fits together.

R rows, D model width, P (row, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moe_net.errors import LimitError, WireError
from moe_net.experts.staging import CallFacts
from moe_net.types import ExpertShape
from moe_net.wire.messages import BackwardCall, ForwardCall, RoutedRows


def forward_facts(call: ForwardCall) -> CallFacts:
    return CallFacts(
        trainer=call.trainer,
        step=call.step,
        layer=call.layer,
        n_rows=call.rows.x_RD.shape[0],
        n_pairs=call.rows.expert_index_P.numel(),
    )


def check_twin(call_id: bytes, facts: CallFacts, first: CallFacts) -> None:
    if not facts.agrees_with(first):
        raise WireError(f"call_id {call_id.hex()} belongs to another call: {first}, now said to be {facts}")


def check_shapes(rows: RoutedRows, d_model: int) -> None:
    """The cheap half of `wire.validate`, for callers that came without a wire too."""
    n_pairs = rows.expert_index_P.numel()
    if rows.x_RD.ndim != 2 or rows.x_RD.shape[1] != d_model:
        raise WireError(f"x is {list(rows.x_RD.shape)}, the experts have d_model={d_model}")
    if rows.experts_per_row_R.numel() != rows.x_RD.shape[0] or rows.gate_P.numel() != n_pairs:
        raise WireError(
            f"{rows.x_RD.shape[0]} rows have {rows.experts_per_row_R.numel()} counts, "
            f"{n_pairs} pairs {rows.gate_P.numel()} gates"
        )
    count_R = rows.experts_per_row_R.numpy()  # for torch's operators on small arrays cost several times as much
    if count_R.size and int(count_R.min()) < 1:
        raise WireError("a row without experts: every count of experts_per_row must be at least 1")
    total = int(count_R.sum(dtype=np.int64))
    if total != n_pairs:
        raise WireError(f"experts_per_row sums to {total}, but there are {n_pairs} pairs")


def pairs_bytes(n_rows: int, most_experts: int, shape: ExpertShape) -> int:
    """What rows take beside themselves while they run: of every (row, expert) pair its pre-activations and what the
    expert made of the row, in fp32. Rows with fewer experts than the others are filled up: some kernels make room for
    that as well. A bound for admission, whatever runs them; what a GPU's dispatch really takes is counted in
    `kernels.memory`."""
    return n_rows * most_experts * (shape.d_model + shape.d_hidden) * 4


def most_experts(rows: RoutedRows) -> int:
    """Of any row."""
    return int(rows.experts_per_row_R.numpy().max(initial=1))


def check_cost(rows: RoutedRows, shape: ExpertShape, limit_bytes: int) -> None:
    """LimitError when one call takes too much at once: a row is small beside what 64 experts make of it."""
    n_rows, most = rows.x_RD.shape[0], most_experts(rows)
    if (n_bytes := pairs_bytes(n_rows, most, shape)) > limit_bytes:
        raise LimitError(
            f"experts_per_row: {n_rows} rows of up to {most} experts take {n_bytes} bytes at once with d_model "
            f"{shape.d_model} and d_ff {shape.d_ff}, the limit is {limit_bytes}"
        )


def backward_facts(call: BackwardCall, d_model: int) -> CallFacts:
    """WireError when its parts do not fit each other, or the experts."""
    n_rows = call.grad_RD.shape[0]
    if call.grad_RD.ndim != 2 or call.grad_RD.shape[1] != d_model:
        raise WireError(f"grad is {list(call.grad_RD.shape)}, the experts have d_model={d_model}")
    if call.rows is not None and call.rows.x_RD.shape[0] != n_rows:
        raise WireError(f"grad has {n_rows} rows, the inputs that came with it {call.rows.x_RD.shape[0]}")
    n_pairs = None if call.rows is None else call.rows.expert_index_P.numel()
    return CallFacts(trainer=call.trainer, step=call.step, layer=call.layer, n_rows=n_rows, n_pairs=n_pairs)


def some(indices: Sequence[int] | Mapping[int, object]) -> str:
    """The first few, so that a call cannot make its own refusal long."""
    shown = ", ".join(str(index) for index in list(indices)[:8])
    return shown if len(indices) <= 8 else f"{shown} and {len(indices) - 8} more"
