# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
"""Grouped matrix products with the gather in front and the activation behind them, for any CUDA GPU.

T tokens, K experts per token, P = T * K pairs sorted by expert (`routing`), E experts, D model width, F expert width,
H columns of the first projection (2F for SwiGLU: gate then up; F for GELU). M, N: a program's tile of rows and columns.

Every grid is bounded by what P and E allow at most, since only the device knows the counts; programs without a tile
return at once. Products are summed in fp32 (fp32 inputs: in full, not as tf32).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_net.kernels.device.activation import gelu, gelu_slope, swiglu, swiglu_slopes
from moe_net.kernels.device.sizes import ceil_div, power_of_2
from moe_net.kernels.routing import Routing


class Tile(NamedTuple):
    """How a program cuts its product."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    if PRECISION == "interpreter":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _find_tile(end_ptr, tile, n_experts, M: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, its first pair of this tile, its end); expert = n_experts or more: there is no such tile."""
    expert_E = tl.arange(0, EXPERTS)
    known_E = expert_E < n_experts
    end_E = tl.load(end_ptr + expert_E, mask=known_E, other=0)
    start_E = tl.load(end_ptr + expert_E - 1, mask=known_E & (expert_E > 0), other=0)
    tiles_E = tl.where(known_E, (end_E - start_E + M - 1) // M, 0)
    last_E = tl.cumsum(tiles_E, 0)
    expert = tl.sum((last_E <= tile).to(tl.int32), 0)
    mine_E = expert_E == expert
    first = tl.sum(tl.where(mine_E, start_E + (tile - (last_E - tiles_E)) * M, 0), 0)
    end = tl.sum(tl.where(mine_E, end_E, 0), 0)
    return expert, first, end  # pyright: ignore[reportReturnType]


@triton.jit(do_not_specialize=["n_column_tiles"])
def _up(
    x_ptr, w_ptr, pair_ptr, end_ptr, h_ptr, a_ptr, d_model, d_ff, stride_k, stride_n, n_experts, n_column_tiles,
    CHOICES: tl.constexpr, GATED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    EXPERTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert, first, end = _find_tile(end_ptr, tl.program_id(0) // n_column_tiles, n_experts, M, EXPERTS)
    if expert < n_experts:
        d_hidden = 2 * d_ff if GATED else d_ff
        place_M = first + tl.arange(0, M)
        row_M = (tl.load(pair_ptr + place_M, mask=place_M < end, other=0) // CHOICES).to(tl.int64)
        column_N = (tl.program_id(0) % n_column_tiles) * N + tl.arange(0, N)
        k_K = tl.arange(0, K)
        x_MK = x_ptr + row_M[:, None] * d_model + k_K[None, :]
        w_KN = w_ptr + expert.to(tl.int64) * d_model * d_hidden + k_K[:, None] * stride_k + column_N[None, :] * stride_n
        gate_MN = tl.zeros([M, N], tl.float32)
        up_MN = tl.zeros([M, N], tl.float32)
        inside_M, inside_N = place_M < end, column_N < d_ff
        for k in range(0, d_model, K):
            inside_K = k + k_K < d_model
            x = tl.load(x_MK + k, mask=inside_M[:, None] & inside_K[None, :], other=0.0)
            w = tl.load(w_KN + k * stride_k, mask=inside_K[:, None] & inside_N[None, :], other=0.0)
            gate_MN = _dot(x, w, gate_MN, PRECISION)
            if GATED:
                w = tl.load(
                    w_KN + k * stride_k + d_ff * stride_n, mask=inside_K[:, None] & inside_N[None, :], other=0.0
                )
                up_MN = _dot(x, w, up_MN, PRECISION)
        inside_MN = inside_M[:, None] & inside_N[None, :]
        place_M = place_M.to(tl.int64)
        h_MN = h_ptr + place_M[:, None] * d_hidden + column_N[None, :]
        tl.store(h_MN, gate_MN, mask=inside_MN)
        # From the rounded pre-activations, as the backward will see them.
        gate_MN = gate_MN.to(h_ptr.dtype.element_ty).to(tl.float32)
        if GATED:
            tl.store(h_MN + d_ff, up_MN, mask=inside_MN)
            a_MN = swiglu(gate_MN, up_MN.to(h_ptr.dtype.element_ty).to(tl.float32))
        else:
            a_MN = gelu(gate_MN)
        tl.store(a_ptr + place_M[:, None] * d_ff + column_N[None, :], a_MN, mask=inside_MN)


@triton.jit(do_not_specialize=["n_column_tiles"])
def _rows(
    a_ptr, w_ptr, end_ptr, out_ptr, d_in, d_out, stride_e, stride_k, stride_n, n_experts, n_column_tiles,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert, first, end = _find_tile(end_ptr, tl.program_id(0) // n_column_tiles, n_experts, M, EXPERTS)
    if expert < n_experts:
        place_M = (first + tl.arange(0, M)).to(tl.int64)
        column_N = (tl.program_id(0) % n_column_tiles) * N + tl.arange(0, N)
        k_K = tl.arange(0, K)
        a_MK = a_ptr + place_M[:, None] * d_in + k_K[None, :]
        w_KN = w_ptr + expert.to(tl.int64) * stride_e + k_K[:, None] * stride_k + column_N[None, :] * stride_n
        sum_MN = tl.zeros([M, N], tl.float32)
        inside_M, inside_N = place_M < end, column_N < d_out
        for k in range(0, d_in, K):
            inside_K = k + k_K < d_in
            a = tl.load(a_MK + k, mask=inside_M[:, None] & inside_K[None, :], other=0.0)
            w = tl.load(w_KN + k * stride_k, mask=inside_K[:, None] & inside_N[None, :], other=0.0)
            sum_MN = _dot(a, w, sum_MN, PRECISION)
        out_MN = out_ptr + place_M[:, None] * d_out + column_N[None, :]
        tl.store(out_MN, sum_MN, mask=inside_M[:, None] & inside_N[None, :])


@triton.jit(do_not_specialize=["n_column_tiles"])
def _down_backward(
    dy_ptr, w_ptr, pair_ptr, end_ptr, gate_ptr, h_ptr, dh_ptr, a_ptr, partial_ptr,
    d_model, d_ff, n_experts, n_column_tiles,
    CHOICES: tl.constexpr, GATED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    EXPERTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert, first, end = _find_tile(end_ptr, tl.program_id(0) // n_column_tiles, n_experts, M, EXPERTS)
    if expert < n_experts:
        column_tile = tl.program_id(0) % n_column_tiles
        place_M = first + tl.arange(0, M)
        inside_M = place_M < end
        pair_M = tl.load(pair_ptr + place_M, mask=inside_M, other=0)
        row_M = (pair_M // CHOICES).to(tl.int64)
        column_N = column_tile * N + tl.arange(0, N)
        k_K = tl.arange(0, K)
        dy_MK = dy_ptr + row_M[:, None] * d_model + k_K[None, :]
        w_KN = w_ptr + expert.to(tl.int64) * d_ff * d_model + column_N[None, :] * d_model + k_K[:, None]
        da_MN = tl.zeros([M, N], tl.float32)
        inside_N = column_N < d_ff
        for k in range(0, d_model, K):
            inside_K = k + k_K < d_model
            dy = tl.load(dy_MK + k, mask=inside_M[:, None] & inside_K[None, :], other=0.0)
            w = tl.load(w_KN + k, mask=inside_K[:, None] & inside_N[None, :], other=0.0)
            da_MN = _dot(dy, w, da_MN, PRECISION)
        d_hidden = 2 * d_ff if GATED else d_ff
        inside_MN = inside_M[:, None] & inside_N[None, :]
        place_M = place_M.to(tl.int64)
        at_MN = place_M[:, None] * d_hidden + column_N[None, :]
        scale_M = tl.load(gate_ptr + pair_M, mask=inside_M, other=0.0).to(tl.float32)
        scaled_MN = da_MN * scale_M[:, None]
        if GATED:
            gate_MN = tl.load(h_ptr + at_MN, mask=inside_MN, other=0.0).to(tl.float32)
            up_MN = tl.load(h_ptr + at_MN + d_ff, mask=inside_MN, other=0.0).to(tl.float32)
            act_MN = swiglu(gate_MN, up_MN)
            by_gate_MN, by_up_MN = swiglu_slopes(gate_MN, up_MN)
            tl.store(dh_ptr + at_MN, scaled_MN * by_gate_MN, mask=inside_MN)
            tl.store(dh_ptr + at_MN + d_ff, scaled_MN * by_up_MN, mask=inside_MN)
        else:
            h_MN = tl.load(h_ptr + at_MN, mask=inside_MN, other=0.0).to(tl.float32)
            act_MN = gelu(h_MN)
            tl.store(dh_ptr + at_MN, scaled_MN * gelu_slope(h_MN), mask=inside_MN)
        tl.store(a_ptr + place_M[:, None] * d_ff + column_N[None, :], act_MN * scale_M[:, None], mask=inside_MN)
        tl.store(partial_ptr + place_M * n_column_tiles + column_tile, tl.sum(da_MN * act_MN, 1), mask=inside_M)


@triton.jit
def _weights(
    a_ptr, b_ptr, pair_ptr, end_ptr, out_ptr, d_a, d_b, stride_m, stride_n,
    CHOICES: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    end = tl.load(end_ptr + expert)
    start = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    n_column_tiles = tl.cdiv(d_b, N)
    m_M = (tl.program_id(0) // n_column_tiles) * M + tl.arange(0, M)
    n_N = (tl.program_id(0) % n_column_tiles) * N + tl.arange(0, N)
    inside_M, inside_N = m_M < d_a, n_N < d_b
    sum_MN = tl.zeros([M, N], tl.float32)
    for first in range(start, end, K):
        place_K = first + tl.arange(0, K)
        inside_K = place_K < end
        a_K, b_K = place_K.to(tl.int64), place_K.to(tl.int64)
        if GATHER_A:
            a_K = (tl.load(pair_ptr + place_K, mask=inside_K, other=0) // CHOICES).to(tl.int64)
        if GATHER_B:
            b_K = (tl.load(pair_ptr + place_K, mask=inside_K, other=0) // CHOICES).to(tl.int64)
        a = tl.load(a_ptr + a_K[None, :] * d_a + m_M[:, None], mask=inside_M[:, None] & inside_K[None, :], other=0.0)
        b = tl.load(b_ptr + b_K[:, None] * d_b + n_N[None, :], mask=inside_K[:, None] & inside_N[None, :], other=0.0)
        sum_MN = _dot(a, b, sum_MN, PRECISION)
    out_MN = (
        out_ptr
        + expert.to(tl.int64) * d_a * d_b
        + m_M.to(tl.int64)[:, None] * stride_m
        + n_N.to(tl.int64)[None, :] * stride_n
    )
    inside_MN = inside_M[:, None] & inside_N[None, :]
    tl.store(out_MN, sum_MN, mask=inside_MN)


def choose_tile(kind: str, n_pairs: int, n_experts: int, item_bytes: int) -> Tile:
    """Measured on an H200 (docs/kernels.md); other cards run them too, since they fit 96 KiB.

    A row tile holds twice what an expert gets on average: with just the average, half of the experts need two tiles and
    read their weights twice (121 against 100 us for both `rows` of the 256-token server shape).
    """
    if item_bytes > 2:
        return Tile(32, 32, 32, 4, 2)
    m = min(128, max(16, power_of_2(ceil_div(2 * n_pairs, n_experts))))
    if kind == "weights":
        return Tile(128, 128, 64, 8, 3) if m == 128 else Tile(64, 128, 32, 4, 2)
    return Tile(m, 128, 64, 8, 3) if m == 128 else Tile(m, 64, 64, 4, 4)


def _precision(x: Tensor) -> str:
    if not x.is_cuda:
        return "interpreter"  # whose products take bf16 for integers
    return "ieee" if x.dtype is torch.float32 else "tf32"


def _most_tiles(n_pairs: int, n_experts: int, m: int) -> int:
    """No routing of P pairs to E experts fills more row tiles."""
    used = min(n_pairs, n_experts)
    return used + (n_pairs - used) // m


def up(x_TD: Tensor, w_in_EDH: Tensor, routing: Routing, n_choices: int, *, gated: bool) -> tuple[Tensor, Tensor]:
    """(h [P, H], activation(h) [P, F]) with h = x[token] @ w_in."""
    n_pairs, n_experts = routing.pair_P.numel(), w_in_EDH.shape[0]
    d_model, d_hidden = w_in_EDH.shape[1:]
    d_ff = d_hidden // 2 if gated else d_hidden
    h_PH = torch.empty((n_pairs, d_hidden), dtype=x_TD.dtype, device=x_TD.device)
    a_PF = torch.empty((n_pairs, d_ff), dtype=x_TD.dtype, device=x_TD.device)
    tile = choose_tile("up", n_pairs, n_experts, x_TD.element_size())
    n_column_tiles = ceil_div(d_ff, tile.n)
    _up[(_most_tiles(n_pairs, n_experts, tile.m) * n_column_tiles,)](
        x_TD, w_in_EDH, routing.pair_P, routing.end_E, h_PH, a_PF, d_model, d_ff, *w_in_EDH.stride()[1:],
        n_experts, n_column_tiles, n_choices, gated, tile.m, tile.n, tile.k, power_of_2(n_experts), _precision(x_TD),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return h_PH, a_PF


def rows(a_PK: Tensor, w_EKN: Tensor, routing: Routing) -> Tensor:
    """[P, N]: each pair's row times its expert's matrix; `w` may be a transposed view."""
    n_pairs, n_experts = a_PK.shape[0], w_EKN.shape[0]
    d_in, d_out = w_EKN.shape[1:]
    out_PN = torch.empty((n_pairs, d_out), dtype=a_PK.dtype, device=a_PK.device)
    tile = choose_tile("rows", n_pairs, n_experts, a_PK.element_size())
    n_column_tiles = ceil_div(d_out, tile.n)
    _rows[(_most_tiles(n_pairs, n_experts, tile.m) * n_column_tiles,)](
        a_PK, w_EKN, routing.end_E, out_PN, d_in, d_out, *w_EKN.stride(), n_experts, n_column_tiles,
        tile.m, tile.n, tile.k, power_of_2(n_experts), _precision(a_PK),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_PN


def down_backward(
    dy_TD: Tensor, w_out_EFD: Tensor, h_PH: Tensor, gates_TK: Tensor, routing: Routing, *, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh [P, H] with the gate, gate * activation(h) [P, F], parts of the gates' gradients [P, N] in fp32)."""
    n_pairs, n_experts = routing.pair_P.numel(), w_out_EFD.shape[0]
    d_ff, d_model = w_out_EFD.shape[1:]
    dh_PH = torch.empty_like(h_PH)
    a_PF = torch.empty((n_pairs, d_ff), dtype=h_PH.dtype, device=h_PH.device)
    tile = choose_tile("down_backward", n_pairs, n_experts, h_PH.element_size())
    n_column_tiles = ceil_div(d_ff, tile.n)
    partial_PN = torch.empty((n_pairs, n_column_tiles), dtype=torch.float32, device=h_PH.device)
    _down_backward[(_most_tiles(n_pairs, n_experts, tile.m) * n_column_tiles,)](
        dy_TD, w_out_EFD, routing.pair_P, routing.end_E, gates_TK, h_PH, dh_PH, a_PF, partial_PN,
        d_model, d_ff, n_experts, n_column_tiles,
        gates_TK.shape[1], gated, tile.m, tile.n, tile.k, power_of_2(n_experts), _precision(h_PH),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dh_PH, a_PF, partial_PN


def weights(a: Tensor, b: Tensor, out_EMN: Tensor, routing: Routing, n_choices: int, *, gather: str) -> None:
    """out[e] = sum over e's pairs of a_p^T b_p, zero without a pair; `gather` "a" or "b" says which one has rows of
    tokens."""
    n_experts, d_a, d_b = out_EMN.shape
    tile = choose_tile("weights", routing.pair_P.numel(), n_experts, a.element_size())
    _weights[(ceil_div(d_a, tile.m) * ceil_div(d_b, tile.n), n_experts)](
        a, b, routing.pair_P, routing.end_E, out_EMN, d_a, d_b, *out_EMN.stride()[1:],
        n_choices, gather == "a", gather == "b", tile.m, tile.n, tile.k, _precision(a),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
