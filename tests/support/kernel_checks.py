"""Outputs and every gradient of a backend, and their comparison with the fp64 reference."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from kernel_cases import TOLERANCE, Case
from torch import Tensor

from moe_net.kernels.dispatch import moe_ffn, moe_ffn_backward, moe_ffn_forward, moe_ffn_weight_grads
from moe_net.kernels.types import ExpertWeights, WeightCall, zero_sums


def run_explicit(case: Case, backend: str, *, keep: bool = True, calls: int = 1) -> dict[str, Tensor]:
    """Output and gradients by the explicit forward and backward; the tokens as so many calls, one after another."""
    parts: list[dict[str, Tensor]] = []
    staged: list[WeightCall] = []
    for part in split_case(case, calls):
        args = (part.x_TD, part.ids_TK, part.gates_TK, part.weights)
        y, saved = moe_ffn_forward(*args, keep=keep, backend=backend)
        dx, dgates, work = moe_ffn_backward(part.dy_TD, *args, saved, backend=backend)
        assert dx is not None
        parts.append({"y": y, "dx": dx, "dgates": dgates})
        if part.ids_TK.numel():
            staged.append(WeightCall(part.dy_TD, part.x_TD, part.ids_TK, work))
    grads = moe_ffn_weight_grads(staged, case.weights) if staged else zero_sums(case.weights)
    rows = {name: torch.cat([part[name] for part in parts]) for name in ("y", "dx", "dgates")}
    return rows | {"dw_in": grads.w_in_EDH, "dw_out": grads.w_out_EFD}


def split_case(case: Case, calls: int) -> list[Case]:
    """Its tokens in `calls` parts of unequal sizes, some of them perhaps empty."""
    bounds = [case.x_TD.shape[0] * i * i // (calls * calls) for i in range(calls + 1)]
    return [
        replace(case, x_TD=case.x_TD[a:b], ids_TK=case.ids_TK[a:b], gates_TK=case.gates_TK[a:b], dy_TD=case.dy_TD[a:b])
        for a, b in itertools.pairwise(bounds)
    ]


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
    for got in (run_explicit(case, backend), run_explicit(case, backend, calls=3), run_autograd(case, backend)):
        for name, expected in oracle.items():
            assert got[name].shape == expected.shape, name
            if expected.numel():
                error = (got[name].double() - expected).abs().max().item()
                assert error <= TOLERANCE[dtype] * max(1.0, terms[name].max().item()), f"{name} is off by {error}"
