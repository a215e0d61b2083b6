# pyright: basic
"""Our Triton products, with the gather in front of them and the activation behind them: few launches, any CUDA GPU.

T tokens, K experts per token, E experts, D model width, F expert width, H columns of the first projection
(2F for SwiGLU: gate then up; F for GELU), P = T * K (token, expert) pairs sorted by expert.

Ten launches forward and backward, none of which depends on how many tokens there are: what a server's small batches
cost is launches. Where the gate enters is explained in `loop.backward`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_net.kernels.device import products, rows
from moe_net.kernels.device.routing import sort_pairs
from moe_net.kernels.routing import Routing
from moe_net.kernels.types import ExpertWeights, Saved, WeightGrads, no_gradient
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
    y_TD, _ = rows.combine(y_PD, routing, (n_tokens, n_choices), gates_TK)
    return y_TD, Saved(NAME, routing, (h_PH,)) if keep else None


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    saved: Saved | None,
    *,
    sums: WeightGrads | None,
    fresh: bool = False,
    early: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor, WeightGrads | None]:
    """As `types.Backend.backward`."""
    if expert_ids_TK.numel() == 0:
        return no_gradient(x_TD, gates_TK, weights, fresh=fresh)
    weights = _dense(weights)
    n_tokens, n_choices = expert_ids_TK.shape
    gated = weights.activation is Activation.SWIGLU
    if saved is None:
        routing = sort_pairs(expert_ids_TK, weights.w_in_EDH.shape[0])
        h_PH, _ = products.up(x_TD, weights.w_in_EDH, routing, n_choices, gated=gated)
    else:
        routing, h_PH = saved.routing, saved.h_PH
    assert isinstance(routing, Routing)
    dh_PH, a_PF, partial_PN = products.down_backward(dy_TD, weights.w_out_EFD, h_PH, gates_TK, routing, gated=gated)
    if saved is not None:
        saved.release()
    del h_PH

    def rows_back() -> tuple[Tensor, Tensor]:
        nonlocal dh_PH
        dx_PD = products.rows(dh_PH, weights.w_in_EDH.transpose(1, 2), routing)
        if early is None:
            del dh_PH  # Its last use, and the peak: gone before there is a dx.
        dx_TD, dgates_TK = rows.combine(dx_PD, routing, (n_tokens, n_choices), None, partial_PN)
        assert dgates_TK is not None
        return dx_TD, dgates_TK.to(gates_TK.dtype)

    back = None
    if early is not None:
        back = rows_back()
        early()
    # One gradient after the other, and what only the first one needs gone before the second one is there.
    dw_out_EFD = torch.empty_like(weights.w_out_EFD) if fresh else None
    for out_EFD, add in ((dw_out_EFD, False), (sums and sums.w_out_EFD, True)):
        if out_EFD is not None:
            products.weights(a_PF, dy_TD, out_EFD, routing, n_choices, gather="b", add=add)
    del a_PF
    dw_in_EDH = torch.empty_like(weights.w_in_EDH) if fresh else None
    for out_EDH, add in ((dw_in_EDH, False), (sums and sums.w_in_EDH, True)):
        if out_EDH is not None:
            products.weights(x_TD, dh_PH, out_EDH, routing, n_choices, gather="a", add=add)
    new = None if dw_in_EDH is None or dw_out_EFD is None else WeightGrads(dw_in_EDH, dw_out_EFD)
    return *(back or rows_back()), new
