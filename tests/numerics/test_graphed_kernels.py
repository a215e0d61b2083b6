"""Calls through graphs and their shared buffers give what single calls give, in whatever order they come."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, TOLERANCE, Case, make_case

from moe_net.kernels import graphed
from moe_net.kernels.dispatch import moe_ffn_backward, moe_ffn_forward
from moe_net.kernels.graphed import BUCKETS, MAX_CHOICES, GraphedExperts, bucket_of
from moe_net.kernels.types import zero_sums
from moe_net.types import Activation


def call(seed: int, n_tokens: int) -> Case:
    return make_case(seed, t=n_tokens, k=2, e=3, d=8, f=8, activation=Activation.SWIGLU)


# Steps of a history: a forward of so many tokens (0: and nothing is kept), or the backward of one of the open calls.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("forward"), st.integers(1, 30)),
        st.tuples(st.just("forget"), st.integers(1, 30)),
        st.tuples(st.just("backward"), st.integers(0, 5)),
    ),
    max_size=7,
)


@given(steps=STEPS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
def test_interleaved_calls_equal_single_ones(steps: list[tuple[str, int]]) -> None:
    weights = call(0, 1).weights
    sums, expected = zero_sums(weights), zero_sums(weights)
    experts, waiting = GraphedExperts(weights, sums, backend="triton"), []
    tolerance = TOLERANCE[torch.float32] * 10

    def same(got: torch.Tensor, right: torch.Tensor) -> None:
        torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance)

    for number, (step, value) in enumerate(steps):
        if step != "backward":
            case = call(number + 1, value)
            args = (case.x_TD, case.ids_TK, case.gates_TK)
            y, saved = experts.forward(*args, keep=step == "forward")
            same(y, moe_ffn_forward(*args, weights, keep=False, backend="loop")[0])
            waiting.append((case, saved))
        elif waiting:
            case, saved = waiting.pop(value % len(waiting))
            args = (case.x_TD, case.ids_TK, case.gates_TK)
            dx, dgates, _ = experts.backward(case.dy_TD, *args, saved)
            right = moe_ffn_backward(case.dy_TD, *args, weights, None, weight_grads=expected, backend="loop")
            same(dx, right[0])
            same(dgates, right[1])
    for got, right in zip(sums, expected, strict=True):
        same(got, right)


def test_a_call_goes_to_the_smallest_bucket_that_holds_it_and_larger_ones_to_none() -> None:
    assert [bucket_of(n) for n in (1, 16, 17, 512, 2049)] == [16, 16, 32, 512, None]
    assert list(BUCKETS) == sorted(BUCKETS)


def test_only_rows_of_the_weights_dtype_and_of_a_bucket_are_taken() -> None:
    case = call(1, 4)
    experts = GraphedExperts(case.weights)
    assert experts.takes(case.x_TD, case.ids_TK)
    assert not experts.takes(case.x_TD.bfloat16(), case.ids_TK)
    assert not experts.takes(case.x_TD, torch.zeros((2049, 2), dtype=torch.int32, device=DEVICE))
    assert not experts.takes(case.x_TD[:0], case.ids_TK[:0])
    assert not experts.takes(case.x_TD, torch.zeros((4, MAX_CHOICES + 1), dtype=torch.int32, device=DEVICE))


def test_buckets_are_few_however_many_sizes_callers_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "MAX_BUCKETS", 2)
    case = call(1, 40)
    experts = GraphedExperts(case.weights, backend="triton")
    args = (case.x_TD, case.ids_TK, case.gates_TK)
    _, first = experts.forward(*(value[:9] for value in args), keep=True)
    for n_tokens in (20, 40):
        experts.forward(*(value[:n_tokens] for value in args), keep=False)
    assert len(experts._buckets) == 2
    # The first bucket went, and with it what its forward had kept: the backward computes it again.
    few = tuple(value[:9] for value in args)
    dx, dgates, _ = experts.backward(case.dy_TD[:9], *few, first)
    right = moe_ffn_backward(case.dy_TD[:9], *few, case.weights, None, weight_grads=None, backend="loop")
    torch.testing.assert_close(dx, right[0], rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(dgates, right[1], rtol=3e-5, atol=3e-5)
