# pyright: basic
"""Our Triton products, with the gather in front of them and the activation behind them: few launches, any CUDA GPU.

T tokens, K experts per token, E experts, D model width, F expert width, H columns of the first projection
(2F for SwiGLU: gate then up; F for GELU), P = T * K (token, expert) pairs sorted by expert.

Ten launches forward and backward, none of which depends on how many tokens there are: what a server's small batches
cost is launches. Where the gate enters is explained in `loop.backward_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_net.kernels.device import products
from moe_net.kernels.device.routing import sort_pairs
from moe_net.kernels.device.rows import combine
from moe_net.kernels.routing import Routing, merge
from moe_net.kernels.types import ExpertWeights, Saved, WeightCall, WeightGrads, Work, no_gradient, no_rows
from moe_net.types import Activation

NAME = "triton"


def _dense(weights: ExpertWeights) -> ExpertWeights:
    """What the kernels compute addresses for: copies only what is a slice of something larger."""
    w_in_EDH, w_out_EFD, activation = weights
    if not (w_in_EDH.is_contiguous() or w_in_EDH.transpose(1, 2).is_contiguous()):
        w_in_EDH = w_in_EDH.contiguous()
    return ExpertWeights(w_in_EDH, w_out_EFD.contiguous(), activation)


def forward(
    x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, *, keep: bool
) -> tuple[Tensor, Saved | None]:
    """As `dispatch.moe_ffn_forward`."""
    if expert_ids_TK.numel() == 0 or x_TD.shape[1] == 0:
        return torch.zeros_like(x_TD), None
    weights = _dense(weights)
    n_tokens, n_choices = expert_ids_TK.shape
    routing = sort_pairs(expert_ids_TK, weights.w_in_EDH.shape[0])
    gated = weights.activation is Activation.SWIGLU
    h_PH, a_PF = products.up(x_TD, weights.w_in_EDH, routing, n_choices, gated=gated)
    y_PD = products.rows(a_PF, weights.w_out_EFD, routing)
    y_TD, _ = combine(y_PD, routing, (n_tokens, n_choices), gates_TK)
    return y_TD, Saved(NAME, routing, (h_PH,)) if keep else None


def _down(
    dy_TD: Tensor,
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    saved: Saved | None,
) -> tuple[Routing, Tensor, Tensor, Tensor]:
    """(routing, dh [P, H] and activations [P, F], both with the gate, parts of the gates' gradients [P, N])."""
    n_choices, gated = expert_ids_TK.shape[1], weights.activation is Activation.SWIGLU
    if saved is None:
        routing = sort_pairs(expert_ids_TK, weights.w_in_EDH.shape[0])
        h_PH, _ = products.up(x_TD, weights.w_in_EDH, routing, n_choices, gated=gated)
    else:
        routing, h_PH = saved.routing, saved.h_PH
    dh_PH, a_PF, partial_PN = products.down_backward(dy_TD, weights.w_out_EFD, h_PH, gates_TK, routing, gated=gated)
    if saved is not None:
        saved.release()
    return routing, dh_PH, a_PF, partial_PN


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
    """As `types.Backend.backward_rows`."""
    if expert_ids_TK.numel() == 0:
        return no_rows(x_TD, gates_TK, NAME)
    weights = _dense(weights)
    routing, dh_PH, a_PF, partial_PN = _down(dy_TD, x_TD, expert_ids_TK, gates_TK, weights, saved)
    work = Work(NAME, routing, None, (a_PF,), (dh_PH,))
    if not rows:
        return None, torch.zeros_like(gates_TK), work
    dx_PD = products.rows(dh_PH, weights.w_in_EDH.transpose(1, 2), routing)
    dx_TD, dgates_TK = combine(dx_PD, routing, (expert_ids_TK.shape[0], expert_ids_TK.shape[1]), None, partial_PN)
    assert dgates_TK is not None
    return dx_TD, dgates_TK.to(gates_TK.dtype), work


def weight_grads(
    calls: Sequence[WeightCall], weights: ExpertWeights, *, into: WeightGrads | None = None
) -> WeightGrads:
    """As `types.Backend.weight_grads`, in fp32."""
    dy_TD, x_TD, n_choices, routing, a_PF, dh_PH = merge(calls, weights.w_in_EDH.shape[0], sort_pairs)
    dw_out_EFD = torch.empty_like(weights.w_out_EFD, dtype=torch.float32)
    products.weights(a_PF, dy_TD, dw_out_EFD, routing, n_choices, gather="b")
    del a_PF, dy_TD
    dw_in_EDH = torch.empty_like(weights.w_in_EDH, dtype=torch.float32)
    products.weights(x_TD, dh_PH, dw_in_EDH, routing, n_choices, gather="a")
    return WeightGrads(dw_in_EDH, dw_out_EFD)


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
    """As `types.Backend.backward`."""
    if expert_ids_TK.numel() == 0:
        return no_gradient(x_TD, gates_TK, weights, fresh=fresh)
    weights = _dense(weights)
    n_choices = expert_ids_TK.shape[1]
    routing, dh_PH, a_PF, partial_PN = _down(dy_TD, x_TD, expert_ids_TK, gates_TK, weights, saved)
    new = None
    if fresh:
        # One gradient after the other, and what only the first one needs gone before the second one is there.
        dw_out_EFD = torch.empty_like(weights.w_out_EFD)
        products.weights(a_PF, dy_TD, dw_out_EFD, routing, n_choices, gather="b")
    del a_PF
    if fresh:
        dw_in_EDH = torch.empty_like(weights.w_in_EDH)
        products.weights(x_TD, dh_PH, dw_in_EDH, routing, n_choices, gather="a")
        new = WeightGrads(dw_in_EDH, dw_out_EFD)
    dx_PD = products.rows(dh_PH, weights.w_in_EDH.transpose(1, 2), routing)
    del dh_PH  # Its last use, and the peak: gone before there is a dx.
    dx_TD, dgates_TK = combine(dx_PD, routing, (expert_ids_TK.shape[0], expert_ids_TK.shape[1]), None, partial_PN)
    assert dgates_TK is not None
    return dx_TD, dgates_TK.to(gates_TK.dtype), new
