"""Calls through graphs and their shared buffers give what single calls give, in whatever order they come."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch_quack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, TOLERANCE, Case, make_case

from moe_net.kernels import graphed, grouped
from moe_net.kernels.device import rows
from moe_net.kernels.device.matrices import OnDevice
from moe_net.kernels.dispatch import moe_ffn_backward, moe_ffn_forward, moe_ffn_weight_grads
from moe_net.kernels.graphed import BUCKETS, MAX_CHOICES, GraphedExperts, bucket_of
from moe_net.kernels.promise import is_promise, landed, payload_of, take_sent
from moe_net.kernels.types import ExpertWeights, WeightCall, WeightGrads
from moe_net.types import Activation, Encoding
from moe_net.wire import compress


def call(seed: int, n_tokens: int, k: int = 2) -> Case:
    return make_case(seed, t=n_tokens, k=k, e=3, d=8, f=8, activation=Activation.SWIGLU)


def grads_by_loop(calls: list[tuple[Case, torch.Tensor, torch.Tensor]], weights: ExpertWeights) -> WeightGrads:
    """Of calls (case, dy, x), from the beginning."""
    staged: list[WeightCall] = []
    for case, dy_TD, x_TD in calls:
        *_, work = moe_ffn_backward(dy_TD, x_TD, case.ids_TK, case.gates_TK, weights, None, rows=False, backend="loop")
        staged.append(WeightCall(dy_TD, x_TD, case.ids_TK, work))
    return moe_ffn_weight_grads(staged, weights)


def backward_by_loop(dy_TD: torch.Tensor, x_TD: torch.Tensor, case: Case, weights: ExpertWeights) -> list[torch.Tensor]:
    """dx and dgates."""
    dx_TD, dgates_TK, _ = moe_ffn_backward(dy_TD, x_TD, case.ids_TK, case.gates_TK, weights, None, backend="loop")
    assert dx_TD is not None
    return [dx_TD, dgates_TK]


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


def same(got: torch.Tensor, right: torch.Tensor) -> None:
    tolerance = TOLERANCE[torch.float32] * 10
    torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance)


def has_pairs(case: Case) -> bool:
    return bool((case.ids_TK >= 0).any())


@given(steps=STEPS)
@settings(max_examples=16, suppress_health_check=[HealthCheck.too_slow])
def test_interleaved_calls_equal_single_ones(steps: list[tuple[str, int, Encoding | None]]) -> None:
    weights = call(0, 1).weights
    experts, waiting = GraphedExperts(weights, backend="triton"), []
    staged: list[WeightCall] = []
    done: list[tuple[Case, torch.Tensor, torch.Tensor]] = []
    for number, (step, value, encoding) in enumerate(steps):
        if step != "backward":
            case = call(number + 1, value, k=1 + value % 2)
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
            dy, dy_TD = coming(case.dy_TD, encoding)
            same(landed(x), x_TD)
            dx, dgates, work = experts.backward(dy, landed(x), case.ids_TK, case.gates_TK, saved, keep=True)
            for got, right in zip((dx, dgates), backward_by_loop(dy_TD, x_TD, case, weights), strict=True):
                same(got, right)
            assert encoding is None or payload_of(dy).rows is not None
            same(landed(dy), dy_TD)
            check_sent(dx, encoding)
            if has_pairs(case):
                assert work is not None
                staged.append(WeightCall(landed(dy), landed(x), case.ids_TK, work))
                done.append((case, dy_TD, x_TD))
    if staged:
        for got, right in zip(moe_ffn_weight_grads(staged, weights), grads_by_loop(done, weights), strict=True):
            same(got, right)


# Sizes (tokens, choices) of calls: one that fills its bucket, one with many rows of padding behind it, and several, two
# of them of one bucket.
@pytest.mark.parametrize("sizes", [[(16, 2)], [(17, 2)], [(3, 3), (20, 1), (40, 2), (16, 2), (39, 2)]], ids=str)
@pytest.mark.parametrize("backend", ["triton", "grouped", "grouped in one pass", "quack"])
def test_what_is_kept_of_calls_makes_the_weights_gradients_that_the_loop_makes(
    backend: str, sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float32
    if backend == "quack":
        torch_quack.install(monkeypatch)
        dtype = torch.bfloat16
    elif backend == "grouped in one pass":
        monkeypatch.setattr(grouped, "_row_functions", lambda x_TD: rows)  # as on a GPU
    cases = [call(4 * number, *size).to(dtype) for number, size in enumerate(sizes)]
    weights = cases[0].weights
    experts, staged = GraphedExperts(weights, backend=backend.split()[0]), []
    for case in cases:
        args = (case.x_TD, case.ids_TK, case.gates_TK)
        *_, work = experts.backward(case.dy_TD, *args, experts.forward(*args, keep=True)[1], keep=True)
        assert work is not None
        n_pairs = int((case.ids_TK >= 0).sum())
        assert [value.shape[0] for value in (*work.a, *work.dh)] == [n_pairs] * 2, "padding is kept"
        staged.append(WeightCall(case.dy_TD, case.x_TD, case.ids_TK, work))
    expected = grads_by_loop([(case, case.dy_TD, case.x_TD) for case in cases], weights)
    tolerance = TOLERANCE[dtype] * 4
    for got, right in zip(moe_ffn_weight_grads(staged, weights), expected, strict=True):
        torch.testing.assert_close(got.float(), right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


def test_a_call_without_a_pair_keeps_what_adds_nothing() -> None:
    empty, other = make_case(1, t=9, k=2, e=3, d=8, f=8, activation=Activation.SWIGLU, routing="padding"), call(2, 9)
    weights = empty.weights
    experts, staged = GraphedExperts(weights, backend="triton"), []
    for case in (empty, other):
        *_, work = experts.backward(case.dy_TD, case.x_TD, case.ids_TK, case.gates_TK, None, keep=True)
        assert work is not None
        staged.append(WeightCall(case.dy_TD, case.x_TD, case.ids_TK, work))
    for n_calls in (1, 2):
        assert not any(bool(grad.any()) for grad in moe_ffn_weight_grads(staged[:1] * n_calls, weights))
    alone = moe_ffn_weight_grads(staged[1:], weights)
    for got, right in zip(moe_ffn_weight_grads(staged, weights), alone, strict=True):
        same(got, right)


def test_calls_of_two_backends_with_layouts_of_their_own_are_summed_up_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch_quack.install(monkeypatch)
    cases = [call(4 * number, 20).to(torch.bfloat16) for number in range(3)]
    weights = cases[0].weights
    experts = {backend: GraphedExperts(weights, backend=backend) for backend in ("triton", "quack")}
    staged: list[WeightCall] = []
    for case, backend in zip(cases, ("triton", "quack", "triton"), strict=True):
        *_, work = experts[backend].backward(case.dy_TD, case.x_TD, case.ids_TK, case.gates_TK, None, keep=True)
        assert work is not None
        staged.append(WeightCall(case.dy_TD, case.x_TD, case.ids_TK, work))
    expected = grads_by_loop([(case, case.dy_TD, case.x_TD) for case in cases], weights)
    tolerance = TOLERANCE[torch.bfloat16] * 4
    for got, right in zip(moe_ffn_weight_grads(staged, weights), expected, strict=True):
        torch.testing.assert_close(got.float(), right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


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
    dx, dgates, nothing = experts.backward(case.dy_TD[:9], *few, first, keep=False)
    assert nothing is None
    part = replace(case, x_TD=few[0], ids_TK=few[1], gates_TK=few[2])
    for got, right in zip((dx, dgates), backward_by_loop(case.dy_TD[:9], few[0], part, case.weights), strict=True):
        same(got, right)


def test_a_call_that_fails_half_way_into_a_bucket_takes_nothing_from_the_one_that_it_is_kept_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = call(1, 9), call(2, 9)
    experts = GraphedExperts(first.weights, backend="triton")
    args = (first.x_TD, first.ids_TK, first.gates_TK)
    _, saved = experts.forward(*args, keep=True)

    def broken(_: graphed._Wire, _data: torch.Tensor, _n: int, buffer_BD: torch.Tensor) -> None:
        buffer_BD.fill_(7.0)
        raise RuntimeError("no memory for a graph")

    with monkeypatch.context() as patch:
        patch.setattr(graphed._Wire, "take_in", broken)
        with pytest.raises(RuntimeError, match="no memory for a graph"):
            experts.forward(coming(second.x_TD, Encoding.INT8)[0], second.ids_TK, second.gates_TK, keep=True)
    dx, dgates, work = experts.backward(first.dy_TD, *args, saved, keep=True)
    assert work is not None
    staged = [WeightCall(first.dy_TD, first.x_TD, first.ids_TK, work)]
    right = backward_by_loop(first.dy_TD, first.x_TD, first, first.weights)
    grads = grads_by_loop([(first, first.dy_TD, first.x_TD)], first.weights)
    found = (dx, dgates, *moe_ffn_weight_grads(staged, first.weights))
    for got, value in zip(found, (*right, *grads), strict=True):
        same(got, value)
