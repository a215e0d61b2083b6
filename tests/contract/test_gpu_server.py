"""A server that reads and writes messages where its experts are: the answers of one on the CPU, within bf16."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest
import torch
from expert_calls import (
    ENCODINGS,
    HOSTED,
    RUN,
    Client,
    backward_call,
    forward_call,
    refused,
    serving,
    stock_backward,
    stock_forward,
    values,
)
from gpu_peers import device_matrices, rounded_banks
from kernel_cases import DEVICE
from torch import Tensor

from moe_net.experts.host import ExpertHost
from moe_net.kernels.device.matrices import OnDevice
from moe_net.kernels.graphed import IN_GRAPHS
from moe_net.kernels.promise import is_promise
from moe_net.rpc import grpc_client
from moe_net.types import Encoding
from moe_net.wire import codec
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitCall, ForwardAnswer, ForwardCall
from moe_net.wire.validate import Limits
from moe_peer import server
from moe_peer.landing import LandedCalls
from moe_peer.server import ExpertServer


@asynccontextmanager
async def serving_on_device(*, graphed: bool = True) -> AsyncIterator[tuple[ExpertServer, Client, ExpertHost]]:
    host = ExpertHost(rounded_banks(RUN, HOSTED, graphed=graphed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "matrices_on", device_matrices)
        async with serving(host) as (started, client):
            yield started, client, host


def assert_close(got: Tensor, right: Tensor) -> None:
    """bf16 keeps 8 bits, of x, of what lies between, and of the answer (Triton's interpreter 7); int8 as many of the
    largest of a row."""
    assert got.shape == right.shape
    assert float((got - right).norm()) <= 0.03 * float(right.norm())


def bytes_taken_in(host: ExpertHost) -> set[Encoding]:
    """By the graphs of a host's banks."""
    graphs = [bank._graphed for bank in host._banks.values() if bank._graphed is not None]
    return {encoding for graph in graphs for bucket in graph._buckets.values() for encoding in bucket._wires}


@pytest.mark.parametrize("graphed", [True, False])
@pytest.mark.parametrize("resend", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("reply_in", [None, Encoding.FP16])
async def test_answers_are_those_of_a_server_on_the_cpu(
    encoding: Encoding, reply_in: Encoding | None, resend: bool, graphed: bool
) -> None:
    call = forward_call(encoding=encoding, n_rows=70)
    back = backward_call(call, resend=resend)
    if reply_in is not None:
        call, back = replace(call, reply_encoding=reply_in), replace(back, reply_encoding=reply_in)
    async with (
        serving() as (_, cpu),
        serving_on_device(graphed=graphed) as (_, ours, host),
        serving_on_device(graphed=graphed) as (_, stock, _),
    ):
        right, answer = [await c.transport.forward(c.peer, call, timeout_s=60) for c in (cpu, ours)]
        assert_close(answer.y_RD, right.y_RD)
        assert (answer.failed_experts, answer.versions) == (right.failed_experts, right.versions)
        right_back, result = [await c.transport.backward(c.peer, back, timeout_s=60) for c in (cpu, ours)]
        assert_close(result.dx_RD, right_back.dx_RD)
        assert_close(result.gate_grad_P, right_back.gate_grad_P)
        reply = await stock.stub.Forward(stock_forward(call), timeout=60)
        assert torch.equal(values(reply.y_data, reply.y), answer.y_RD)
        gradient = await stock.stub.Backward(stock_backward(back), timeout=60)
        assert torch.equal(values(gradient.dx_data, gradient.dx), result.dx_RD)
        if graphed or DEVICE == "cuda":
            assert bytes_taken_in(host) == {encoding} & set(IN_GRAPHS if reply_in is None else ())


class BytesAlone:
    """A host's answers to calls one by one, from bytes to bytes."""

    def __init__(self, **settings: int) -> None:
        self.host = ExpertHost(rounded_banks(RUN, HOSTED, graphed=True), **settings)
        self._matrices = device_matrices(self.host.device, self.host.compute_dtype)
        self._runner = LandedCalls(self.host, self._matrices)

    def forward(self, call: ForwardCall) -> Tensor:
        message = codec.decode_forward_call(codec.encode_forward_call(call), Limits(), self._matrices)
        (answer,) = self._runner.forward_many([message]).result()
        assert isinstance(answer, ForwardAnswer)
        return codec.decode_forward_answer(codec.encode_forward_answer(answer, self._matrices), Limits()).y_RD

    def backward(self, call: BackwardCall) -> BackwardAnswer:
        message = codec.decode_backward_call(codec.encode_backward_call(call), Limits(), self._matrices)
        (answer,) = self._runner.backward_many([message]).result()
        assert isinstance(answer, BackwardAnswer)
        return codec.decode_backward_answer(codec.encode_backward_answer(answer, self._matrices), Limits())

    def sums(self, *calls: ForwardCall) -> list[Tensor]:
        """The gradients of these calls, once they are committed."""
        ids = tuple(call.call_id for call in calls)
        answer = self.host.commit(CommitCall(trainer=calls[0].trainer, step=calls[0].step, tokens=1, calls=ids))
        assert (answer.missing, answer.not_finite) == ((), ())
        state = self.host.fetch(calls[0].layer, ())
        return [value for name, value in sorted(state.items()) if ".g_" in name]


@pytest.mark.parametrize("encoding", [Encoding.INT8, Encoding.BF16])
def test_a_repeated_gradient_that_comes_as_bytes_is_answered_and_counts_once(encoding: Encoding) -> None:
    peer, once, call = BytesAlone(), BytesAlone(), forward_call(encoding=encoding)
    for one in (peer, once):
        one.forward(call)
        first = one.backward(backward_call(call, resend=True))
    again = peer.backward(backward_call(call, resend=True))
    assert_close(again.dx_RD, first.dx_RD)
    assert all(torch.equal(*pair) for pair in zip(peer.sums(call), once.sums(call), strict=True))


@pytest.mark.parametrize("encoding", [Encoding.INT8, Encoding.BF16])
def test_a_gradient_that_came_as_bytes_counts_if_it_is_named(encoding: Encoding) -> None:
    kept, unnamed = (forward_call(encoding=encoding, seed=seed) for seed in (0, 1))
    both, one = BytesAlone(), BytesAlone()
    for peer, calls in ((both, (unnamed, kept)), (one, (kept,))):
        for call in calls:
            peer.forward(call)
            peer.backward(backward_call(call))
    for staged in both.host._staging._calls.values():  # rows, of which all can be made, and no message's memory
        assert staged.grad is not None
        assert not is_promise(staged.grad.grad_RD)
        assert not is_promise(staged.inputs.x_RD)
    sums = one.sums(kept)
    assert any(bool(grad.any()) for grad in sums)
    assert all(torch.equal(*pair) for pair in zip(both.sums(kept), sums, strict=True))


async def test_calls_of_many_sizes_at_once_whole_and_in_pieces_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [forward_call(encoding=Encoding(1 + i % 4), n_rows=20 + 13 * i % 97, seed=i) for i in range(12)]

    async def learn(client: Client) -> tuple[list[ForwardAnswer], list[BackwardAnswer], Tensor]:
        async def one(call: ForwardCall) -> tuple[ForwardAnswer, BackwardAnswer]:
            answer = await client.transport.forward(client.peer, call, timeout_s=150)
            return answer, await client.transport.backward(client.peer, backward_call(call), timeout_s=150)

        pairs = await asyncio.gather(*(one(call) for call in calls))
        commit = CommitCall(trainer="t", step=0, tokens=1, calls=tuple(call.call_id for call in calls))
        assert (await client.transport.commit(client.peer, commit, timeout_s=150)).missing == ()
        state = await client.transport.fetch(client.peer, 1, (), timeout_s=150)
        sums = torch.cat([value.flatten() for name, value in sorted(state.items()) if ".g_" in name])
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs], sums

    monkeypatch.setattr(grpc_client, "IN_PIECES_BYTES", 2000)  # of the longer half
    async with serving() as (_, cpu), serving_on_device() as (_, client, _):
        right, got = await learn(cpu), await learn(client)
    for answers, expected in zip(got[:2], right[:2], strict=True):
        for one, two in zip(answers, expected, strict=True):
            assert_close(*(a.y_RD if isinstance(a, ForwardAnswer) else a.dx_RD for a in (one, two)))
    assert got[2].numel() > 100
    assert_close(got[2], right[2])


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_what_is_not_finite_is_refused_and_changes_nothing(encoding: Encoding) -> None:
    sound = forward_call(encoding=encoding)
    x_RD = sound.rows.x_RD.clone()
    x_RD[3, 5] = float("nan")
    poisoned = replace(sound, rows=replace(sound.rows, x_RD=x_RD))
    async with serving_on_device() as (_, client, _):
        code, reason = await refused(client.stub.Forward(stock_forward(poisoned), timeout=60))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "x: holds an infinity or NaN")
        code, _ = await refused(client.stub.Backward(stock_backward(backward_call(sound)), timeout=60))
        assert code is grpc.StatusCode.FAILED_PRECONDITION, "the inputs of a refused Forward were kept"
        await client.stub.Forward(stock_forward(sound), timeout=60)
        back = replace(backward_call(sound), grad_RD=x_RD)
        code, reason = await refused(client.stub.Backward(stock_backward(back), timeout=60))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert reason.startswith("grad: holds")
        await client.transport.backward(client.peer, backward_call(sound), timeout_s=60)


@pytest.mark.parametrize("n_columns", [1, 64, 2**21])
async def test_a_gradient_of_another_width_never_reaches_the_device(
    n_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel is made for each width: that takes minutes, or fails, and with it whatever calls run together."""
    landed: list[Tensor] = []
    for way in ("land", "land_later"):
        monkeypatch.setattr(OnDevice, way, lambda _, x_RD, *_reply: landed.append(x_RD))
    sound = forward_call(encoding=Encoding.INT8)
    wide = replace(backward_call(sound), grad_RD=torch.ones(1, n_columns))
    async with serving_on_device() as (_, client, _):
        code, reason = await refused(client.stub.Backward(stock_backward(wide), timeout=60))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert reason == f"grad: rows of {n_columns} columns, the run has expert_width={RUN.model.d_model}"
        assert not landed


async def test_the_gpu_has_the_next_call_before_it_has_done_one_and_no_answer_goes_before_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, asked = OnDevice.arrival, threading.Semaphore(0)
    arrived: list[threading.Event] = []

    class Arrival:
        def __init__(self, matrices: OnDevice) -> None:
            self._real, self._now = real(matrices), threading.Event()
            arrived.append(self._now)
            asked.release()

        def query(self) -> bool:
            return self._now.is_set() and self._real.query()

        def synchronize(self) -> None:
            assert self._now.wait(60)
            self._real.synchronize()

    monkeypatch.setattr(OnDevice, "arrival", lambda matrices: Arrival(matrices))
    calls = [forward_call(encoding=Encoding.INT8, seed=seed) for seed in range(3)]
    async with serving() as (_, cpu), serving_on_device() as (_, client, _), asyncio.TaskGroup() as group:
        right = [await cpu.transport.forward(cpu.peer, call, timeout_s=60) for call in calls]
        tasks = [group.create_task(client.transport.forward(client.peer, call, timeout_s=60)) for call in calls[:2]]
        for _ in tasks:
            assert await asyncio.to_thread(asked.acquire, timeout=60), "both are with the device"
        tasks.append(group.create_task(client.transport.forward(client.peer, calls[2], timeout_s=60)))
        await client.transport.info(client.peer, timeout_s=60)  # the third is here by now
        assert len(arrived) == 2
        assert not any(task.done() for task in tasks)
        arrived[0].set()
        assert await asyncio.to_thread(asked.acquire, timeout=60)
        for one in arrived[1:]:
            one.set()
        answers = [await task for task in tasks]
    for answer, expected in zip(answers, right, strict=True):
        assert_close(answer.y_RD, expected.y_RD)


@pytest.mark.parametrize("what", ["forward_many", "backward_many"])
def test_nothing_is_on_its_way_when_an_error_lets_the_messages_go(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = ExpertHost(rounded_banks(RUN, HOSTED, graphed=True))
    matrices = device_matrices(host.device, host.compute_dtype)
    waited: list[str] = []

    class Arrival:
        def synchronize(self) -> None:
            waited.append(what)

    def fails(_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(host, what, fails)
    monkeypatch.setattr(matrices, "arrival", Arrival)
    with pytest.raises(RuntimeError, match="out of memory"):
        getattr(LandedCalls(host, matrices), what)([])
    assert waited == [what]
