"""The calls of ExpertService as values: what the codec reads and writes, and what every transport carries.

R rows sent to one server, D model width, P (row, expert) pairs of those rows.
All tensors are on the CPU and contiguous; activations and gradients are fp32 here, whatever the wire carries. Only
within a server whose experts run on a GPU they are there, in the dtype these compute in (`wire.matrices`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moe_net.types import Encoding


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutedRows:
    """Rows of one layer and the experts each of them goes to, row by row (CSR without the running sum)."""

    x_RD: Tensor
    experts_per_row_R: Tensor
    """int32, each at least 1; sums to P."""
    expert_index_P: Tensor
    """int32, index of the expert within its layer."""
    gate_P: Tensor
    """fp32 combine weight of each pair."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardCall:
    call_id: bytes
    trainer: str
    step: int
    layer: int
    rows: RoutedRows
    train: bool = True
    """Keep the inputs: a BackwardCall of the same id will follow."""
    encoding: Encoding = Encoding.FP32
    """Of `x_RD` on the wire."""
    reply_encoding: Encoding = Encoding.FP32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardAnswer:
    y_RD: Tensor
    """Row r: sum of gate * expert(x_r) over its pairs whose expert ran."""
    failed_experts: tuple[int, ...] = ()
    """Experts (index within the layer) that could not run here and are in no sum."""
    versions: dict[int, int] = field(default_factory=dict[int, int])
    """Expert index -> optimizer steps it had made when it ran."""
    queue_us: int = 0
    compute_us: int = 0
    encoding: Encoding = Encoding.FP32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BackwardCall:
    call_id: bytes
    """Of the ForwardCall."""
    trainer: str
    step: int
    layer: int
    grad_RD: Tensor
    """dLoss/dy for the row sums the server returned."""
    rows: RoutedRows | None = None
    """The ForwardCall's inputs again, once the server said FAILED_PRECONDITION."""
    encoding: Encoding = Encoding.FP32
    reply_encoding: Encoding = Encoding.FP32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BackwardAnswer:
    dx_RD: Tensor
    gate_grad_P: Tensor
    """fp32, <grad_r, expert(x_r)> of each pair of the ForwardCall; 0 where the expert did not run."""
    versions: dict[int, int] = field(default_factory=dict[int, int])
    queue_us: int = 0
    compute_us: int = 0
    encoding: Encoding = Encoding.FP32


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitCall:
    trainer: str
    step: int
    tokens: int
    calls: tuple[bytes, ...] = ()
    """The calls of this step whose answers the trainer used: these count, everything else of the step is forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitAnswer:
    repeated: bool
    """This (trainer, step) had been committed before."""
    stepped: bool
    """The experts made an optimizer step."""
    committed_tokens: int
    """Towards the next step."""
    missing: tuple[bytes, ...] = ()
    """Of the call's `calls`: not here, or no more; they do not count."""
    not_finite: tuple[bytes, ...] = ()
    """Of the call's `calls`: left out, because their gradients would spoil everybody's."""
