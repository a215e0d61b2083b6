# pyright: basic
"""What every backend takes and gives.

E experts, D model width, F expert width, H columns of the first projection (2F for SwiGLU: gate then up; F for GELU),
P (token, expert) pairs, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moe_net.types import Activation

WIDE_F = 4096


class ExpertWeights(NamedTuple):
    """Experts of one layer, stacked.

    Any strides will do. Fastest on a GPU is `w_in` as a transposed view of [E, H, D]: the Hopper backend takes only
    that.
    """

    w_in_EDH: Tensor
    w_out_EFD: Tensor
    activation: Activation

    @property
    def wide(self) -> bool:
        """More than WIDE_F columns: what is fast for the others is not for these, and the other way round."""
        return self.w_out_EFD.shape[1] > WIDE_F


class WeightGrads(NamedTuple):
    """Gradients of both weights."""

    w_in_EDH: Tensor
    w_out_EFD: Tensor


def zero_sums(weights: ExpertWeights) -> WeightGrads:
    """Zeros in fp32, or fp64 beside fp64 weights."""
    w_in, w_out, _ = weights
    dtype = torch.promote_types(w_in.dtype, torch.float32)
    return WeightGrads(torch.zeros_like(w_in, dtype=dtype), torch.zeros_like(w_out, dtype=dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """What a forward keeps for its backward, beside the inputs: the routing and the pre-activations."""

    backend: str
    routing: Any
    """The backend's own sort of the pairs."""
    blocks: tuple[Tensor, ...]
    """Pre-activations [n, H] of all pairs at once, or of one expert after the other."""
    static: bool = False
    """Whether the pre-activations' memory is somebody's to use again: then `release` leaves it alone."""

    @property
    def nbytes(self) -> int:
        """Bytes of the pre-activations; the routing is smaller by about the factor H / 4."""
        return sum(h_nH.numel() * h_nH.element_size() for h_nH in self.blocks)

    @property
    def h_PH(self) -> Tensor:
        """The only block."""
        (h_PH,) = self.blocks
        return h_PH

    def release(self) -> None:
        """Free the pre-activations before the weights' gradients, where a backward's memory peaks.

        Their storage shrinks, since autograd holds the tensor until the backward has returned.
        """
        if not self.static:
            for h_nH in self.blocks:
                h_nH.untyped_storage().resize_(0)

    @property
    def used_up(self) -> bool:
        """Whether they are gone: another backward of the same forward computes them again."""
        return any(h_nH.numel() > 0 and h_nH.untyped_storage().nbytes() == 0 for h_nH in self.blocks)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What a backward of rows leaves for the weights' gradients, beside the rows: activations and the gradients of the
    pre-activations, of the pairs sorted by expert."""

    backend: str
    routing: Any
    """The backend's own sort of the pairs."""
    gate_P1: Tensor | None
    """Of the sorted pairs, where activations and gradients are without it."""
    a: tuple[Tensor, ...]
    """[n, F], of all pairs at once or of one expert after the other."""
    dh: tuple[Tensor, ...]
    """[n, H]"""

    @property
    def nbytes(self) -> int:
        """Bytes of the activations and gradients; the routing is smaller by about the factor F / 2."""
        return sum(value.nbytes for value in (*self.a, *self.dh))


class WeightCall(NamedTuple):
    """One call whose weights' gradients are to be made."""

    dy_TD: Tensor
    x_TD: Tensor
    expert_ids_TK: Tensor
    work: Work


class Backend(Protocol):
    """What `dispatch` asks of a backend's module. T tokens, K experts per token; arguments as `moe_ffn_forward` has
    checked them, and contiguous but for the weights."""

    @property
    def NAME(self) -> str:
        """What `backend=` calls it."""
        ...

    def forward(
        self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, *, keep: bool
    ) -> tuple[Tensor, Saved | None]:
        """Row sums y [T, D] in x's dtype, and with `keep` what the backward can use again."""
        ...

    def backward_rows(
        self,
        dy_TD: Tensor,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        gates_TK: Tensor,
        weights: ExpertWeights,
        saved: Saved | None,
        *,
        rows: bool = True,
    ) -> tuple[Tensor | None, Tensor, Work]:
        """(dx [T, D], dgates [T, K], what `weight_grads` needs); without `rows` no dx. `saved` is used up."""
        ...

    def weight_grads(
        self, calls: Sequence[WeightCall], weights: ExpertWeights, *, into: WeightGrads | None = None
    ) -> WeightGrads:
        """Sums over the calls, in their order, which have a pair each at least. In fp32, or in the weights' dtype.
        `into`: memory of fp32 that may be used for them, whatever is in it."""
        ...

    def backward(
        self,
        dy_TD: Tensor,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        gates_TK: Tensor,
        weights: ExpertWeights,
        saved: Saved | None,
        *,
        fresh: bool,
    ) -> tuple[Tensor, Tensor, WeightGrads | None]:
        """(dx [T, D], dgates [T, K], the weights' gradients in their dtype if `fresh`) at once, for autograd: in less
        memory than one after the other."""
        ...


def no_gradient(
    x_TD: Tensor, gates_TK: Tensor, weights: ExpertWeights, *, fresh: bool
) -> tuple[Tensor, Tensor, WeightGrads | None]:
    """What a backward of no pairs gives."""
    new = WeightGrads(torch.zeros_like(weights.w_in_EDH), torch.zeros_like(weights.w_out_EFD)) if fresh else None
    return torch.zeros_like(x_TD), torch.zeros_like(gates_TK), new


def no_rows(x_TD: Tensor, gates_TK: Tensor, backend: str) -> tuple[Tensor, Tensor, Work]:
    """What a backward of rows gives where there is no pair; nobody asks for its weights' gradients."""
    return torch.zeros_like(x_TD), torch.zeros_like(gates_TK), Work(backend, None, None, (), ())
