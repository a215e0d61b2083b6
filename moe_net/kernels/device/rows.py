# pyright: basic, reportCallIssue=false
"""What is done to rows between the products, one launch and one pass over memory each.

T tokens, K experts per token, P = T * K pairs sorted by expert (`routing`), D model width, F expert width, H columns of
the first projection. Rows past the last pair are neither read nor written. Sums are fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_net.kernels.device.activation import gelu, gelu_slope, swiglu, swiglu_slopes
from moe_net.kernels.device.routing import sort_pairs
from moe_net.kernels.device.sizes import ceil_div, power_of_2
from moe_net.kernels.routing import Routing

__all__ = ["activate", "activate_backward_", "combine", "sort_pairs", "spread"]


@triton.jit(do_not_specialize=["n_tokens"])
def _spread(x_ptr, place_ptr, out_ptr, n_tokens, width, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for first in range(0, width, BLOCK):
        column_B = first + tl.arange(0, BLOCK)
        inside_B = column_B < width
        x_B = tl.load(x_ptr + token * width + column_B, mask=inside_B)
        for choice in range(CHOICES):
            place = tl.load(place_ptr + token * CHOICES + choice).to(tl.int64)
            tl.store(out_ptr + place * width + column_B, x_B, mask=inside_B & (place >= 0))


def spread(x_TD: Tensor, routing: Routing, n_choices: int) -> Tensor:
    """[P, D], the row of each sorted pair. Reads every token once: a gather by pair would read it K times."""
    n_tokens, width = x_TD.shape
    out_PD = torch.empty((routing.row_P.numel(), width), dtype=x_TD.dtype, device=x_TD.device)
    block = min(2048, power_of_2(width))
    _spread[(n_tokens,)](x_TD, routing.place_P, out_PD, n_tokens, width, n_choices, block, num_warps=4)
    return out_PD


@triton.jit(do_not_specialize=["n_tokens"])
def _combine(
    pairs_ptr, place_ptr, gate_ptr, partial_ptr, dgate_ptr, y_ptr, n_tokens, width, n_partials,
    CHOICES: tl.constexpr, GATED: tl.constexpr, PARTIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_B = column_B < width
    sum_B = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        place = tl.load(place_ptr + token * CHOICES + choice).to(tl.int64)
        row_B = tl.load(pairs_ptr + place * width + column_B, mask=inside_B & (place >= 0), other=0.0).to(tl.float32)
        if GATED:
            row_B *= tl.load(gate_ptr + token * CHOICES + choice).to(tl.float32)
        sum_B += row_B
        if PARTIALS > 0:
            part_N = tl.arange(0, PARTIALS)
            at_N = place * n_partials + part_N
            known_N = (part_N < n_partials) & (place >= 0)
            dgate = tl.sum(tl.load(partial_ptr + at_N, mask=known_N, other=0.0), 0)
            tl.store(dgate_ptr + token * CHOICES + choice, dgate, mask=tl.program_id(1) == 0)
    tl.store(y_ptr + token * width + column_B, sum_B, mask=inside_B)


def combine(
    pairs_PD: Tensor,
    routing: Routing,
    shape_TK: tuple[int, int],
    gates_TK: Tensor | None,
    partial_PN: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """sum_k gate_tk * pairs[place_tk], [T, D], in the order of k: the same bits every time. No gates: all 1.

    With `partial_PN`, parts of the gates' gradients by pair, also their sums [T, K] in fp32.
    """
    n_tokens, n_choices = shape_TK
    width = pairs_PD.shape[1]
    y_TD = torch.empty((n_tokens, width), dtype=pairs_PD.dtype, device=pairs_PD.device)
    dgates_TK, n_partials = None, 0
    if partial_PN is not None:
        n_partials = partial_PN.shape[1]
        dgates_TK = torch.empty(shape_TK, dtype=torch.float32, device=pairs_PD.device)
    block = min(1024, power_of_2(width))
    _combine[(n_tokens, ceil_div(width, block))](
        pairs_PD,
        routing.place_P,
        pairs_PD if gates_TK is None else gates_TK,
        pairs_PD if partial_PN is None else partial_PN,
        pairs_PD if dgates_TK is None else dgates_TK,
        y_TD,
        n_tokens,
        width,
        n_partials,
        n_choices,
        gates_TK is not None,
        power_of_2(n_partials) if n_partials else 0,
        block,
        num_warps=4,
    )
    return y_TD, dgates_TK


@triton.jit(do_not_specialize=["n_pairs"])
def _activate(h_ptr, a_ptr, end_ptr, n_pairs, d_ff, n_experts, GATED: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    if pair < tl.load(end_ptr + n_experts - 1):
        column_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside_B = column_B < d_ff
        if GATED:
            gate_B = tl.load(h_ptr + pair * 2 * d_ff + column_B, mask=inside_B, other=0.0).to(tl.float32)
            up_B = tl.load(h_ptr + pair * 2 * d_ff + d_ff + column_B, mask=inside_B, other=0.0).to(tl.float32)
            a_B = swiglu(gate_B, up_B)
        else:
            a_B = gelu(tl.load(h_ptr + pair * d_ff + column_B, mask=inside_B, other=0.0).to(tl.float32))
        tl.store(a_ptr + pair * d_ff + column_B, a_B, mask=inside_B)


def activate(h_PH: Tensor, routing: Routing, *, gated: bool) -> Tensor:
    """[P, H] -> [P, F]."""
    n_pairs, d_ff = h_PH.shape[0], h_PH.shape[1] // (2 if gated else 1)
    a_PF = torch.empty((n_pairs, d_ff), dtype=h_PH.dtype, device=h_PH.device)
    block = min(1024, power_of_2(d_ff))
    grid = (n_pairs, ceil_div(d_ff, block))
    _activate[grid](h_PH, a_PF, routing.end_E, n_pairs, d_ff, routing.end_E.numel(), gated, block, num_warps=4)
    return a_PF


@triton.jit(do_not_specialize=["n_pairs"])
def _activate_backward(
    da_ptr, h_ptr, dh_ptr, gate_ptr, dgate_ptr, pair_ptr, end_ptr, n_pairs, d_ff, n_experts,
    GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    if place < tl.load(end_ptr + n_experts - 1):
        pair = tl.load(pair_ptr + place)
        scale = tl.load(gate_ptr + pair).to(tl.float32)
        sum_B = tl.zeros([BLOCK], tl.float32)
        for first in range(0, d_ff, BLOCK):
            column_B = first + tl.arange(0, BLOCK)
            inside_B = column_B < d_ff
            da_B = tl.load(da_ptr + place * d_ff + column_B, mask=inside_B, other=0.0).to(tl.float32)
            scaled_B = da_B * scale
            if GATED:
                at_B = place * 2 * d_ff + column_B
                gate_B = tl.load(h_ptr + at_B, mask=inside_B, other=0.0).to(tl.float32)
                up_B = tl.load(h_ptr + at_B + d_ff, mask=inside_B, other=0.0).to(tl.float32)
                a_B = swiglu(gate_B, up_B)
                by_gate_B, by_up_B = swiglu_slopes(gate_B, up_B)
                tl.store(dh_ptr + at_B, scaled_B * by_gate_B, mask=inside_B)
                tl.store(dh_ptr + at_B + d_ff, scaled_B * by_up_B, mask=inside_B)
            else:
                h_B = tl.load(h_ptr + place * d_ff + column_B, mask=inside_B, other=0.0).to(tl.float32)
                a_B = gelu(h_B)
                tl.store(dh_ptr + place * d_ff + column_B, scaled_B * gelu_slope(h_B), mask=inside_B)
            sum_B += da_B * a_B
            # Over da, which nobody needs any more: the weights' gradient takes the activation times the gate.
            tl.store(da_ptr + place * d_ff + column_B, a_B * scale, mask=inside_B)
        tl.store(dgate_ptr + pair, tl.sum(sum_B, 0))


def activate_backward_(
    da_PF: Tensor, h_PH: Tensor, routing: Routing, gates_TK: Tensor, *, gated: bool
) -> tuple[Tensor, Tensor]:
    """(dh [P, H], dgates [T, K] in fp32), where `da` is the gradient without the gate and dh has it.

    `da` becomes gate * activation(h), what dw_out is made of.
    """
    n_pairs, d_ff = da_PF.shape
    dh_PH = torch.empty_like(h_PH)
    dgates_TK = torch.zeros(gates_TK.shape, dtype=torch.float32, device=da_PF.device)
    block = min(1024, power_of_2(d_ff))
    _activate_backward[(n_pairs,)](
        da_PF, h_PH, dh_PH, gates_TK, dgates_TK, routing.pair_P, routing.end_E, n_pairs, d_ff, routing.end_E.numel(),
        gated, block, num_warps=4,
    )  # fmt: skip
    return dh_PH, dgates_TK
