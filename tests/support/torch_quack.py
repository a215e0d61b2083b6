"""The products of QuACK 0.6 that `kernels.hopper` asks for, in torch: what it computes around them runs without a GPU.

T tokens, E experts, D model width, F expert width, P pairs sorted by expert; expert e has the pairs from bound[e] to
bound[e + 1]. What SwiGLU's columns are in QuACK: h and dh have gate and up in turn, weights are [gate; up]
("concat_layout" names the operands that are).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from moe_net.kernels import dispatch, hopper


def _experts(bound_B: Tensor) -> Iterator[tuple[int, slice]]:
    bounds = bound_B.tolist()
    for expert, (first, end) in enumerate(itertools.pairwise(bounds)):
        yield expert, slice(first, end)


def _in_turn(gate_PF: Tensor, up_PF: Tensor) -> Tensor:
    return torch.stack([gate_PF, up_PF], -1).flatten(1)


def _one_after_the_other(h_PH: Tensor) -> Tensor:
    return torch.cat([h_PH[:, ::2], h_PH[:, 1::2]], 1)


def _gemm_gated(x_TD: Tensor, w_in_EDH: Tensor, *, cu_seqlens_m: Tensor, A_idx: Tensor, **options: Any):
    assert options["activation"] == "swiglu"
    assert options["concat_layout"] == ("B",)
    h_PH = x_TD.new_full((A_idx.numel(), w_in_EDH.shape[2]), float("nan"))
    for expert, rows in _experts(cu_seqlens_m):
        h_PH[rows] = _in_turn(*(x_TD[A_idx[rows].long()] @ w_in_EDH[expert]).chunk(2, 1))
    return h_PH if options["store_preact"] else None, silu(h_PH[:, ::2]) * h_PH[:, 1::2]


def _gemm_dgated(
    dy_TD: Tensor, w_out_EDF: Tensor, *, PreAct: Tensor, colvec_scale: Tensor, cu_seqlens_m: Tensor, A_idx: Tensor,
    **options: Any,
):  # fmt: skip
    assert options["activation"] == "swiglu"
    assert options["colvec_reduce"]
    da_PF = dy_TD.new_full((A_idx.numel(), w_out_EDF.shape[2]), float("nan"))
    for expert, rows in _experts(cu_seqlens_m):
        da_PF[rows] = dy_TD[A_idx[rows].long()] @ w_out_EDF[expert]
    gate_PF, up_PF = (half.float().requires_grad_() for half in (PreAct[:, ::2], PreAct[:, 1::2]))
    with torch.enable_grad():
        a_PF = silu(gate_PF) * up_PF
    scaled_PF = da_PF.float() * colvec_scale[:, None]
    dh_PH = _in_turn(*torch.autograd.grad(a_PF, [gate_PF, up_PF], scaled_PF))
    a_PF = a_PF.detach()
    return dh_PH.to(dy_TD.dtype), (a_PF * colvec_scale[:, None]).to(dy_TD.dtype), (da_PF.float() * a_PF).sum(1)


def _gemm(
    a: Tensor, b: Tensor, out: Tensor, *, cu_seqlens_m: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    A_idx: Tensor | None = None, concat_layout: tuple[str, ...] | None = None, **options: Any,
) -> None:  # fmt: skip
    if cu_seqlens_m is not None:  # rows: [P, n] @ [E, n, m]
        for expert, rows in _experts(cu_seqlens_m):
            a_Pn = _one_after_the_other(a[rows]) if concat_layout == ("B",) else a[rows]
            out[rows] = a_Pn @ b[expert]
        return
    assert cu_seqlens_k is not None
    assert A_idx is not None
    assert not options["add_to_output"]
    for expert, rows in _experts(cu_seqlens_k):  # weights: [n, P] @ [P, m] of each expert
        b_Pm = _one_after_the_other(b[rows]) if concat_layout == ("out",) else b[rows]
        out[expert] = a[:, A_idx[rows].long()] @ b_Pm


class _Tuned:
    fn = staticmethod(_gemm)


def install(patch: pytest.MonkeyPatch) -> None:
    """`backend="quack"` runs on these products, on any device."""
    package, interface = ModuleType("quack"), ModuleType("quack.gemm_interface")
    package.__spec__ = ModuleSpec("quack", None)  # importlib.util.find_spec reads it.
    vars(interface).update(gemm_gated=_gemm_gated, gemm_dgated=_gemm_dgated, gemm_tuned=_Tuned)
    patch.setitem(sys.modules, "quack", package)
    patch.setitem(sys.modules, "quack.gemm_interface", interface)
    patch.setattr(hopper, "_config", lambda product, x_TD, weights: None)
    patch.setattr(dispatch, "_installed", lambda backend: True)
