# pyright: basic
"""What every backend takes and gives.

E experts, D model width, F expert width, H columns of the first projection (2F for SwiGLU: gate then up; F for GELU),
P (token, expert) pairs, sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from moe_net.types import Activation


class ExpertWeights(NamedTuple):
    """Experts of one layer, stacked."""

    w_in_EDH: Tensor
    w_out_EFD: Tensor
    activation: Activation


class WeightGrads(NamedTuple):
    """fp32 sums of weight gradients; backward adds to them in place."""

    w_in_EDH: Tensor
    w_out_EFD: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """What a forward keeps for its backward, beside the inputs: the routing and the pre-activations."""

    backend: str
    routing: Any
    """The backend's own sort of the pairs."""
    h_PH: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the pre-activations; the routing is smaller by about the factor H / 4."""
        return self.h_PH.numel() * self.h_PH.element_size()
