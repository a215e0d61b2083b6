# pyright: basic
"""One matrix product per expert, on blocks of sorted rows. The fastest on a CPU (numbers in `dispatch`).

T tokens, K experts per token, E experts, D model width, F expert width, H columns of the first projection
(2F for SwiGLU: gate then up; F for GELU), P (token, expert) pairs that have an expert, sorted by expert; n of them
with one expert.

Where the time goes beside the products, and what is done about it:
- gates are never multiplied into [P, F] tensors, only into [P, D] ones, or inside the weighted gather-sum;
- the sum over a token's experts is one fused gather-sum (`embedding_bag`), in a fixed order: same bits every time;
- large products go to oneDNN where that is faster (`onednn`), into new tensors;
- else scratch of the largest expert's size serves all experts;
- weights' gradients are one product for each expert, over the rows of all calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_net.kernels.onednn import has_fast, padded, product, product_into
from moe_net.kernels.types import ExpertWeights, Saved, WeightCall, WeightGrads, Work
from moe_net.types import Activation

NAME = "loop"
_aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The pairs of a call, sorted by expert, padding left out."""

    pair_P: Tensor
    """Position t * K + k of each sorted pair."""
    row_P: Tensor
    """Its token t."""
    place_TK: Tensor
    """The inverse: where pair (t, k) stands among the sorted ones; P for padding."""
    blocks: tuple[tuple[int, int, int], ...]
    """(expert, first, end) of every expert that has pairs."""

    @property
    def largest(self) -> int:
        """Rows that scratch has to have, for any expert."""
        return max((padded(end - first) for _, first, end in self.blocks), default=0)


def sort_pairs(expert_ids_TK: Tensor, n_experts: int) -> Routing:
    """Stable sort of the pairs by expert. ValueError for an id outside -1..n_experts-1. Waits for the device."""
    ids = expert_ids_TK.reshape(-1).cpu().numpy()
    if ids.size and not (ids.min() >= -1 and ids.max() < n_experts):
        raise ValueError(f"expert ids must lie in -1..{n_experts - 1}, not {ids.min()}..{ids.max()}")
    # 16-bit keys: numpy sorts those by radix.
    keys = ids.astype(np.int16) if n_experts < 2**15 else ids
    count_E = np.bincount(keys + 1, minlength=n_experts + 1)
    n_padding = int(count_E[0])
    pair_P = np.argsort(keys, kind="stable")[n_padding:]
    place = np.full(ids.size, pair_P.size, dtype=np.int64)
    place[pair_P] = np.arange(pair_P.size)
    ends = np.cumsum(count_E[1:]).tolist()
    starts = [0, *ends[:-1]]
    device = expert_ids_TK.device
    return Routing(
        pair_P=torch.from_numpy(pair_P).to(device),
        row_P=torch.from_numpy(pair_P // max(1, expert_ids_TK.shape[1])).to(device),
        place_TK=torch.from_numpy(place).view(expert_ids_TK.shape).to(device),
        blocks=tuple((e, starts[e], ends[e]) for e in range(n_experts) if ends[e] > starts[e]),
    )


def _combine(pairs_QD: Tensor, routing: Routing, gates_TK: Tensor) -> Tensor:
    """sum_k gate_tk * pairs[place_tk] -> [T, D]; the last of the Q = P + 1 rows is set to zero and is padding's."""
    pairs_QD[-1].zero_()
    gates_TK = gates_TK.to(pairs_QD.dtype)
    return F.embedding_bag(routing.place_TK, pairs_QD, per_sample_weights=gates_TK, mode="sum")


def _gather(x_TD: Tensor, row_n: Tensor, scratch_nD: Tensor) -> Tensor:
    """Rows into scratch; zeros into what it has beyond them."""
    n = row_n.numel()
    torch.index_select(x_TD, 0, row_n, out=scratch_nD[:n])
    if scratch_nD.shape[0] > n:
        scratch_nD[n:].zero_()
    return scratch_nD


def _aligned(n: int, d_hidden: int) -> int:
    """Rows after which the next ones begin at a cache line: elsewhere MKL's products may have other bits."""
    step = 16 // math.gcd(16, d_hidden)
    return -(-n // step) * step


def forward(
    x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, *, keep: bool
) -> tuple[Tensor, Saved | None]:
    """As `types.Backend.forward`."""
    n_experts, d_model, d_hidden = weights.w_in_EDH.shape
    d_ff = weights.w_out_EFD.shape[1]
    routing = sort_pairs(expert_ids_TK, n_experts)
    largest = routing.largest
    fast = [has_fast(x_TD, end - first, d_model, d_ff) for _, first, end in routing.blocks]
    y_QD = x_TD.new_empty(routing.pair_P.numel() + 1, d_model)
    rows_nD, a_nF = x_TD.new_empty(largest, d_model), x_TD.new_empty(largest, d_ff)
    # Small ones side by side: in pieces they would lie among what is freed, and count for less than they take.
    small = (end - first for (_, first, end), is_fast in zip(routing.blocks, fast, strict=True) if not is_fast)
    n_small = sum(_aligned(n, d_hidden) for n in small)
    small_PH = x_TD.new_empty(n_small if keep else min(n_small, largest), d_hidden)
    large: list[Tensor] = []
    gated = weights.activation is Activation.SWIGLU
    place = 0
    for (expert, first, end), is_fast in zip(routing.blocks, fast, strict=True):
        n = padded(end - first) if is_fast else end - first
        x, a = _gather(x_TD, routing.row_P[first:end], rows_nD[:n]), a_nF[:n]
        if is_fast:
            h = product(x, weights.w_in_EDH[expert])
            large.append(h)
        else:
            h = torch.mm(x, weights.w_in_EDH[expert], out=small_PH[place : place + n])
            place += _aligned(n, d_hidden) if keep else 0
        if gated:
            _aten.silu.out(h[:, :d_ff], out=a)
            a.mul_(h[:, d_ff:])
        else:
            _aten.gelu.out(h, out=a)
        product_into(y_QD[first:end], a, weights.w_out_EFD[expert], fast=is_fast)
        if not keep:
            large.clear()
    y_TD = _combine(y_QD, routing, gates_TK)
    return y_TD, Saved(NAME, routing, (small_PH, *large)) if keep else None


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
    """As `types.Backend.backward_rows`.

    With y_p = a_p W_out, and dA_p = dy_t W_out^T *without* the gate: dgate_p = <dA_p, a_p>, so y_p is not needed; the
    gate then enters dW_out through dy, dW_in through x and dx in the gather-sum, all of them [P, D].
    """
    n_experts, d_model, d_hidden = weights.w_in_EDH.shape
    d_ff = weights.w_out_EFD.shape[1]
    routing: Routing = sort_pairs(expert_ids_TK, n_experts) if saved is None else saved.routing
    n_pairs, largest = routing.pair_P.numel(), routing.largest
    gated = weights.activation is Activation.SWIGLU
    fast = [has_fast(x_TD, end - first, d_model, d_ff) for _, first, end in routing.blocks]
    sizes = [
        padded(end - first) if is_fast else end - first
        for (_, first, end), is_fast in zip(routing.blocks, fast, strict=True)
    ]
    dx_QD = x_TD.new_empty(n_pairs + 1 if rows else 0, d_model)
    # fp32 also beside bf16 rows: a gate's gradient is a sum over F.
    dgate_P = x_TD.new_empty(n_pairs, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    # What stays; of each expert by itself, for an allocator gives large blocks back to the kernel, page by page.
    a_blocks = [x_TD.new_empty(n, d_ff) for n in sizes]
    dh_blocks = [x_TD.new_empty(n, d_hidden) for n in sizes]
    rows_nD = x_TD.new_empty(largest, d_model)
    da_nF, t_nF = x_TD.new_empty(2, largest, d_ff).unbind(0)
    h_nH = x_TD.new_empty(largest if saved is None else 0, d_hidden)
    small_PH, *large = (h_nH,) if saved is None else saved.blocks
    place = 0
    for (expert, first, end), is_fast, n, a, dh in zip(routing.blocks, fast, sizes, a_blocks, dh_blocks, strict=True):
        w_in_HD, w_out_DF = weights.w_in_EDH[expert].t(), weights.w_out_EFD[expert].t()
        here, row = end - first, routing.row_P[first:end]
        da, t = da_nF[:n], t_nF[:n]
        if saved is None:
            x = _gather(x_TD, row, rows_nD[:n])
            h = product(x, w_in_HD.t()) if is_fast else torch.mm(x, w_in_HD.t(), out=h_nH[:n])
        elif is_fast:
            h = large.pop(0)
        else:
            h = small_PH[place : place + n]
            place += _aligned(n, d_hidden)
        dy = _gather(dy_TD, row, rows_nD[:n])
        if is_fast:
            da = product(dy, w_out_DF)
        else:
            torch.mm(dy, w_out_DF, out=da)
        if gated:
            gate_n, up = h[:, :d_ff], h[:, d_ff:]
            _aten.silu.out(gate_n, out=t)
            torch.mul(da, t, out=dh[:, d_ff:])
            torch.mul(t, up, out=a)
            torch.mul(dh[:, d_ff:], up, out=t)
            torch.sum(t[:here], 1, dtype=dgate_P.dtype, out=dgate_P[first:end])
            da.mul_(up)
            _aten.silu_backward.grad_input(da, gate_n, grad_input=dh[:, :d_ff])
        else:
            _aten.gelu.out(h, out=a)
            torch.mul(da, a, out=t)
            torch.sum(t[:here], 1, dtype=dgate_P.dtype, out=dgate_P[first:end])
            _aten.gelu_backward.grad_input(da, h, grad_input=dh)
        if rows:
            product_into(dx_QD[first:end], dh, w_in_HD, fast=is_fast)
    dx_TD = _combine(dx_QD, routing, gates_TK) if rows else None
    dgates = dgate_P.new_zeros(gates_TK.numel()).index_copy_(0, routing.pair_P, dgate_P)
    gate_P1 = gates_TK.reshape(-1).index_select(0, routing.pair_P).to(x_TD.dtype).unsqueeze(1)
    work = Work(NAME, routing, gate_P1, tuple(a_blocks), tuple(dh_blocks))
    return dx_TD, dgates.view(gates_TK.shape).to(gates_TK.dtype), work


@dataclass(frozen=True, slots=True, eq=False)
class _Share:
    """What one call has of one expert."""

    call: WeightCall
    pairs: slice
    """Of the call's sorted ones."""
    a_nF: Tensor
    dh_nH: Tensor

    @property
    def n_pairs(self) -> int:
        return self.pairs.stop - self.pairs.start


def weight_grads(
    calls: Sequence[WeightCall], weights: ExpertWeights, *, into: WeightGrads | None = None
) -> WeightGrads:
    """As `types.Backend.weight_grads`, in fp32: of each expert one product over the rows of all calls, in their
    order."""
    n_experts, d_model, _ = weights.w_in_EDH.shape
    shares: list[list[_Share]] = [[] for _ in range(n_experts)]
    for call in calls:
        for (expert, first, end), a, dh in zip(call.work.routing.blocks, call.work.a, call.work.dh, strict=True):
            shares[expert].append(_Share(call, slice(first, end), a, dh))
    dtype = torch.promote_types(weights.w_in_EDH.dtype, torch.float32)
    grads = into or WeightGrads(
        torch.empty_like(weights.w_in_EDH, dtype=dtype), torch.empty_like(weights.w_out_EFD, dtype=dtype)
    )
    for expert, of_expert in enumerate(shares):
        if not of_expert:
            for grad in grads:
                grad[expert].zero_()
            continue
        n = sum(share.n_pairs for share in of_expert)
        fast = has_fast(weights.w_in_EDH, n, d_model, weights.w_out_EFD.shape[1])
        n = padded(n) if fast else n
        rows_nD = weights.w_in_EDH.new_empty(n, d_model)
        dy = _scaled_rows(rows_nD, [(share, share.call.dy_TD) for share in of_expert])
        product_into(
            grads.w_out_EFD[expert], _joined([share.a_nF for share in of_expert], n, of_expert).t(), dy, fast=fast
        )
        x = _scaled_rows(rows_nD, [(share, share.call.x_TD) for share in of_expert])
        product_into(
            grads.w_in_EDH[expert], x.t(), _joined([share.dh_nH for share in of_expert], n, of_expert), fast=fast
        )
    return grads


def _scaled_rows(rows_nD: Tensor, parts: Sequence[tuple[_Share, Tensor]]) -> Tensor:
    """The tokens' rows of each share's pairs times its gates, into scratch; zeros into what that has beyond them."""
    place = 0
    for share, value_TD in parts:
        work, rows = share.call.work, rows_nD[place : place + share.n_pairs]
        torch.index_select(value_TD, 0, work.routing.row_P[share.pairs], out=rows)
        assert work.gate_P1 is not None
        rows.mul_(work.gate_P1[share.pairs])
        place += share.n_pairs
    rows_nD[place:].zero_()
    return rows_nD


def _joined(blocks: Sequence[Tensor], n: int, shares: Sequence[_Share]) -> Tensor:
    """The blocks one after another, as `n` rows; a single one as it is."""
    if len(blocks) == 1:
        return blocks[0]
    out_nX, place = blocks[0].new_empty(n, blocks[0].shape[1]), 0
    for block, share in zip(blocks, shares, strict=True):
        out_nX[place : place + share.n_pairs] = block[: share.n_pairs]
        place += share.n_pairs
    out_nX[place:].zero_()
    return out_nX


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
    dx_TD, dgates_TK, work = backward_rows(dy_TD, x_TD, expert_ids_TK, gates_TK, weights, saved)
    assert dx_TD is not None
    if not fresh:
        return dx_TD, dgates_TK, None
    grads = weight_grads([WeightCall(dy_TD, x_TD, expert_ids_TK, work)], weights)
    return dx_TD, dgates_TK, WeightGrads(*(grad.to(weights.w_in_EDH.dtype) for grad in grads))
