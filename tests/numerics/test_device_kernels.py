"""The device's small kernels against what they replace: torch's sort and row functions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from allocations import peak_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, TOLERANCE, Case, make_case
from kernel_checks import check, split_case

from moe_net.kernels import grouped, pointwise
from moe_net.kernels.device import routing as device_routing
from moe_net.kernels.device import rows
from moe_net.kernels.dispatch import choose, moe_ffn_backward, moe_ffn_forward, moe_ffn_weight_grads
from moe_net.kernels.memory import Rows, autograd_bytes, dispatch_bytes, weight_grads_bytes
from moe_net.kernels.types import WeightCall
from moe_net.types import Activation, ExpertShape


@pytest.fixture(autouse=True)
def rows_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_row_functions", lambda x_TD: rows)  # as on a GPU


@given(
    t=st.integers(1, 40),
    k=st.sampled_from([1, 2, 3]),
    e=st.integers(1, 9),
    at_once=st.sampled_from([16, 8192]),
    step=st.sampled_from([1, 4, 1024]),
    experts=st.sampled_from([2, 128]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_sorting_by_counting_equals_torchs_stable_sort(
    t: int, k: int, e: int, at_once: int, step: int, experts: int, seed: int
) -> None:
    ids_TK = torch.randint(-2, e + 1, (t, k), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_routing, "_AT_ONCE", at_once)  # smaller: several programs share the sort
        patch.setattr(device_routing, "_BLOCK", 16)
        patch.setattr(device_routing, "_STEP", step)  # fewer than there are: summed up in several steps
        patch.setattr(device_routing, "_EXPERTS", experts)
        found = device_routing.sort_pairs(ids_TK, e)
    right = pointwise.sort_pairs(ids_TK, e)
    n_pairs = int(right.end_E[-1])
    for name in ("pair_P", "row_P"):
        assert torch.equal(getattr(found, name)[:n_pairs].long(), getattr(right, name)[:n_pairs]), name
    n_tokens = ids_TK.shape[0]
    assert bool(((found.row_P >= 0) & (found.row_P < n_tokens)).all()), "a gather by all entries would leave the rows"
    assert bool(((found.pair_P >= 0) & (found.pair_P < ids_TK.numel())).all())
    for name in ("place_P", "end_E", "bound_B"):
        assert torch.equal(getattr(found, name).long(), getattr(right, name).long()), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("routing", ["random", "one hot", "padding"])
def test_grouped_products_with_rows_in_one_pass_equal_the_reference(
    routing: str, activation: Activation, dtype: torch.dtype
) -> None:
    check(make_case(1, t=20, k=3, e=4, d=16, f=24, activation=activation, routing=routing), "grouped", dtype)


def test_rows_are_spread_to_the_places_that_there_are() -> None:
    case = make_case(1, t=9, k=2, e=3, d=8, f=8, activation=Activation.SWIGLU)
    routing = device_routing.sort_pairs(case.ids_TK, 3)
    n_pairs = int(routing.end_E[-1])
    assert n_pairs < case.ids_TK.numel()
    own = replace(routing, pair_P=routing.pair_P[:n_pairs], row_P=routing.row_P[:n_pairs])
    assert torch.equal(rows.spread(case.x_TD, own, 2), pointwise.spread(case.x_TD, own, 2))


def test_memory_is_known_for_the_gpu_backends_alone() -> None:
    with pytest.raises(ValueError, match="nothing is known about the memory of backend 'loop'"):
        Rows(1, 1, 1, ExpertShape(d_model=8, d_ff=8), item_bytes=2, backend="loop")


# T, K, E, D, F: rows that weigh more than weights do, and wide experts, where the weights' gradients are most.
_LONG, _WIDE = ((3000, 2, 2, 512, 256), (3000, 2, 16, 512, 4096)) if DEVICE == "cuda" else (
    (200, 2, 2, 192, 96), (100, 2, 4, 64, 512)
)  # fmt: skip
Size = tuple[int, int, int, int, int]


def sized_case(size: Size, backend: str) -> tuple[Case, Rows]:
    """Every token with all its experts."""
    t, k, e, d, f = size
    case = make_case(0, t=t, k=k, e=e, d=d, f=f, activation=Activation.SWIGLU).to(torch.bfloat16)
    case = replace(case, ids_TK=case.ids_TK.clamp(min=0))
    return case, Rows(t, k, e, ExpertShape(d_model=d, d_ff=f), item_bytes=2, backend=backend)


@pytest.mark.parametrize(("size", "fresh"), [(_LONG, False), (_LONG, True), (_WIDE, True)])
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_autograd_takes_the_memory_that_planning_counts_on(backend: str, size: Size, fresh: bool) -> None:
    case, counted = sized_case(size, backend)
    args = (case.x_TD, case.ids_TK, case.gates_TK, case.weights)

    def step() -> tuple[object, ...]:
        y_TD, saved = moe_ffn_forward(*args, keep=True, backend=backend)
        return y_TD, choose(*args[:2], case.weights, backend).backward(case.dy_TD, *args, saved, fresh=fresh)

    assert peak_bytes(step) == pytest.approx(autograd_bytes(counted, fresh=fresh), rel=0.05)


@pytest.mark.parametrize("size", [_LONG, _WIDE])
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_a_dispatch_takes_the_memory_that_planning_counts_on(backend: str, size: Size) -> None:
    case, counted = sized_case(size, backend)
    args = (case.x_TD, case.ids_TK, case.gates_TK, case.weights)

    def step() -> tuple[object, ...]:
        y_TD, saved = moe_ffn_forward(*args, keep=True, backend=backend)
        return y_TD, moe_ffn_backward(case.dy_TD, *args, saved, backend=backend)

    assert peak_bytes(step) == pytest.approx(dispatch_bytes(counted), rel=0.05)


@pytest.mark.parametrize(("size", "calls"), [(_WIDE, 1), (_LONG, 3), (_WIDE, 3)])
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_the_weights_gradients_take_the_memory_that_planning_counts_on(backend: str, size: Size, calls: int) -> None:
    case, counted = sized_case(size, backend)
    staged: list[WeightCall] = []
    for part in split_case(case, calls):
        args = (part.x_TD, part.ids_TK, part.gates_TK, part.weights)
        *_, work = moe_ffn_backward(part.dy_TD, *args, None, backend=backend)
        staged.append(WeightCall(part.dy_TD, part.x_TD, part.ids_TK, work))
    taken = peak_bytes(lambda: moe_ffn_weight_grads(staged, case.weights))
    assert taken == pytest.approx(weight_grads_bytes(counted, merged=calls > 1), rel=0.05)
