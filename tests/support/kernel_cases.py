"""Expert layers with random data, for tests of kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from moe_net.kernels.types import ExpertWeights
from moe_net.types import Activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the sum of absolute terms: fp32 sums of up to 48 stay within 1e-6; bf16 keeps 8 bits, rounded four times.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    x_TD: Tensor
    ids_TK: Tensor
    gates_TK: Tensor
    dy_TD: Tensor
    weights: ExpertWeights

    def to(self, dtype: torch.dtype) -> Case:
        """On the device, rows and weights rounded to `dtype`; gates stay fp32, or become fp64 for the oracle."""
        w = self.weights
        return Case(
            x_TD=self.x_TD.to(DEVICE, dtype),
            ids_TK=self.ids_TK.to(DEVICE),
            gates_TK=self.gates_TK.to(DEVICE, torch.float64 if dtype is torch.float64 else torch.float32),
            dy_TD=self.dy_TD.to(DEVICE, dtype),
            weights=ExpertWeights(w.w_in_EDH.to(DEVICE, dtype), w.w_out_EFD.to(DEVICE, dtype), w.activation),
        )


def make_case(
    seed: int, *, t: int, k: int, e: int, d: int, f: int, activation: Activation, routing: str = "random"
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if routing == "padding":
        ids = torch.full((t, k), -1)
    elif routing == "one hot":
        ids = torch.full((t, k), seed % e)
    else:
        ids = torch.randint(-1, e, (t, k), generator=generator)
        if routing == "empty experts":
            ids[ids % 2 == 0] = -1
    h = 2 * f if activation is Activation.SWIGLU else f
    w_in = normal(e, d, h) / d**0.5
    if seed % 4 < 2:  # as a view of [E, H, D]
        w_in = w_in.transpose(1, 2).contiguous().transpose(1, 2)
    case = Case(
        x_TD=normal(t, d),
        ids_TK=ids.to(torch.int32 if seed % 2 else torch.int64),
        gates_TK=torch.rand((t, k), generator=generator),
        dy_TD=normal(t, d),
        weights=ExpertWeights(w_in, normal(e, f, d) / f**0.5, activation),
    )
    return case.to(torch.float32)


def shapes(*, max_tokens: int) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of `make_case`: sizes that are no multiple of anything, and every kind of routing."""
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 10_000),
            "t": st.integers(0, max_tokens),
            "k": st.sampled_from([1, 2, 3, 8]),
            "e": st.integers(1, 6),
            "d": st.sampled_from([1, 8, 13]),
            "f": st.sampled_from([1, 8, 21]),
            "activation": st.sampled_from(list(Activation)),
            "routing": st.sampled_from(["random", "one hot", "empty experts", "padding"]),
        }
    )
