# pyright: basic
"""One grouped matrix product per projection (`torch.nn.functional.grouped_mm`), nothing that waits for the device.

T tokens, K experts per token, E experts, D model width, F expert width, H columns of the first projection
(2F for SwiGLU: gate then up; F for GELU), P = T * K (token, expert) pairs sorted by expert, padding last.

The number of padding pairs is known to the device alone, so tensors have all P rows: those after the last group are not
computed, hold anything, and are masked where pairs meet their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_net.kernels.types import ExpertWeights, Saved, WeightGrads
from moe_net.types import Activation

NAME = "grouped"


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The pairs of a call, sorted by expert; padding last."""

    pair_P: Tensor
    """Position t * K + k of each sorted pair."""
    row_P: Tensor
    """Its token t."""
    place_P: Tensor
    """The inverse of `pair_P`."""
    end_E: Tensor
    """int32, where each expert's pairs end."""
    padding_TK: Tensor
    """True where there is no expert."""


def fits(x_TD: Tensor, weights: ExpertWeights) -> bool:
    """Whether grouped_mm takes these sizes: rows of D and F values must be multiples of 16 bytes, on any device."""
    item_bytes = x_TD.element_size()
    return x_TD.shape[1] * item_bytes % 16 == 0 and weights.w_out_EFD.shape[1] * item_bytes % 16 == 0


def sort_pairs(expert_ids_TK: Tensor, n_experts: int) -> Routing:
    """Stable sort of the pairs by expert, on the device. Ids outside 0..n_experts-1 are padding."""
    n_choices = max(1, expert_ids_TK.shape[1])
    padding_TK = (expert_ids_TK < 0) | (expert_ids_TK >= n_experts)
    key_P, pair_P = torch.sort(expert_ids_TK.masked_fill(padding_TK, n_experts).view(-1), stable=True)
    expert_E = torch.arange(n_experts, device=key_P.device, dtype=key_P.dtype)
    place_P = torch.empty_like(pair_P)
    place_P[pair_P] = torch.arange(pair_P.numel(), device=pair_P.device)
    return Routing(
        pair_P=pair_P,
        row_P=pair_P // n_choices,
        place_P=place_P,
        end_E=torch.searchsorted(key_P, expert_E, right=True, out_int32=True),
        padding_TK=padding_TK,
    )


def _combine(pairs_PD: Tensor, routing: Routing, gates_TK: Tensor) -> Tensor:
    """sum_k gate_tk * pairs[place_tk] -> [T, D], in the order of k: a gather, so the same bits every time."""
    n_tokens, n_choices = gates_TK.shape
    pairs_TKD = pairs_PD.index_select(0, routing.place_P).view(n_tokens, n_choices, -1)
    # Rows of padding were never written and may hold NaN, which a gate of zero would not remove.
    pairs_TKD.masked_fill_(routing.padding_TK.unsqueeze(2), 0)
    return torch.bmm(gates_TK.to(pairs_PD.dtype).unsqueeze(1), pairs_TKD).squeeze(1)


def _activate(h_PH: Tensor, activation: Activation) -> Tensor:
    if activation is Activation.SWIGLU:
        gate_PF, up_PF = h_PH.chunk(2, dim=1)
        return F.silu(gate_PF).mul_(up_PF)
    return F.gelu(h_PH)


def _activate_backward(da_PF: Tensor, h_PH: Tensor, activation: Activation) -> Tensor:
    if activation is Activation.SWIGLU:
        gate_PF, up_PF = h_PH.chunk(2, dim=1)
        dgate_PF = torch.ops.aten.silu_backward(da_PF * up_PF, gate_PF)
        return torch.cat((dgate_PF, F.silu(gate_PF).mul_(da_PF)), dim=1)
    return torch.ops.aten.gelu_backward(da_PF, h_PH)


def forward(
    x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, *, keep: bool
) -> tuple[Tensor, Saved | None]:
    """As `dispatch.moe_ffn_forward`."""
    if expert_ids_TK.numel() == 0:
        return torch.zeros_like(x_TD), None
    routing = sort_pairs(expert_ids_TK, weights.w_in_EDH.shape[0])
    x_PD = x_TD.index_select(0, routing.row_P)
    h_PH = F.grouped_mm(x_PD, weights.w_in_EDH, offs=routing.end_E)
    y_PD = F.grouped_mm(_activate(h_PH, weights.activation), weights.w_out_EFD, offs=routing.end_E)
    return _combine(y_PD, routing, gates_TK), Saved(NAME, routing, h_PH) if keep else None


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    saved: Saved | None,
    *,
    weight_grads: WeightGrads | None,
) -> tuple[Tensor, Tensor]:
    """As `dispatch.moe_ffn_backward`; where the gate enters is explained in `loop.backward`."""
    if expert_ids_TK.numel() == 0:
        return torch.zeros_like(x_TD), torch.zeros_like(gates_TK)
    routing: Routing = sort_pairs(expert_ids_TK, weights.w_in_EDH.shape[0]) if saved is None else saved.routing
    end_E = routing.end_E
    if saved is None:
        h_PH = F.grouped_mm(x_TD.index_select(0, routing.row_P), weights.w_in_EDH, offs=end_E)
    else:
        h_PH = saved.h_PH
    a_PF = _activate(h_PH, weights.activation)
    dy_PD = dy_TD.index_select(0, routing.row_P)
    da_PF = F.grouped_mm(dy_PD, weights.w_out_EFD.transpose(1, 2), offs=end_E)
    # fp32 also beside bf16 rows: a gate's gradient is a sum over F.
    dgate_P = (da_PF * a_PF).sum(1, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    dgates_TK = dgate_P.index_select(0, routing.place_P).view(gates_TK.shape).masked_fill_(routing.padding_TK, 0)
    dh_PH = _activate_backward(da_PF, h_PH, weights.activation)
    dx_PD = F.grouped_mm(dh_PH, weights.w_in_EDH.transpose(1, 2), offs=end_E)
    if weight_grads is not None:
        gate_P1 = gates_TK.reshape(-1).index_select(0, routing.pair_P).to(x_TD.dtype).unsqueeze(1)
        x_PD = x_TD.index_select(0, routing.row_P).mul_(gate_P1)
        weight_grads.w_out_EFD.add_(F.grouped_mm(a_PF.t(), dy_PD.mul_(gate_P1), offs=end_E))
        weight_grads.w_in_EDH.add_(F.grouped_mm(x_PD.t(), dh_PH, offs=end_E))
    return _combine(dx_PD, routing, gates_TK), dgates_TK.to(gates_TK.dtype)
