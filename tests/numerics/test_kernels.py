"""Every expert backend against the loop over experts in fp64: outputs and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch_quack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, TOLERANCE, make_case, shapes
from kernel_checks import check, run_autograd, run_explicit

from moe_net.kernels.dispatch import available, moe_ffn, moe_ffn_backward, moe_ffn_forward, moe_ffn_weight_grads
from moe_net.kernels.types import ExpertWeights, WeightCall, WeightGrads
from moe_net.types import Activation

# QuACK takes SwiGLU in 16 bits only, on Hopper and newer: it has a test of its own.
ALL = tuple(backend for backend in available() if backend != "quack")
FAST = tuple(backend for backend in ALL if backend != "reference")
# Triton's interpreter takes 0.1 s and more for what the others do in 1 ms.
SLOW = ("triton",) if DEVICE == "cpu" else ()
QUICK = tuple(backend for backend in ALL if backend not in SLOW)


def fitting(shape: dict[str, Any], backend: str) -> dict[str, Any]:
    """`shape` with sizes that the backend takes: grouped_mm wants multiples of 16 bytes."""
    if backend != "grouped":
        return shape
    return shape | {"d": -(-shape["d"] // 8) * 8, "f": -(-shape["f"] // 8) * 8}


CASES = shapes(max_tokens=24)


@pytest.mark.parametrize("backend", QUICK)
@given(shape=CASES)
@settings(max_examples=1000)
def test_output_and_every_gradient_equal_the_fp64_reference(backend: str, shape: dict[str, Any]) -> None:
    check(make_case(**fitting(shape, backend)), backend)


@pytest.mark.parametrize("backend", QUICK)
@given(shape=CASES)
@settings(max_examples=200)
def test_bf16_rows_and_weights_stay_within_bf16_rounding(backend: str, shape: dict[str, Any]) -> None:
    check(make_case(**fitting(shape, backend)), backend, torch.bfloat16)


if SLOW:

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("backend", SLOW)
    @given(shape=CASES)
    @settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
    def test_interpreted_kernels_equal_the_fp64_reference(
        backend: str, dtype: torch.dtype, shape: dict[str, Any]
    ) -> None:
        check(make_case(**fitting(shape, backend)), backend, dtype)


if DEVICE == "cuda" and "quack" in available():

    @given(shape=CASES, t=st.integers(0, 300))
    @settings(max_examples=24)
    def test_hopper_products_stay_within_bf16_rounding(shape: dict[str, Any], t: int) -> None:
        shape = shape | {"t": t, "d": 64 if shape["d"] == 8 else 136, "f": 64 if shape["f"] == 8 else 72}
        case = make_case(**shape | {"activation": Activation.SWIGLU, "seed": shape["seed"] // 4 * 4})
        check(case, "quack", torch.bfloat16)


@given(shape=CASES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_done_around_hopper_products_stays_within_bf16_rounding(shape: dict[str, Any]) -> None:
    shape = shape | {"d": 8 if shape["d"] == 8 else 16, "f": 8 if shape["f"] == 8 else 24}
    case = make_case(**shape | {"activation": Activation.SWIGLU, "seed": shape["seed"] // 4 * 4})
    with pytest.MonkeyPatch.context() as patch:
        torch_quack.install(patch)
        check(case, "quack", torch.bfloat16)


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("routing", ["random", "one hot", "empty experts", "padding"])
@pytest.mark.parametrize("backend", FAST)
def test_larger_shapes_agree_for_every_kind_of_routing(backend: str, routing: str, activation: Activation) -> None:
    sizes = {"t": 60, "e": 4, "d": 24, "f": 40} if backend in SLOW else {"t": 300, "e": 7, "d": 48, "f": 40}
    check(make_case(5, k=4, activation=activation, routing=routing, **sizes), backend)


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("backend", FAST)
def test_backward_without_saved_pre_activations_gives_the_same_bits(backend: str, activation: Activation) -> None:
    case = make_case(3, t=50, k=2, e=4, d=16, f=24, activation=activation)
    kept, fresh = run_explicit(case, backend), run_explicit(case, backend, keep=False)
    assert all(torch.equal(kept[name], fresh[name]) for name in kept)


@pytest.mark.parametrize("backend", ALL)
def test_a_second_backward_of_one_forward_gives_the_same_bits(backend: str) -> None:
    case = make_case(3, t=50, k=2, e=4, d=16, f=24, activation=Activation.SWIGLU)
    args = (case.x_TD, case.ids_TK, case.gates_TK, case.weights)
    _, saved = moe_ffn_forward(*args, keep=True, backend=backend)
    first, second = (moe_ffn_backward(case.dy_TD, *args, saved, backend=backend)[:2] for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    x = case.x_TD.clone().requires_grad_()
    y = moe_ffn(x, *args[1:], backend=backend)
    once, again = (torch.autograd.grad(y, x, case.dy_TD, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("backend", [backend for backend in FAST if backend != "loop"])
def test_pre_activations_are_free_before_the_weights_gradients_are_made(backend: str) -> None:
    case = make_case(3, t=50, k=2, e=4, d=16, f=24, activation=Activation.SWIGLU)
    args = (case.x_TD, case.ids_TK, case.gates_TK, case.weights)
    _, saved = moe_ffn_forward(*args, keep=True, backend=backend)
    assert saved is not None
    assert not saved.used_up
    moe_ffn_backward(case.dy_TD, *args, saved, backend=backend)
    assert saved.used_up


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("backend", FAST)
def test_work_that_is_made_again_without_rows_gives_the_same_bits(backend: str, activation: Activation) -> None:
    case = make_case(3, t=50, k=2, e=4, d=16, f=24, activation=activation)
    args = (case.x_TD, case.ids_TK, case.gates_TK, case.weights)
    _, saved = moe_ffn_forward(*args, keep=True, backend=backend)
    grads: list[WeightGrads] = []
    for was_saved, rows in ((saved, True), (None, False)):
        dx, _, work = moe_ffn_backward(case.dy_TD, *args, was_saved, rows=rows, backend=backend)
        assert (dx is not None) is rows
        grads.append(moe_ffn_weight_grads([WeightCall(case.dy_TD, case.x_TD, case.ids_TK, work)], case.weights))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_what_one_backend_saved_does_not_confuse_another(backend: str) -> None:
    case = make_case(3, t=50, k=2, e=4, d=16, f=24, activation=Activation.SWIGLU)
    args = (case.x_TD, case.ids_TK, case.gates_TK, case.weights)
    _, saved = moe_ffn_forward(*args, keep=True, backend="loop")
    dx, _, _ = moe_ffn_backward(case.dy_TD, *args, saved, backend=backend)
    assert dx is not None
    assert torch.equal(dx, run_explicit(case, backend)["dx"])


@pytest.mark.parametrize("backend", FAST)
def test_the_same_inputs_give_the_same_bits(backend: str) -> None:
    case = make_case(2, t=64, k=4, e=3, d=32, f=16, activation=Activation.SWIGLU)
    first, second = run_explicit(case, backend), run_explicit(case, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ALL)
def test_views_with_other_strides_give_the_same_bits(backend: str) -> None:
    case = make_case(4, t=20, k=2, e=3, d=16, f=8, activation=Activation.SWIGLU)
    names = ("x_TD", "ids_TK", "gates_TK", "dy_TD")
    views = replace(case, **{name: getattr(case, name).t().contiguous().t() for name in names})
    assert not any(getattr(views, name).is_contiguous() for name in names)
    for run in (run_explicit, run_autograd):
        straight, strided = run(case, backend), run(views, backend)
        assert all(torch.equal(straight[name], strided[name]) for name in straight)


@pytest.mark.parametrize("backend", FAST)
def test_inputs_are_left_as_they_were(backend: str) -> None:
    case = make_case(4, t=30, k=2, e=3, d=16, f=8, activation=Activation.SWIGLU)
    copy = make_case(4, t=30, k=2, e=3, d=16, f=8, activation=Activation.SWIGLU)
    run_explicit(case, backend)
    for name in ("x_TD", "ids_TK", "gates_TK", "dy_TD"):
        assert torch.equal(getattr(case, name), getattr(copy, name)), name
    assert torch.equal(case.weights.w_in_EDH, copy.weights.w_in_EDH)
    assert torch.equal(case.weights.w_out_EFD, copy.weights.w_out_EFD)


@pytest.mark.parametrize("backend", FAST)
def test_nan_in_one_expert_reaches_only_the_tokens_that_chose_it(backend: str) -> None:
    case = make_case(0, t=6, k=2, e=3, d=8, f=8, activation=Activation.GELU)
    case.weights.w_out_EFD[1] = float("nan")
    ids = torch.tensor([[0, 2], [1, -1], [-1, -1], [2, 0], [0, 1], [-1, 2]], device=DEVICE)
    y, _ = moe_ffn_forward(case.x_TD, ids, case.gates_TK, case.weights, keep=False, backend=backend)
    assert y.isnan().any(dim=1).tolist() == [False, True, False, False, True, False]


def test_nothing_is_kept_when_no_input_needs_a_gradient() -> None:
    case = make_case(0, t=6, k=2, e=3, d=8, f=8, activation=Activation.GELU)
    y = moe_ffn(case.x_TD, case.ids_TK, case.gates_TK, case.weights)
    assert not y.requires_grad


def test_frozen_weights_get_no_gradient_and_rows_do() -> None:
    case = make_case(0, t=6, k=2, e=3, d=8, f=8, activation=Activation.GELU)
    x = case.x_TD.requires_grad_()
    moe_ffn(x, case.ids_TK, case.gates_TK, case.weights).sum().backward()
    assert x.grad is not None
    assert case.weights.w_in_EDH.grad is None


def test_mistakes_are_named() -> None:
    case = make_case(0, t=6, k=2, e=3, d=8, f=8, activation=Activation.GELU)
    x, ids, gates, w = case.x_TD, case.ids_TK, case.gates_TK, case.weights
    with pytest.raises(ValueError, match=r"must lie in -1\.\.2, not 3\.\.3"):
        moe_ffn(x, torch.full_like(ids, 3), gates, w, backend="loop")
    with pytest.raises(ValueError, match=r"must lie in -1\.\.2, not -2\.\.-2"):
        moe_ffn(x, torch.full_like(ids, -2), gates, w, backend="loop")
    with pytest.raises(ValueError, match="unknown backend 'fastest': choose one of reference, loop, grouped"):
        moe_ffn(x, ids, gates, w, backend="fastest")
    narrow = ExpertWeights(w.w_in_EDH[:, :6], w.w_out_EFD[..., :6], w.activation)
    with pytest.raises(ValueError, match="takes rows of multiples of 16 bytes, not D=6, F=8"):
        moe_ffn(x[:, :6], ids, gates, narrow, backend="grouped")
    with pytest.raises(ValueError, match=r"x is \[6, 7\], but the experts take \[T, 8\]"):
        moe_ffn(x[:, :7], ids, gates, w)
    with pytest.raises(ValueError, match=r"must both be \[6, K\]"):
        moe_ffn(x, ids, gates[:, :1], w)
    with pytest.raises(ValueError, match="they must be the same"):
        moe_ffn(x.bfloat16(), ids, gates, w)
    with pytest.raises(ValueError, match=r"w_out is \[3, 8, 8\]"):
        moe_ffn(x, ids, gates, ExpertWeights(w.w_in_EDH, w.w_out_EFD, Activation.SWIGLU))
