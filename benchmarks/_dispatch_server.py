# pyright: basic
"""A server's calls on the GPU: what it computes, and the same from the bytes of calls to the bytes of answers. The
weights' gradients are made of each call by itself, which is the least that a commit can name."""

from __future__ import annotations

import asyncio

import numpy as np
import torch
from _dispatch_task import Step, Task

from moe_net.client import make_banks
from moe_net.config import RunConfig
from moe_net.experts.host import ExpertHost
from moe_net.kernels.device.matrices import OnDevice
from moe_net.kernels.dispatch import WeightCall, moe_ffn_weight_grads
from moe_net.kernels.graphed import GraphedExperts
from moe_net.kernels.promise import landed
from moe_net.kernels.types import ExpertWeights
from moe_net.model.config import ModelConfig, RouterConfig
from moe_net.types import Encoding
from moe_net.wire import codec
from moe_net.wire.matrices import Matrices
from moe_net.wire.messages import BackwardCall, ForwardCall, RoutedRows
from moe_net.wire.validate import Limits
from moe_peer.landing import LandedCalls
from moe_peer.server import ExpertServer


def dispatch(task: Task) -> Step:
    """What a server computes for a call of all tokens."""
    weights = ExpertWeights(task.w_in_EDH, task.w_out_EFD, task.activation)
    experts = GraphedExperts(weights)
    args = (task.x_TD, task.sent(task.ids_TK), task.sent(task.gates_TK))

    def step() -> tuple[torch.Tensor | None, ...]:
        y_TD, saved = experts.forward(*args, keep=True)
        dx_TD, dgates_TK, work = experts.backward(task.dy_TD, *args, saved, keep=True)
        assert work is not None
        new = moe_ffn_weight_grads([WeightCall(task.dy_TD, task.x_TD, task.ids_TK, work)], weights)
        torch.cuda.current_stream().synchronize()
        return y_TD, dx_TD, dgates_TK, *new

    return step


def payloads(task: Task) -> Step:
    """The same from int8 rows in pinned memory to int8 rows in pinned memory, as a server reads and writes them."""
    n_rows, width = task.x_TD.shape
    weights = ExpertWeights(task.w_in_EDH, task.w_out_EFD, task.activation)
    experts = GraphedExperts(weights)
    ids_TK, gates_TK = task.sent(task.ids_TK), task.sent(task.gates_TK)
    matrices = OnDevice(task.x_TD.device, task.x_TD.dtype)
    x_N, dy_N = (
        matrices.write(matrices.ship(rows_TD, Encoding.INT8), Encoding.INT8) for rows_TD in (task.x_TD, task.dy_TD)
    )
    matrices.arrival().synchronize()

    def step() -> tuple[torch.Tensor | None, ...]:
        x = matrices.land_later(matrices.read(x_N, n_rows, width, Encoding.INT8, "x"), Encoding.INT8)
        y_TD, saved = experts.forward(x, ids_TK, gates_TK, keep=True)
        sent = matrices.ship(y_TD, Encoding.INT8)
        matrices.arrival().synchronize()
        matrices.write(sent, Encoding.INT8)
        dy = matrices.land_later(matrices.read(dy_N, n_rows, width, Encoding.INT8, "dy"), Encoding.INT8)
        dx_TD, dgates_TK, work = experts.backward(dy, landed(x), ids_TK, gates_TK, saved, keep=True)
        assert work is not None
        sent = matrices.ship(dx_TD, Encoding.INT8)
        arrival = matrices.arrival()
        # The answer does not wait for the weights' gradients; the next step does.
        moe_ffn_weight_grads([WeightCall(landed(dy), landed(x), task.ids_TK, work)], weights)
        arrival.synchronize()
        matrices.write(sent, Encoding.INT8)
        return y_TD, dx_TD, dgates_TK, None, None

    return step


def _server(task: Task) -> ExpertServer:
    """Of experts with the task's weights; it listens nowhere."""
    n_experts, d_model, _ = task.w_in_EDH.shape
    model = ModelConfig(
        d_model=d_model, d_ff_expert=task.w_out_EFD.shape[1], n_layers=1, n_experts=n_experts,
        router=RouterConfig(experts_per_token=task.ids_TK.shape[1]), activation=task.activation.value,
    )  # fmt: skip
    run = RunConfig(name="benchmark", model=model, global_batch_tokens=2**40)
    (bank,) = make_banks(run, model.expert_ids, device="cuda").values()
    bank._weights.w_in_EDH.copy_(task.w_in_EDH)
    bank._weights.w_out_EFD.copy_(task.w_out_EFD)
    bank._weights_changed()
    return ExpertServer(ExpertHost({bank.layer: bank}), run=run, peer_id="p")


def _count(host: ExpertHost, call_id: bytes) -> None:
    """Make the weights' gradients of a staged call, as the step does whose commit names it, and forget it."""
    staged = host._staging._calls[call_id]
    host._banks[staged.facts.layer].gradients([[host._to_count(staged)]])
    host._staging._drop(call_id)


class _Calls:
    """A Forward and its Backward as bytes, where a server has them that came in pieces; each time under another id."""

    def __init__(self, task: Task, matrices: Matrices, trainer: str) -> None:
        n_rows, n_choices = task.ids_TK.shape
        rows = RoutedRows(
            x_RD=task.x_TD.float().cpu(),
            experts_per_row_R=torch.full((n_rows,), n_choices, dtype=torch.int32),
            expert_index_P=task.ids_TK.reshape(-1).int().cpu(),
            gate_P=task.gates_TK.reshape(-1).cpu(),
        )
        call_id = bytes(range(200, 208)) + trainer.encode().ljust(8)
        common = {"call_id": call_id, "trainer": trainer, "step": 0, "layer": 0, "encoding": Encoding.INT8}
        messages = (
            codec.encode_forward_call(ForwardCall(**common, rows=rows, reply_encoding=Encoding.INT8)),
            codec.encode_backward_call(
                BackwardCall(**common, grad_RD=task.dy_TD.float().cpu(), reply_encoding=Encoding.INT8)
            ),
        )
        self._raw: list[memoryview] = []
        self._ids: list[np.ndarray] = []
        for message in messages:
            there = matrices.room(len(message))
            there[:] = message
            start = message.index(call_id)
            self._raw.append(there)
            self._ids.append(np.frombuffer(there, np.uint8)[start : start + 16])
        self._turn = 0

    @property
    def call_id(self) -> bytes:
        return self._ids[0].tobytes()

    def next(self) -> list[memoryview]:
        self._turn += 1
        for call_id in self._ids:
            call_id[:8] = np.frombuffer(self._turn.to_bytes(8, "little"), np.uint8)
        return self._raw


def one_by_one(task: Task) -> Step:
    """All that a server does between a call's bytes and its answer's, on one thread: read and check the message, look
    the call up, dispatch, stage, write; then its weights' gradients."""
    server = _server(task)
    # Whole batches, which a swarm would cut.
    limits = Limits(max_message_bytes=2**30, max_matrix_bytes=2**31)
    matrices, device = server._matrices, task.x_TD.device
    experts = LandedCalls(server._host, matrices)
    calls = _Calls(task, matrices, "one")

    def step() -> tuple[torch.Tensor | None, ...]:
        forward, backward = calls.next()
        answer = experts.forward_many([codec.decode_forward_call(forward, limits, matrices)]).result()[0]
        codec.forward_answer_parts(answer, matrices)
        back = experts.backward_many([codec.decode_backward_call(backward, limits, matrices)]).result()[0]
        codec.backward_answer_parts(back, matrices)
        _count(server._host, calls.call_id)
        dgates_TK = back.gate_grad_P.view(task.gates_TK.shape).to(device)
        return answer.y_RD.payload.source, back.dx_RD.payload.source, dgates_TK, None, None

    return step


class _Context:
    """Of a call, as far as a server asks it."""

    @staticmethod
    def time_remaining() -> float:
        return 60.0


def served(task: Task) -> Step:
    """As one peer serves three trainers, without gRPC: its loop, its codec's and its device's thread. A step is the
    time from one call's weights' gradients to the next one's."""
    server = _server(task)
    loop = asyncio.new_event_loop()
    answered: asyncio.Queue[None] = asyncio.Queue(3)

    async def trainer(name: str) -> None:
        calls = _Calls(task, server._matrices, name)
        while True:
            forward, backward = calls.next()
            await server._forward(forward, _Context, write=codec.forward_answer_parts)
            await server._backward(backward, _Context, write=codec.backward_answer_parts)
            await server._device.run(_count, server._host, calls.call_id)
            await answered.put(None)

    owned = (server._device, server._codec, server._batcher)

    async def begin() -> list[asyncio.Task[None]]:
        for one in owned:
            await one.__aenter__()
        return [asyncio.create_task(trainer(f"t{i}")) for i in range(3)]

    tasks = loop.run_until_complete(begin())

    async def end() -> None:
        for running in tasks:
            running.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for one in reversed(owned):
            await one.__aexit__(None, None, None)
        await loop.shutdown_default_executor()

    def step() -> tuple[torch.Tensor | None, ...]:
        for running in tasks:
            assert not running.done(), running
        loop.run_until_complete(answered.get())
        return None, None, None, None, None

    step.close = lambda: (loop.run_until_complete(end()), loop.close())
    return step
