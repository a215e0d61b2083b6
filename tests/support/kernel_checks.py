"""Outputs and every gradient of a backend, and their comparison with the fp64 reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from kernel_cases import TOLERANCE, Case
from torch import Tensor

from moe_net.kernels.dispatch import moe_ffn, moe_ffn_backward, moe_ffn_forward
from moe_net.kernels.types import ExpertWeights, WeightGrads


def run_explicit(case: Case, backend: str, *, keep: bool = True) -> dict[str, Tensor]:
    """Output and gradients by the explicit forward and backward."""
    dtype = torch.promote_types(case.x_TD.dtype, torch.float32)
    w = case.weights
    grads = WeightGrads(torch.zeros_like(w.w_in_EDH, dtype=dtype), torch.zeros_like(w.w_out_EFD, dtype=dtype))
    args = (case.x_TD, case.ids_TK, case.gates_TK, w)
    y, saved = moe_ffn_forward(*args, keep=keep, backend=backend)
    dx, dgates = moe_ffn_backward(case.dy_TD, *args, saved, weight_grads=grads, backend=backend)
    return {"y": y, "dx": dx, "dgates": dgates, "dw_in": grads.w_in_EDH, "dw_out": grads.w_out_EFD}


def run_autograd(case: Case, backend: str) -> dict[str, Tensor]:
    """Output and gradients by autograd through `moe_ffn`."""
    w = case.weights
    inputs = [value.clone().requires_grad_() for value in (case.x_TD, case.gates_TK, w.w_in_EDH, w.w_out_EFD)]
    x, gates, w_in, w_out = inputs
    y = moe_ffn(x, case.ids_TK, gates, ExpertWeights(w_in, w_out, w.activation), backend=backend)
    dx, dgates, dw_in, dw_out = torch.autograd.grad(y, inputs, case.dy_TD, materialize_grads=True)
    return {"y": y.detach(), "dx": dx, "dgates": dgates, "dw_in": dw_in, "dw_out": dw_out}


def absolute(case: Case) -> Case:
    """The same with absolute values: its results are the sums of the absolute terms, which rounding is relative to."""
    w = case.weights
    weights = ExpertWeights(w.w_in_EDH.abs(), w.w_out_EFD.abs(), w.activation)
    return replace(case, x_TD=case.x_TD.abs(), gates_TK=case.gates_TK.abs(), dy_TD=case.dy_TD.abs(), weights=weights)


def check(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> None:
    case = case.to(dtype)
    exact = case.to(torch.float64)
    oracle, terms = run_autograd(exact, "reference"), run_autograd(absolute(exact), "reference")
    for got in (run_explicit(case, backend), run_autograd(case, backend)):
        for name, expected in oracle.items():
            assert got[name].shape == expected.shape, name
            if expected.numel():
                error = (got[name].double() - expected).abs().max().item()
                assert error <= TOLERANCE[dtype] * max(1.0, terms[name].max().item()), f"{name} is off by {error}"
