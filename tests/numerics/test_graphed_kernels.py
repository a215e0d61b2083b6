"""Calls through graphs and their shared buffers give what single calls give, in whatever order they come."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, TOLERANCE, Case, make_case

from moe_net.kernels import graphed
from moe_net.kernels.device.matrices import OnDevice
from moe_net.kernels.dispatch import moe_ffn_backward, moe_ffn_forward
from moe_net.kernels.graphed import BUCKETS, MAX_CHOICES, GraphedExperts, bucket_of
from moe_net.kernels.promise import Payload, is_promise, landed, payload_of, take_sent
from moe_net.kernels.types import zero_sums
from moe_net.types import Activation, Encoding
from moe_net.wire import compress


def call(seed: int, n_tokens: int) -> Case:
    return make_case(seed, t=n_tokens, k=2, e=3, d=8, f=8, activation=Activation.SWIGLU)


# What a call's rows, or its gradient, come as: themselves, or the bytes of a message.
COMES_AS = st.sampled_from([None, Encoding.INT8, Encoding.BF16])
# Steps of a history: a forward of so many tokens (forget: nothing is kept), or the backward of one of the open calls.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("forward"), st.integers(1, 30), COMES_AS),
        st.tuples(st.just("forget"), st.integers(1, 30), COMES_AS),
        st.tuples(st.just("backward"), st.integers(0, 5), COMES_AS),
    ),
    max_size=7,
)


def coming(rows_TD: torch.Tensor, encoding: Encoding | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(what comes, the rows that it says)."""
    if encoding is None:
        return rows_TD, rows_TD
    data = compress.encode(rows_TD.cpu(), encoding)
    matrices = OnDevice(rows_TD.device, rows_TD.dtype)
    promised = matrices.land_later(matrices.read(data, *rows_TD.shape, encoding, "x"), encoding)
    assert is_promise(promised)
    return promised, compress.decode(data, *rows_TD.shape, encoding).to(rows_TD.device)


def check_sent(got: torch.Tensor, encoding: Encoding | None) -> None:
    """Bytes that came are answered by bytes, which say what the rows are."""
    sent = take_sent(got)
    assert (None if sent is None else sent.encoding) == encoding
    if sent is not None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        said = compress.decode(compress.memory_of(sent.data_N), *got.shape, sent.encoding)
        error = (said - got.cpu()).abs().amax(1)
        assert bool((error <= got.cpu().abs().amax(1) / 120).all())


@given(steps=STEPS)
@settings(max_examples=16, suppress_health_check=[HealthCheck.too_slow])
def test_interleaved_calls_equal_single_ones(steps: list[tuple[str, int, Encoding | None]]) -> None:
    weights = call(0, 1).weights
    sums, expected = zero_sums(weights), zero_sums(weights)
    experts, waiting = GraphedExperts(weights, sums, backend="triton"), []
    tolerance = TOLERANCE[torch.float32] * 10

    def same(got: torch.Tensor, right: torch.Tensor) -> None:
        torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance)

    for number, (step, value, encoding) in enumerate(steps):
        if step != "backward":
            case = call(number + 1, value)
            x, x_TD = coming(case.x_TD, encoding)
            args = (case.ids_TK, case.gates_TK)
            y, saved = experts.forward(x, *args, keep=step == "forward")
            same(y, moe_ffn_forward(x_TD, *args, weights, keep=False, backend="loop")[0])
            check_sent(y, encoding)
            if encoding is not None and step == "forward":
                assert payload_of(x).rows is not None, "its bytes need not be kept"
            waiting.append((case, x, x_TD, saved))
        elif waiting:
            case, x, x_TD, saved = waiting.pop(value % len(waiting))
            args = (case.ids_TK, case.gates_TK)
            dy, dy_TD = coming(case.dy_TD, encoding)
            same(landed(x), x_TD)
            dx, dgates, _ = experts.backward(dy, landed(x), *args, saved)
            right = moe_ffn_backward(dy_TD, x_TD, *args, weights, None, weight_grads=expected, backend="loop")
            same(dx, right[0])
            same(dgates, right[1])
            assert encoding is None or payload_of(dy).rows is not None
            same(landed(dy), dy_TD)
            check_sent(dx, encoding)
    experts.settle()
    for got, right in zip(sums, expected, strict=True):
        same(got, right)


@pytest.mark.parametrize("next_step", ["settle", "forward", "backward"])
def test_the_answer_to_bytes_does_not_wait_for_gradients_that_are_added_once_before_anything_else(
    next_step: str,
) -> None:
    case = call(1, 9)
    sums, expected = zero_sums(case.weights), zero_sums(case.weights)
    experts = GraphedExperts(case.weights, sums, backend="triton")
    args = (case.x_TD, case.ids_TK, case.gates_TK)
    _, saved = experts.forward(*args, keep=True)
    dy, dy_TD = coming(case.dy_TD, Encoding.INT8)
    dx, _, _ = experts.backward(dy, *args, saved)
    right, _ = moe_ffn_backward(dy_TD, *args, case.weights, None, weight_grads=expected, backend="loop")
    torch.testing.assert_close(dx, right, rtol=3e-5, atol=3e-5)
    assert not any(bool(grad.any()) for grad in sums)
    other = call(2, 9)
    if next_step == "forward":  # of another call, over the same buffers
        experts.forward(other.x_TD, other.ids_TK, other.gates_TK, keep=True)
    elif next_step == "backward":
        experts.backward(torch.zeros_like(other.dy_TD), other.x_TD, other.ids_TK, other.gates_TK, None)
    for _ in range(2):
        experts.settle()
        for got, value in zip(sums, expected, strict=True):
            torch.testing.assert_close(got, value, rtol=3e-5, atol=3e-5)


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


def test_nothing_is_added_when_there_is_no_room_for_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    case = call(1, 9)
    sums = zero_sums(case.weights)
    experts = GraphedExperts(case.weights, sums, backend="triton")
    args = (case.x_TD, case.ids_TK, case.gates_TK)
    _, saved = experts.forward(*args, keep=True)
    dy, _ = coming(case.dy_TD, Encoding.INT8)

    def full(*_: object) -> Payload:
        raise RuntimeError("no pinned memory")

    with monkeypatch.context() as patch:
        patch.setattr(graphed._Wire, "message", full)
        with pytest.raises(RuntimeError, match="no pinned memory"):
            experts.backward(dy, *args, saved)
    experts.settle()
    assert not any(bool(grad.any()) for grad in sums)


def test_a_call_that_fails_half_way_into_a_bucket_takes_nothing_from_the_one_that_it_is_kept_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = call(1, 9), call(2, 9)
    sums, expected = zero_sums(first.weights), zero_sums(first.weights)
    experts = GraphedExperts(first.weights, sums, backend="triton")
    args = (first.x_TD, first.ids_TK, first.gates_TK)
    _, saved = experts.forward(*args, keep=True)

    def broken(_: graphed._Wire, _data: torch.Tensor, _n: int, buffer_BD: torch.Tensor) -> None:
        buffer_BD.fill_(7.0)
        raise RuntimeError("no memory for a graph")

    with monkeypatch.context() as patch:
        patch.setattr(graphed._Wire, "take_in", broken)
        with pytest.raises(RuntimeError, match="no memory for a graph"):
            experts.forward(coming(second.x_TD, Encoding.INT8)[0], second.ids_TK, second.gates_TK, keep=True)
    dx, dgates, _ = experts.backward(first.dy_TD, *args, saved)
    right = moe_ffn_backward(first.dy_TD, *args, first.weights, None, weight_grads=expected, backend="loop")
    for got, value in zip((dx, dgates, *sums), (*right, *expected), strict=True):
        torch.testing.assert_close(got, value, rtol=3e-5, atol=3e-5)
