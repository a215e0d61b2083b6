# pyright: basic, reportMissingImports=false
"""Products by QuACK (`pip install moe-net[hopper]`), with the gather and SwiGLU inside them; Hopper and newer.

T tokens, K experts per token, E experts, D model width, F expert width, H = 2F columns of the first projection,
P = T * K pairs sorted by expert. The plan is SonicMoE's (Guo et al., 2025): rows are gathered by index inside the
products, the weights' ones too; the gates' gradients come from the epilogue of the backward; only x and the
pre-activations are kept.

QuACK interleaves gate and up columns in what it writes (h, dh), but reads and writes weights as [gate; up]: for that it
needs D contiguous in w_in, i.e. a transposed view of [E, H, D].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_net.kernels.device.rows import combine, sort_pairs
from moe_net.kernels.routing import Routing, merge
from moe_net.kernels.types import ExpertWeights, Saved, WeightCall, WeightGrads, Work, no_gradient, no_rows
from moe_net.types import Activation

NAME = "quack"


def fits(x_TD: Tensor, weights: ExpertWeights) -> bool:
    """bf16 or fp16 SwiGLU experts with 16-byte rows, and D contiguous in w_in."""
    w_in_EDH, w_out_EFD, activation = weights
    return (
        activation is Activation.SWIGLU
        and x_TD.dtype in (torch.bfloat16, torch.float16)
        and w_in_EDH.transpose(1, 2).is_contiguous()
        and w_out_EFD.is_contiguous()
        and x_TD.shape[1] % 8 == 0
        and w_out_EFD.shape[1] % 8 == 0
    )


# Product -> (tile of rows, of columns, ping-pong, cluster of rows, of columns), on an H200 (docs/kernels.md): what the
# tuner of QuACK chose in SonicMoE's step, compared with others in full steps under load; "down backward" is our find.
_TILES = {
    "up": (128, 192, True, 2, 1),
    "rows": (192, 128, True, 1, 2),
    "weights in": (256, 192, False, 2, 1),
    "weights out": (128, 256, False, 2, 1),
}
_WIDE_TILES = {
    "rows": (128, 256, False, 2, 1),
    "weights in": (256, 192, False, 1, 1),
    "weights out": (256, 192, False, 1, 1),
}
"""For wide experts: Mixtral's step takes 54.9 ms with these and 59.2 with the others."""


def _config(product: str, x_TD: Tensor, weights: ExpertWeights):
    """The tile for a product.

    QuACK's own tuner takes 10 to 50 s for every new token count, which a server that sees new counts all day cannot
    pay, and its default is 20 % slower over the six products.
    """
    from quack.gemm_config import GemmConfig

    if torch.cuda.get_device_capability(x_TD.device)[0] != 9:
        return None
    tile = (_WIDE_TILES if weights.wide else _TILES).get(product)
    if product == "down backward":
        # Its epilogue is longer than its product, and shorter for few rows.
        tile = (64, 192 if weights.w_out_EFD.shape[1] % 192 == 0 else 256, True, 2, 1)
    if tile is None:
        return None
    tile_m, tile_n, pingpong, cluster_m, cluster_n = tile
    return GemmConfig(
        tile_m=tile_m, tile_n=tile_n, pingpong=pingpong, cluster_m=cluster_m, cluster_n=cluster_n,
        is_dynamic_persistent=False, device_capacity=9,
    )  # fmt: skip


def _gemm(product: str, a: Tensor, b: Tensor, out: Tensor, weights: ExpertWeights, **options) -> None:
    from quack.gemm_interface import gemm_tuned

    # Below the tuner: `gemm` takes no configuration.
    gemm_tuned.fn(a, b, out, config=_config(product, a, weights), **options)


def _up(x_TD: Tensor, weights: ExpertWeights, row_P: Tensor, bound_B: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
    """(h [P, H] interleaved, activation(h) [P, F])."""
    from quack.gemm_interface import gemm_gated

    return gemm_gated(
        x_TD, weights.w_in_EDH, activation="swiglu", cu_seqlens_m=bound_B, A_idx=row_P, store_preact=keep,
        concat_layout=("B",), tuned=False, config=_config("up", x_TD, weights),
    )  # fmt: skip


def forward(
    x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, weights: ExpertWeights, *, keep: bool
) -> tuple[Tensor, Saved | None]:
    """As `types.Backend.forward`."""
    if expert_ids_TK.numel() == 0:
        return torch.zeros_like(x_TD), None
    n_tokens, n_choices = expert_ids_TK.shape
    routing = sort_pairs(expert_ids_TK, weights.w_in_EDH.shape[0])
    row_P, bound_B = routing.row_P, routing.bound_B
    h_PH, a_PF = _up(x_TD, weights, row_P, bound_B, keep=keep)
    y_PD = x_TD.new_empty(row_P.numel(), x_TD.shape[1])
    _gemm("rows", a_PF, weights.w_out_EFD, y_PD, weights, cu_seqlens_m=bound_B)
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
    """(routing, dh [P, H] and activations [P, F], both with the gate, the gates' gradients [P])."""
    from quack.gemm_interface import gemm_dgated

    n_experts = weights.w_in_EDH.shape[0]
    routing: Routing = sort_pairs(expert_ids_TK, n_experts) if saved is None else saved.routing
    row_P, bound_B = routing.row_P, routing.bound_B
    h_PH = _up(x_TD, weights, row_P, bound_B, keep=True)[0] if saved is None else saved.h_PH
    gate_P = gates_TK.reshape(-1).float().index_select(0, routing.pair_P)
    dh_PH, a_PF, dgate_P = gemm_dgated(
        dy_TD, weights.w_out_EFD.transpose(1, 2), PreAct=h_PH, activation="swiglu", colvec_scale=gate_P,
        colvec_reduce=True, cu_seqlens_m=bound_B, A_idx=row_P, dynamic_scheduler=False, tuned=False,
        config=_config("down backward", x_TD, weights),
    )  # fmt: skip
    if saved is not None:
        saved.release()
    return routing, dh_PH, a_PF, dgate_P


def _dx(dh_PH: Tensor, x_TD: Tensor, weights: ExpertWeights, bound_B: Tensor) -> Tensor:
    dx_PD = x_TD.new_empty(dh_PH.shape[0], x_TD.shape[1])
    w_in_EHD = weights.w_in_EDH.transpose(1, 2)
    _gemm("rows", dh_PH, w_in_EHD, dx_PD, weights, cu_seqlens_m=bound_B, concat_layout=("B",))
    return dx_PD


def _dw_out(a_PF: Tensor, dy_TD: Tensor, weights: ExpertWeights, routing: Routing) -> Tensor:
    out_EFD = torch.empty_like(weights.w_out_EFD)
    # As its transpose: the gathered rows come first.
    _gemm(
        "weights out", dy_TD.t(), a_PF, out_EFD.transpose(1, 2), weights, add_to_output=False,
        cu_seqlens_k=routing.bound_B, A_idx=routing.row_P,
    )  # fmt: skip
    return out_EFD


def _dw_in(dh_PH: Tensor, x_TD: Tensor, weights: ExpertWeights, routing: Routing) -> Tensor:
    out_EDH = torch.empty_like(weights.w_in_EDH)
    _gemm(
        "weights in", x_TD.t(), dh_PH, out_EDH, weights, concat_layout=("out",), add_to_output=False,
        cu_seqlens_k=routing.bound_B, A_idx=routing.row_P,
    )  # fmt: skip
    return out_EDH


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
    routing, dh_PH, a_PF, dgate_P = _down(dy_TD, x_TD, expert_ids_TK, gates_TK, weights, saved)
    work = Work(NAME, routing, None, (a_PF,), (dh_PH,))
    if not rows:
        return None, torch.zeros_like(gates_TK), work
    dx_PD = _dx(dh_PH, x_TD, weights, routing.bound_B)
    dx_TD, dgates_TK = combine(
        dx_PD, routing, (expert_ids_TK.shape[0], expert_ids_TK.shape[1]), None, dgate_P.unsqueeze(1)
    )
    assert dgates_TK is not None
    return dx_TD, dgates_TK.to(gates_TK.dtype), work


def weight_grads(
    calls: Sequence[WeightCall], weights: ExpertWeights, *, into: WeightGrads | None = None
) -> WeightGrads:
    """As `types.Backend.weight_grads`, in the weights' dtype."""
    dy_TD, x_TD, _, routing, a_PF, dh_PH = merge(calls, weights.w_in_EDH.shape[0], sort_pairs)
    dw_out_EFD = _dw_out(a_PF, dy_TD, weights, routing)
    del a_PF, dy_TD
    return WeightGrads(_dw_in(dh_PH, x_TD, weights, routing), dw_out_EFD)


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
    routing, dh_PH, a_PF, dgate_P = _down(dy_TD, x_TD, expert_ids_TK, gates_TK, weights, saved)
    # One gradient after the other, and what only the first one needs gone before the second one is there.
    dw_out_EFD = _dw_out(a_PF, dy_TD, weights, routing) if fresh else None
    del a_PF
    dw_in_EDH = _dw_in(dh_PH, x_TD, weights, routing) if fresh else None
    new = None if dw_in_EDH is None or dw_out_EFD is None else WeightGrads(dw_in_EDH, dw_out_EFD)
    dx_PD = _dx(dh_PH, x_TD, weights, routing.bound_B)
    del dh_PH  # Its last use, and the peak: gone before there is a dx.
    dx_TD, dgates_TK = combine(
        dx_PD, routing, (expert_ids_TK.shape[0], expert_ids_TK.shape[1]), None, dgate_P.unsqueeze(1)
    )
    assert dgates_TK is not None
    return dx_TD, dgates_TK.to(gates_TK.dtype), new
