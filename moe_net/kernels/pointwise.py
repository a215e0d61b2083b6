# pyright: basic
"""What is done to rows between grouped products, by torch; `device.rows` has the same functions in one pass each.

T tokens, K experts per token, P = T * K pairs sorted by expert (`routing`), D model width, F expert width, H columns of
the first projection (2F for SwiGLU: gate then up; F for GELU). Rows past the last pair may hold anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_net.kernels.routing import Routing, sort_pairs

__all__ = ["activate", "activate_backward_", "combine", "sort_pairs", "spread"]


def spread(x_TD: Tensor, routing: Routing, n_choices: int) -> Tensor:
    """[P, D], the row of each sorted pair."""
    return x_TD.index_select(0, routing.row_P)


def combine(
    pairs_PD: Tensor, routing: Routing, shape_TK: tuple[int, int], gates_TK: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """sum_k gate_tk * pairs[place_tk], [T, D], in the order of k: the same bits every time. No gates: all 1."""
    pairs_TKD = pairs_PD.index_select(0, routing.place_P.clamp(min=0)).view(*shape_TK, -1)
    # Rows of padding may hold NaN, which a gate of zero would not remove.
    pairs_TKD.masked_fill_((routing.place_P < 0).view(*shape_TK, 1), 0)
    if gates_TK is None:
        return pairs_TKD.sum(1), None
    return torch.bmm(gates_TK.to(pairs_PD.dtype).unsqueeze(1), pairs_TKD).squeeze(1), None


def activate(h_PH: Tensor, routing: Routing, *, gated: bool) -> Tensor:
    """[P, H] -> [P, F]."""
    if gated:
        gate_PF, up_PF = h_PH.chunk(2, dim=1)
        return F.silu(gate_PF).mul_(up_PF)
    return F.gelu(h_PH)


def activate_backward_(
    da_PF: Tensor, h_PH: Tensor, routing: Routing, gates_TK: Tensor, *, gated: bool
) -> tuple[Tensor, Tensor]:
    """(dh [P, H], dgates [T, K]), where `da` is the gradient without the gate and dh has it.

    `da` becomes gate * activation(h), what dw_out is made of.
    """
    a_PF = activate(h_PH, routing, gated=gated)
    # fp32 also beside bf16 rows: a gate's gradient is a sum over F.
    dgate_P = (da_PF * a_PF).sum(1, dtype=torch.promote_types(da_PF.dtype, torch.float32))
    dgates_TK = dgate_P.index_select(0, routing.place_P.clamp(min=0)).masked_fill_(routing.place_P < 0, 0)
    gate_P1 = gates_TK.reshape(-1).index_select(0, routing.pair_P).to(da_PF.dtype).unsqueeze(1)
    scaled_PF = da_PF * gate_P1
    if gated:
        gate_PF, up_PF = h_PH.chunk(2, dim=1)
        by_gate_PF = torch.ops.aten.silu_backward(scaled_PF * up_PF, gate_PF)
        dh_PH = torch.cat((by_gate_PF, F.silu(gate_PF).mul_(scaled_PF)), dim=1)
    else:
        dh_PH = torch.ops.aten.gelu_backward(scaled_PF, h_PH)
    torch.mul(a_PF, gate_P1, out=da_PF)
    return dh_PH, dgates_TK.view(gates_TK.shape)
