# pyright: basic
"""The oracle: a plain loop over experts under ordinary autograd. Slow, obvious, what every other backend must equal.

T tokens, K experts per token, E experts, D model width, F expert width, H columns of the first projection
(2F for SwiGLU: gate then up; F for GELU), P (token, expert) pairs of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_net.kernels.types import ExpertWeights, Saved, WeightCall, WeightGrads, Work, zero_sums
from moe_net.types import Activation

NAME = "reference"


def activate(h_PH: Tensor, activation: Activation) -> Tensor:
    """The expert's non-linearity, [P, H] -> [P, F]: SwiGLU (Shazeer, 2020) or exact (erf) GELU."""
    if activation is Activation.SWIGLU:
        gate_PF, up_PF = h_PH.chunk(2, dim=1)
        return F.silu(gate_PF) * up_PF
    return F.gelu(h_PH)


def moe_ffn_reference(x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """y_t = sum_k gate_tk * expert_{id_tk}(x_t), [T, D]; ids of -1 add nothing. Differentiable as it stands."""
    y_TD = torch.zeros_like(x_TD)
    for expert in range(weights.w_in_EDH.shape[0]):
        token_P, choice_P = torch.nonzero(expert_ids_TK == expert, as_tuple=True)
        h_PH = x_TD[token_P] @ weights.w_in_EDH[expert]
        y_PD = activate(h_PH, weights.activation) @ weights.w_out_EFD[expert]
        gated_PD = (y_PD * gates_TK[token_P, choice_P].unsqueeze(1)).to(x_TD.dtype)
        y_TD = y_TD.index_add(0, token_P, gated_PD)
    return y_TD


def forward(
    x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, *, keep: bool
) -> tuple[Tensor, Saved | None]:
    """As `types.Backend.forward`. Keeps nothing: its backward runs the forward again."""
    with torch.no_grad():
        return moe_ffn_reference(x_TD, expert_ids_TK, gates_TK, weights), None


def backward_rows(
    dy_TD: Tensor,
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    saved: Saved | None,
    *,
    rows: bool = True,
) -> tuple[Tensor | None, Tensor, Work]:
    """As `types.Backend.backward_rows`; keeps nothing but the gates."""
    dx_TD, dgates_TK, _ = backward(dy_TD, x_TD, expert_ids_TK, gates_TK, weights, saved, fresh=False)
    return dx_TD, dgates_TK, Work(NAME, gates_TK, None, (), ())


def weight_grads(
    calls: Sequence[WeightCall], weights: ExpertWeights, *, into: WeightGrads | None = None
) -> WeightGrads:
    """As `types.Backend.weight_grads`: one call after another."""
    sums = zero_sums(weights)
    for dy_TD, x_TD, expert_ids_TK, work in calls:
        _, _, new = backward(dy_TD, x_TD, expert_ids_TK, work.routing, weights, None, fresh=True)
        assert new is not None
        for total, grad in zip(sums, new, strict=True):
            total.add_(grad)
    return sums


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    saved: Saved | None,
    *,
    fresh: bool,
) -> tuple[Tensor, Tensor, WeightGrads | None]:
    """As `types.Backend.backward`, by autograd."""
    with torch.enable_grad():
        x, gates, w_in, w_out = (
            value.detach().requires_grad_() for value in (x_TD, gates_TK, weights.w_in_EDH, weights.w_out_EFD)
        )
        y_TD = moe_ffn_reference(x, expert_ids_TK, gates, ExpertWeights(w_in, w_out, weights.activation))
    dx_TD, dgates_TK, dw_in_EDH, dw_out_EFD = torch.autograd.grad(
        y_TD, (x, gates, w_in, w_out), dy_TD, materialize_grads=True
    )
    return dx_TD, dgates_TK, WeightGrads(dw_in_EDH, dw_out_EFD) if fresh else None
