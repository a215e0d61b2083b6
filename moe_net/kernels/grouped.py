# pyright: basic
"""One grouped matrix product per projection (`torch.nn.functional.grouped_mm`), nothing that waits for the device.

T tokens, K experts per token, E experts, D model width, F expert width, H columns of the first projection
(2F for SwiGLU: gate then up; F for GELU), P = T * K (token, expert) pairs sorted by expert, padding last.

The number of padding pairs is known to the device alone, so tensors have all P rows: those after the last group are not
computed, hold anything, and are skipped where pairs meet their tokens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_net.kernels import pointwise
from moe_net.kernels.routing import Routing, merge
from moe_net.kernels.types import ExpertWeights, Saved, WeightCall, WeightGrads, Work, no_gradient, no_rows
from moe_net.types import Activation

NAME = "grouped"


def fits(x_TD: Tensor, weights: ExpertWeights) -> bool:
    """Whether grouped_mm takes these sizes: rows of D and F values must be multiples of 16 bytes, on any device."""
    item_bytes = x_TD.element_size()
    return x_TD.shape[1] * item_bytes % 16 == 0 and weights.w_out_EFD.shape[1] * item_bytes % 16 == 0


def _row_functions(x_TD: Tensor) -> ModuleType:
    """One Triton pass for each step between the products where there is Triton; torch elsewhere."""
    if x_TD.is_cuda and importlib.util.find_spec("triton") is not None:
        from moe_net.kernels.device import rows

        return rows
    return pointwise


def forward(
    x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, *, keep: bool
) -> tuple[Tensor, Saved | None]:
    """As `types.Backend.forward`."""
    if expert_ids_TK.numel() == 0:
        return torch.zeros_like(x_TD), None
    rows = _row_functions(x_TD)
    n_tokens, n_choices = expert_ids_TK.shape
    routing = rows.sort_pairs(expert_ids_TK, weights.w_in_EDH.shape[0])
    h_PH = F.grouped_mm(rows.spread(x_TD, routing, n_choices), weights.w_in_EDH, offs=routing.end_E)
    a_PF = rows.activate(h_PH, routing, gated=weights.activation is Activation.SWIGLU)
    y_PD = F.grouped_mm(a_PF, weights.w_out_EFD, offs=routing.end_E)
    y_TD, _ = rows.combine(y_PD, routing, (n_tokens, n_choices), gates_TK)
    return y_TD, Saved(NAME, routing, (h_PH,)) if keep else None


def _down(
    dy_TD: Tensor,
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    saved: Saved | None,
) -> tuple[Routing, Tensor, Tensor, Tensor, Tensor]:
    """(routing, dh [P, H] and activations [P, F], both with the gate, the rows of dy [P, D], dgates [T, K])."""
    rows = _row_functions(x_TD)
    n_choices = expert_ids_TK.shape[1]
    routing: Routing = rows.sort_pairs(expert_ids_TK, weights.w_in_EDH.shape[0]) if saved is None else saved.routing
    if saved is None:
        h_PH = F.grouped_mm(rows.spread(x_TD, routing, n_choices), weights.w_in_EDH, offs=routing.end_E)
    else:
        h_PH = saved.h_PH
    dy_PD = rows.spread(dy_TD, routing, n_choices)
    a_PF = F.grouped_mm(dy_PD, weights.w_out_EFD.transpose(1, 2), offs=routing.end_E)
    gated = weights.activation is Activation.SWIGLU
    dh_PH, dgates_TK = rows.activate_backward_(a_PF, h_PH, routing, gates_TK, gated=gated)
    if saved is not None:
        saved.release()
    return routing, dh_PH, a_PF, dy_PD, dgates_TK.to(gates_TK.dtype)


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
    """As `types.Backend.backward_rows`; where the gate enters is explained in `loop.backward_rows`."""
    if expert_ids_TK.numel() == 0:
        return no_rows(x_TD, gates_TK, NAME)
    routing, dh_PH, a_PF, dy_PD, dgates_TK = _down(dy_TD, x_TD, expert_ids_TK, gates_TK, weights, saved)
    del dy_PD  # as large as dx's rows
    dx_TD = None
    if rows:
        dx_PD = F.grouped_mm(dh_PH, weights.w_in_EDH.transpose(1, 2), offs=routing.end_E)
        n_tokens, n_choices = expert_ids_TK.shape
        dx_TD, _ = _row_functions(x_TD).combine(dx_PD, routing, (n_tokens, n_choices), None)
    return dx_TD, dgates_TK, Work(NAME, routing, None, (a_PF,), (dh_PH,))


def weight_grads(
    calls: Sequence[WeightCall], weights: ExpertWeights, *, into: WeightGrads | None = None
) -> WeightGrads:
    """As `types.Backend.weight_grads`, in the weights' dtype."""
    rows = _row_functions(calls[0].x_TD)
    dy_TD, x_TD, n_choices, routing, a_PF, dh_PH = merge(calls, weights.w_in_EDH.shape[0], rows.sort_pairs)
    dw_out_EFD = F.grouped_mm(a_PF.t(), rows.spread(dy_TD, routing, n_choices), offs=routing.end_E)
    del a_PF, dy_TD
    dw_in_EDH = F.grouped_mm(rows.spread(x_TD, routing, n_choices).t(), dh_PH, offs=routing.end_E)
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
    rows = _row_functions(x_TD)
    n_tokens, n_choices = expert_ids_TK.shape
    routing, dh_PH, a_PF, dy_PD, dgates_TK = _down(dy_TD, x_TD, expert_ids_TK, gates_TK, weights, saved)
    end_E, new = routing.end_E, None
    if fresh:
        dw_out_EFD = F.grouped_mm(a_PF.t(), dy_PD, offs=end_E)
    # What is large goes as soon as it is used: the peak is here.
    del a_PF, dy_PD
    if fresh:
        dw_in_EDH = F.grouped_mm(rows.spread(x_TD, routing, n_choices).t(), dh_PH, offs=end_E)
        new = WeightGrads(dw_in_EDH, dw_out_EFD)
    dx_PD = F.grouped_mm(dh_PH, weights.w_in_EDH.transpose(1, 2), offs=end_E)
    del dh_PH
    return rows.combine(dx_PD, routing, (n_tokens, n_choices), None)[0], dgates_TK, new
