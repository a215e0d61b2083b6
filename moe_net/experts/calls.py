"""What a bank keeps of calls, and what it makes a step of.

R rows, D model width, K experts per row, E experts of the bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_net.kernels.types import Saved, WeightGrads, Work

MAX_GRADIENT = 1e15
"""The largest norm that one call's weight gradient may have. Not even ten thousand calls of a batch make the norm of
their sum infinite then, for which everybody's step would be skipped."""


@dataclass(frozen=True, slots=True, eq=False)
class Reusable:
    """What a forward left for its backward, or that for the weights' gradients, and the state of the weights and of
    the experts that run, to which it belongs."""

    kernel: Saved | Work
    generation: int

    @property
    def nbytes(self) -> int:
        return self.kernel.nbytes

    @property
    def n_tensors(self) -> int:
        """Beside those of the sort."""
        return len(self.kernel.blocks) if isinstance(self.kernel, Saved) else len(self.kernel.a) + len(self.kernel.dh)


@dataclass(frozen=True, slots=True, eq=False)
class BankCall:
    """One call whose weights' gradients count."""

    dy_RD: Tensor
    x_RD: Tensor
    slots_RK: Tensor
    gates_RK: Tensor
    reusable: Reusable | None = None


Commit = Sequence[BankCall]
"""The calls that one commit named, of one layer."""


@dataclass(slots=True, kw_only=True, eq=False)
class Batch:
    """What the experts of one bank shall step on."""

    commits: Sequence[Commit]
    base: WeightGrads | None
    """Sums to begin with."""
    rows_E: tuple[int, ...]
    """Pairs that all of it is of."""
    tokens: int
    grads: WeightGrads | None = None
    """The sums, once they are made."""
    filled_E: tuple[bool, ...] = ()
    """Experts that they hold anything of."""


def gradient_bound(dy_RD: Tensor, x_RD: Tensor, gates_RK: Tensor, work: Work, n_pairs: int) -> float | Tensor:
    """A bound of the norm of each of a call's two weights' gradients, products of what is measured here, and of the
    gated rows that they are made of: an infinite one times activations of zero is NaN. NaN if a part of it is. On a
    GPU a tensor, which nobody waits for."""
    if not n_pairs or not work.a:
        return 0.0

    def norm(values: Sequence[Tensor]) -> Tensor:
        norms = [torch.linalg.vector_norm(value, dtype=torch.float32) for value in values]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    a, dh = (norm([block[:n_pairs] for block in blocks]).clamp(min=1) for blocks in (work.a, work.dh))
    # With gates of 1 at least, for some backends have them in activations and gradients already.
    gate = gates_RK.abs().amax().clamp(min=1)
    bound = gate * gates_RK.shape[1] ** 0.5 * torch.maximum(norm([dy_RD]) * a, norm([x_RD]) * dh)
    return bound if bound.is_cuda else float(bound)


def norm_of_each(grads: WeightGrads) -> Tensor:
    """The larger norm of each expert's two [E]."""
    of_in, of_out = (torch.linalg.vector_norm(grad, dim=(1, 2), dtype=torch.float32) for grad in grads)
    return torch.maximum(of_in, of_out)


def leave_out_unsound(grads: WeightGrads) -> None:
    """Zeros in the place of every expert's gradients that are larger than MAX_GRADIENT, or no numbers."""
    for slot in (~(norm_of_each(grads) <= MAX_GRADIENT)).nonzero().flatten().tolist():
        for grad in grads:
            grad[slot].zero_()
