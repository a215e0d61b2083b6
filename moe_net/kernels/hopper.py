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

from collections.abc import Callable

import torch
from torch import Tensor

from moe_net.kernels.device import rows
from moe_net.kernels.routing import Routing
from moe_net.kernels.types import ExpertWeights, Saved, WeightGrads, no_gradient
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
    routing = rows.sort_pairs(expert_ids_TK, weights.w_in_EDH.shape[0])
    row_P, bound_B = routing.row_P, routing.bound_B
    h_PH, a_PF = _up(x_TD, weights, row_P, bound_B, keep=keep)
    y_PD = x_TD.new_empty(row_P.numel(), x_TD.shape[1])
    _gemm("rows", a_PF, weights.w_out_EFD, y_PD, weights, cu_seqlens_m=bound_B)
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
    from quack.gemm_interface import gemm_dgated

    if expert_ids_TK.numel() == 0:
        return no_gradient(x_TD, gates_TK, weights, fresh=fresh)
    w_in_EDH, w_out_EFD, _ = weights
    n_tokens, n_choices = expert_ids_TK.shape
    routing: Routing = rows.sort_pairs(expert_ids_TK, w_in_EDH.shape[0]) if saved is None else saved.routing
    row_P, bound_B = routing.row_P, routing.bound_B
    h_PH = _up(x_TD, weights, row_P, bound_B, keep=True)[0] if saved is None else saved.h_PH
    gate_P = gates_TK.reshape(-1).float().index_select(0, routing.pair_P)
    dh_PH, a_PF, dgate_P = gemm_dgated(
        dy_TD, w_out_EFD.transpose(1, 2), PreAct=h_PH, activation="swiglu", colvec_scale=gate_P, colvec_reduce=True,
        cu_seqlens_m=bound_B, A_idx=row_P, dynamic_scheduler=False, tuned=False,
        config=_config("down backward", x_TD, weights),
    )  # fmt: skip
    if saved is not None:
        saved.release()
    del h_PH, gate_P

    def rows_back() -> tuple[Tensor, Tensor]:
        nonlocal dh_PH
        dx_PD = x_TD.new_empty(row_P.numel(), x_TD.shape[1])
        _gemm("rows", dh_PH, w_in_EDH.transpose(1, 2), dx_PD, weights, cu_seqlens_m=bound_B, concat_layout=("B",))
        if early is None:
            del dh_PH  # Its last use, and the peak: gone before there is a dx.
        dx_TD, dgates_TK = rows.combine(dx_PD, routing, (n_tokens, n_choices), None, dgate_P.unsqueeze(1))
        assert dgates_TK is not None
        return dx_TD, dgates_TK.to(gates_TK.dtype)

    back = None
    if early is not None:
        back = rows_back()
        early()
    options = {"cu_seqlens_k": bound_B, "A_idx": row_P}
    # One gradient after the other, and what only the first one needs gone before the second one is there.
    dw_out_EFD = torch.empty_like(w_out_EFD) if fresh else None
    for out_EFD, add in ((dw_out_EFD, False), (sums and sums.w_out_EFD, True)):
        if out_EFD is not None:
            # As its transpose: the gathered rows come first.
            _gemm("weights out", dy_TD.t(), a_PF, out_EFD.transpose(1, 2), weights, add_to_output=add, **options)
    del a_PF
    dw_in_EDH = torch.empty_like(w_in_EDH) if fresh else None
    for out_EDH, add in ((dw_in_EDH, False), (sums and sums.w_in_EDH, True)):
        if out_EDH is not None:
            _gemm("weights in", x_TD.t(), dh_PH, out_EDH, weights, concat_layout=("out",), add_to_output=add, **options)
    new = None if dw_in_EDH is None or dw_out_EFD is None else WeightGrads(dw_in_EDH, dw_out_EFD)
    return *(back or rows_back()), new
