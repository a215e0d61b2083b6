"""ExpertService as its clients see it: a stock protobuf client, our own, and what each refusal is called."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from wire_calls import varint

from moe_net.client import make_banks
from moe_net.config import RunConfig
from moe_net.errors import MoeNetError
from moe_net.experts.host import ExpertHost
from moe_net.model.config import ModelConfig, RouterConfig
from moe_net.proto.v1 import expert_pb2, expert_pb2_grpc, tensor_pb2
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.types import Encoding, PeerInfo
from moe_net.wire import compress
from moe_net.wire.messages import BackwardCall, CommitCall, ForwardAnswer, ForwardCall, RoutedRows
from moe_net.wire.snapshot import unpack
from moe_net.wire.validate import Limits
from moe_peer.batcher import Kind
from moe_peer.server import INLINE_BYTES, SERVICE, ExpertServer

NUMBERS = itertools.count()
D = 8
RUN = RunConfig(
    name="contract",
    model=ModelConfig(
        d_model=D, d_ff_expert=6, n_layers=2, n_experts=4, n_heads=1, n_kv_heads=1, head_dim=8, init_std=0.5,
        router=RouterConfig(experts_per_token=2),
    ),
    global_batch_tokens=100,
)  # fmt: skip
HOSTED = [e for e in RUN.model.expert_ids if e.index != 3]
ENCODINGS = list(Encoding)


class Client:
    """One server's address as a stock stub, as our transport, and as a bare channel."""

    def __init__(self, server: ExpertServer) -> None:
        self.peer = PeerInfo(peer_id="p", address=server.address, experts=tuple(HOSTED))
        self.transport = GrpcTransport(run=RUN.name, shape=RUN.model.expert_shape)
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.aio.insecure_channel(server.address, options=options)
        self.stub: Any = expert_pb2_grpc.ExpertServiceStub(self.channel)

    async def close(self) -> None:
        await self.transport.close()
        await self.channel.close()


def new_host() -> ExpertHost:
    return ExpertHost(make_banks(RUN, HOSTED))


@asynccontextmanager
async def serving(host: ExpertHost | None = None, **settings: Any) -> AsyncIterator[tuple[ExpertServer, Client]]:
    async with ExpertServer.serving(
        host or new_host(), run=RUN, peer_id="p", listen="127.0.0.1:0", grace_s=5.0, **settings
    ) as server:
        client = Client(server)
        try:
            yield server, client
        finally:
            await client.close()


def forward_call(*, encoding: Encoding = Encoding.FP32, n_rows: int = 5, step: int = 0, seed: int = 0) -> ForwardCall:
    draw = torch.Generator().manual_seed(seed)
    experts = [[r % 3, 3] if r % 2 else [(r + 1) % 3] for r in range(n_rows)]
    flat = [e for row in experts for e in row]
    rows = RoutedRows(
        x_RD=torch.randn(n_rows, D, generator=draw),
        experts_per_row_R=torch.tensor([len(row) for row in experts], dtype=torch.int32),
        expert_index_P=torch.tensor(flat, dtype=torch.int32),
        gate_P=torch.rand(len(flat), generator=draw) + 0.1,
    )
    return ForwardCall(
        call_id=next(NUMBERS).to_bytes(16, "big"), trainer="t", step=step, layer=1, rows=rows,
        encoding=encoding, reply_encoding=encoding,
    )  # fmt: skip


def backward_call(of: ForwardCall, *, resend: bool = False) -> BackwardCall:
    grad = torch.randn(of.rows.x_RD.shape, generator=torch.Generator().manual_seed(9))
    return BackwardCall(
        call_id=of.call_id, trainer=of.trainer, step=of.step, layer=of.layer, grad_RD=grad,
        rows=of.rows if resend else None, encoding=of.encoding, reply_encoding=of.reply_encoding,
    )  # fmt: skip


def matrix(x_RD: torch.Tensor, encoding: Encoding) -> tensor_pb2.Matrix:
    return tensor_pb2.Matrix(rows=x_RD.shape[0], cols=x_RD.shape[1], encoding=int(encoding))  # type: ignore[arg-type]


def stock_forward(call: ForwardCall) -> expert_pb2.ForwardRequest:
    """As a client in any language would write it from the .proto alone."""
    return expert_pb2.ForwardRequest(
        call_id=call.call_id, trainer=call.trainer, step=call.step, layer=call.layer, train=call.train,
        reply_encoding=int(call.reply_encoding), x=matrix(call.rows.x_RD, call.encoding),  # type: ignore[arg-type]
        experts_per_row=call.rows.experts_per_row_R.tolist(), expert_index=call.rows.expert_index_P.tolist(),
        gate=call.rows.gate_P.tolist(), x_data=bytes(compress.encode(call.rows.x_RD, call.encoding)),
    )  # fmt: skip


def stock_backward(call: BackwardCall) -> expert_pb2.BackwardRequest:
    request = expert_pb2.BackwardRequest(
        call_id=call.call_id, trainer=call.trainer, step=call.step, layer=call.layer,
        reply_encoding=int(call.reply_encoding), grad=matrix(call.grad_RD, call.encoding),  # type: ignore[arg-type]
        grad_data=bytes(compress.encode(call.grad_RD, call.encoding)),
    )  # fmt: skip
    if call.rows is not None:
        request.x.CopyFrom(matrix(call.rows.x_RD, call.encoding))
        request.x_data = bytes(compress.encode(call.rows.x_RD, call.encoding))
        request.experts_per_row.extend(call.rows.experts_per_row_R.tolist())
        request.expert_index.extend(call.rows.expert_index_P.tolist())
        request.gate.extend(call.rows.gate_P.tolist())
    return request


def values(data: bytes, stated: tensor_pb2.Matrix) -> torch.Tensor:
    return compress.decode(memoryview(data), stated.rows, stated.cols, Encoding(stated.encoding))


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.details()
    return caught.value.code(), caught.value.details() or ""


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("resend", [False, True])
async def test_a_stock_protobuf_client_gets_the_answers_that_ours_gets(encoding: Encoding, resend: bool) -> None:
    call = forward_call(encoding=encoding)
    back = backward_call(call, resend=resend)
    async with serving() as (_, ours), serving() as (_, stock):
        answer = await ours.transport.forward(ours.peer, call, timeout_s=10)
        reply = await stock.stub.Forward(stock_forward(call), timeout=10)
        assert torch.equal(values(reply.y_data, reply.y), answer.y_RD)
        assert tuple(reply.failed_expert) == answer.failed_experts == (3,)
        assert dict(zip(reply.expert_index, reply.version, strict=True)) == answer.versions == {0: 0, 1: 0, 2: 0}
        assert reply.y.encoding == encoding
        result = await ours.transport.backward(ours.peer, back, timeout_s=10)
        gradient = await stock.stub.Backward(stock_backward(back), timeout=10)
        assert torch.equal(values(gradient.dx_data, gradient.dx), result.dx_RD)
        assert list(gradient.gate_grad) == result.gate_grad_P.tolist()
        commit = await ours.transport.commit(ours.peer, CommitCall(trainer="t", step=0, tokens=100), timeout_s=10)
        done = await stock.stub.Commit(expert_pb2.CommitRequest(trainer="t", step=0, tokens=100), timeout=10)
        assert commit.stepped is done.stepped is True
        infos = [await client.stub.Info(expert_pb2.InfoRequest(), timeout=10) for client in (ours, stock)]
        assert infos[0] == infos[1]


async def test_the_answers_are_those_of_the_host_itself() -> None:
    host, call = new_host(), forward_call()
    expected = host.forward_many([call])[0]
    assert isinstance(expected, ForwardAnswer)
    async with serving() as (_, client):
        answer = await client.transport.forward(client.peer, call, timeout_s=10)
    assert torch.equal(answer.y_RD, expected.y_RD)
    assert answer.compute_us > 0


async def test_info_says_who_this_is_and_what_it_hosts() -> None:
    async with serving(limits=Limits(max_message_bytes=1 << 20)) as (_, client):
        await client.transport.commit(client.peer, CommitCall(trainer="t", step=0, tokens=30), timeout_s=10)
        info = await client.transport.info(client.peer, timeout_s=10)
    assert (info.peer_id, info.run, info.d_model, info.d_ff, info.activation) == ("p", "contract", D, 6, "swiglu")
    assert {layer.layer: list(layer.expert_index) for layer in info.layers} == {0: [0, 1, 2], 1: [0, 1, 2]}
    assert (info.committed_tokens, info.queue_rows, info.max_message_bytes) == (30, 0, 1 << 20)


async def test_a_retried_backward_is_acknowledged_and_counted_once() -> None:
    host = new_host()
    async with serving(host) as (_, client):
        call = forward_call()
        await client.transport.forward(client.peer, call, timeout_s=10)
        first = await client.transport.backward(client.peer, backward_call(call), timeout_s=10)
        grads = [g.clone() for g in host._banks[1]._optimizer.grads]
        again = await client.transport.backward(client.peer, backward_call(call), timeout_s=10)
        resent = await client.transport.backward(client.peer, backward_call(call, resend=True), timeout_s=10)
    assert [first.repeated, again.repeated, resent.repeated] == [False, True, True]
    assert torch.equal(first.dx_RD, again.dx_RD)
    assert all(torch.equal(now, then) for now, then in zip(host._banks[1]._optimizer.grads, grads, strict=True))


def changed(call: ForwardCall, change: Callable[[expert_pb2.ForwardRequest], object]) -> expert_pb2.ForwardRequest:
    request = stock_forward(call)
    change(request)
    return request


REFUSED: dict[str, tuple[Callable[[expert_pb2.ForwardRequest], object], grpc.StatusCode, str]] = {
    "layer": (lambda r: setattr(r, "layer", 7), grpc.StatusCode.NOT_FOUND, "layer 7"),
    "an expert twice": (
        lambda r: (r.ClearField("expert_index"), r.expert_index.extend([3] * len(r.gate))),
        grpc.StatusCode.INVALID_ARGUMENT,
        "twice",
    ),
    "rows over the limit": (lambda r: setattr(r.x, "rows", 1 << 28), grpc.StatusCode.OUT_OF_RANGE, "the limit is"),
    "no rows": (lambda r: setattr(r.x, "rows", 0), grpc.StatusCode.INVALID_ARGUMENT, "x: 0 rows"),
    "encoding": (lambda r: setattr(r.x, "encoding", 9), grpc.StatusCode.INVALID_ARGUMENT, "unknown encoding 9"),
    "call id": (lambda r: setattr(r, "call_id", b"short"), grpc.StatusCode.INVALID_ARGUMENT, "call_id"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_each_refusal_has_its_status_and_its_reason(what: str) -> None:
    change, code, reason = REFUSED[what]
    async with serving() as (_, client):
        got, details = await refused(client.stub.Forward(changed(forward_call(), change), timeout=10))
    assert got is code
    assert reason in details


async def test_refusals_that_depend_on_history_have_their_own_statuses() -> None:
    async with serving() as (_, client):
        call = forward_call()
        code, details = await refused(client.stub.Backward(stock_backward(backward_call(call)), timeout=10))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "send them along" in details
        await client.transport.commit(client.peer, CommitCall(trainer="t", step=3, tokens=1), timeout_s=10)
        late = stock_backward(backward_call(call, resend=True))
        code, details = await refused(client.stub.Backward(late, timeout=10))
        assert code is grpc.StatusCode.ABORTED
        assert "committed step 3" in details
        alone = replace(
            call.rows,
            x_RD=call.rows.x_RD[:1],
            experts_per_row_R=torch.tensor([1], dtype=torch.int32),
            expert_index_P=torch.tensor([3], dtype=torch.int32),
            gate_P=torch.ones(1),
        )
        code, details = await refused(client.stub.Forward(stock_forward(replace(call, rows=alone)), timeout=10))
        assert code is grpc.StatusCode.NOT_FOUND
        assert "3 of layer 1" in details
        code, _ = await refused(client.stub.Fetch(expert_pb2.FetchRequest(layer=5), timeout=10).read())
        assert code is grpc.StatusCode.NOT_FOUND


async def test_a_message_over_the_limit_is_refused_by_its_length() -> None:
    async with serving(limits=Limits(max_message_bytes=1 << 16)) as (_, client):
        big = stock_forward(forward_call(n_rows=4000))
        code, _ = await refused(client.stub.Forward(big, timeout=10))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await client.stub.Forward(stock_forward(forward_call()), timeout=10)).y.rows == 5


class Gated(ExpertHost):
    """A real host whose device stands still while `gate` is cleared."""

    def __init__(self) -> None:
        super().__init__(make_banks(RUN, HOSTED))
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)
        self.bug: Exception | None = None
        self.calls = 0

    def forward_many(self, calls: Sequence[ForwardCall]) -> list[Any]:
        self.begun.release()
        assert self.gate.wait(60)
        if self.bug is not None:
            raise self.bug
        self.calls += len(calls)
        return super().forward_many(calls)


async def begun(host: Gated) -> None:
    assert await asyncio.to_thread(host.begun.acquire, timeout=60)


async def waiting_rows(server: ExpertServer, queue_rows: int) -> None:
    """The given number of rows wait. (Info itself needs the device, which stands still.)"""
    async with asyncio.timeout(30):
        while server._batcher.queue_rows != queue_rows:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_full_queue_is_resource_exhausted_and_says_how_much_waits() -> None:
    host = Gated()
    async with serving(host, max_queue_rows=6) as (server, client):
        running = client.stub.Forward(stock_forward(forward_call()), timeout=30)
        await begun(host)
        waiting = client.stub.Forward(stock_forward(forward_call()), timeout=30)
        await waiting_rows(server, 5)
        code, details = await refused(client.stub.Forward(stock_forward(forward_call()), timeout=30))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "5 rows" in details
        host.gate.set()
        assert (await running).y.rows == (await waiting).y.rows == 5


@pytest.mark.parametrize("method", ["Forward", "Backward"])
async def test_messages_that_wait_to_be_read_count_towards_the_queue(method: str) -> None:
    """Large ones are read on a thread: those behind it held their memory uncounted."""
    calls = [forward_call(n_rows=50_000, seed=seed) for seed in range(3)]
    requests: list[Any] = [
        stock_forward(call) if method == "Forward" else stock_backward(backward_call(call, resend=True))
        for call in calls
    ]
    n_bytes = requests[0].ByteSize()
    assert n_bytes > INLINE_BYTES
    async with serving(max_queue_bytes=3 * n_bytes - 1) as (server, client):
        send = getattr(client.stub, method)
        gate = threading.Event()
        server._codec.submit(gate.wait, 60)
        waiting = [send(request, timeout=60) for request in requests[:2]]
        async with asyncio.timeout(30):
            while server._batcher.reserved_bytes != 2 * n_bytes:  # noqa: ASYNC110
                await asyncio.sleep(0)
        code, details = await refused(send(requests[2], timeout=60))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "MiB) wait" in details
        gate.set()
        await asyncio.gather(*waiting)
        assert (server._batcher.reserved_bytes, server._batcher.queue_bytes) == (0, 0)
        await send(requests[2], timeout=60)
        bad = replace(calls[0].rows, expert_index_P=calls[0].rows.expert_index_P + 100)
        code, _ = await refused(client.stub.Forward(stock_forward(replace(calls[0], rows=bad)), timeout=60))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert server._batcher.reserved_bytes == 0, "what is refused is not held"


@pytest.mark.parametrize(
    ("queue_mib", "message_mib", "calls"), [(256, 32, 64), (1024, 32, 256), (256, 1, 512), (8, 32, 64)]
)
def test_as_many_calls_are_taken_in_as_memory_allows(queue_mib: int, message_mib: int, calls: int) -> None:
    limits = Limits(max_message_bytes=message_mib << 20)
    server = ExpertServer(new_host(), run=RUN, peer_id="p", limits=limits, max_queue_bytes=queue_mib << 20)
    assert server._max_concurrent_calls == calls


async def test_a_wait_longer_than_the_deadline_is_refused_with_the_wait_in_the_trailing_metadata() -> None:
    host = Gated()
    host.gate.set()
    async with serving(host) as (server, client):
        await client.transport.forward(client.peer, forward_call(), timeout_s=30)
        await begun(host)
        host.gate.clear()
        # By the pace of late a row takes one second: 5 run, 5 wait.
        pace = server._batcher._row_times[Kind.FORWARD]
        pace.mean_s = pace.mean_rows = 10.0
        running = client.stub.Forward(stock_forward(forward_call()), timeout=60)
        await begun(host)
        waiting = client.stub.Forward(stock_forward(forward_call()), timeout=60)
        await waiting_rows(server, 5)
        with pytest.raises(CallError) as caught:
            await client.transport.forward(client.peer, forward_call(), timeout_s=2)
        assert caught.value.failure is CallFailure.BUSY
        assert 5 < caught.value.queue_s <= 10
        with pytest.raises(grpc.aio.AioRpcError) as stock:
            await client.stub.Backward(stock_backward(backward_call(forward_call(), resend=True)), timeout=2)
        trailing = dict(stock.value.trailing_metadata())
        assert 5e6 < int(str(trailing["moe-queue-us"])) <= 10e6
        host.gate.set()
        assert (await running).y.rows == (await waiting).y.rows == 5
    assert host.calls == 3


@pytest.mark.parametrize("said", ["", "soon", "-5", "1e9", "9" * 400, "²"])
async def test_nonsense_about_the_wait_is_no_wait_or_a_long_one(said: str) -> None:
    async def busy(_: bytes, context: Any) -> bytes:
        trailing = (("moe-queue-us", said),) if said.isascii() else (("moe-queue-us-bin", said.encode()),)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", trailing)
        raise AssertionError

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handlers = {"Forward": grpc.unary_unary_rpc_method_handler(busy)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    transport = GrpcTransport(run=RUN.name, shape=RUN.model.expert_shape)
    try:
        peer = PeerInfo(peer_id="p", address=f"127.0.0.1:{port}", experts=())
        with pytest.raises(CallError) as caught:
            await transport.forward(peer, forward_call(), timeout_s=10)
    finally:
        await transport.close()
        await server.stop(None)
    assert caught.value.failure is CallFailure.BUSY
    assert caught.value.queue_s == (10_000 if said.startswith("9") else 0)


async def test_a_call_whose_client_left_is_not_computed() -> None:
    host = Gated()
    async with serving(host) as (server, client):
        running = client.stub.Forward(stock_forward(forward_call()), timeout=30)
        await begun(host)
        left = client.stub.Forward(stock_forward(forward_call()), timeout=30)
        await waiting_rows(server, 5)
        left.cancel()
        async with asyncio.timeout(30):
            while next(iter(server._batcher._queues.values())).jobs[0].waiters:  # noqa: ASYNC110
                await asyncio.sleep(0)
        host.gate.set()
        await running
        await client.stub.Info(expert_pb2.InfoRequest(), timeout=30)
    assert host.calls == 1


async def test_a_bug_of_ours_is_internal_and_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    host = Gated()
    host.gate.set()
    host.bug = ZeroDivisionError("secret detail")
    async with serving(host) as (_, client):
        code, details = await refused(client.stub.Forward(stock_forward(forward_call()), timeout=10))
        host.bug = None
        assert (await client.stub.Forward(stock_forward(forward_call()), timeout=10)).y.rows == 5
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in details
    (record,) = [r for r in caplog.records if r.name == "moe_peer.server"]
    assert record.exc_info
    assert not issubclass(ZeroDivisionError, MoeNetError)


async def test_a_stop_finishes_what_runs_and_takes_no_more() -> None:
    host = Gated()
    async with serving(host) as (server, client):
        health: Any = health_pb2_grpc.HealthStub(client.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        running = client.stub.Forward(stock_forward(forward_call()), timeout=30)
        await begun(host)
        stopping = asyncio.create_task(server.stop(grace_s=30))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        host.gate.set()
        assert (await running).y.rows == 5
        await stopping
        code, _ = await refused(client.stub.Info(expert_pb2.InfoRequest(), timeout=10))
        assert code is grpc.StatusCode.UNAVAILABLE


async def test_health_and_reflection_answer() -> None:
    async with serving() as (_, client):
        health: Any = health_pb2_grpc.HealthStub(client.channel)
        for name in ("", SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        answers = [answer async for answer in stub.ServerReflectionInfo(asked)]
        assert SERVICE in {service.name for service in answers[0].list_services_response.service}


@pytest.mark.parametrize("indices", [(), (0, 2)])
async def test_fetch_streams_one_safetensors_file_in_chunks_with_its_checksum(indices: tuple[int, ...]) -> None:
    host = new_host()
    async with serving(host) as (_, client):
        chunks = [c async for c in client.stub.Fetch(expert_pb2.FetchRequest(layer=1, expert_index=indices))]
        state = await client.transport.fetch(client.peer, 1, indices, timeout_s=10)
    whole = b"".join(chunk.data for chunk in chunks)
    assert chunks[-1].sha256 == hashlib.sha256(whole).digest()
    assert all(not chunk.sha256 for chunk in chunks[:-1])
    own = host.fetch(1, indices)
    for got in (state, unpack(whole, run=RUN.name, shape=RUN.model.expert_shape)):
        assert got.keys() == own.keys()
        assert all(torch.equal(got[name], own[name]) for name in own)


@pytest.mark.parametrize("packed", [True, False])
async def test_a_fetch_that_asks_for_no_end_of_experts_is_refused_before_it_is_read(packed: bool) -> None:
    one = b"\x12\x01\x00"  # expert_index = [0], packed
    raw = b"\x12" + varint(2**20) + bytes(2**20) if packed else one * 2**18
    async with serving() as (_, client):
        method: Any = client.channel.unary_stream("/moe_net.v1.ExpertService/Fetch")
        code, details = await refused(method(raw, timeout=10).read())
        assert code is grpc.StatusCode.OUT_OF_RANGE
        assert "the limit" in details
        assert await method(one * 5000, timeout=10).read(), "one expert, asked for 5000 times, is one expert"


async def test_a_large_state_comes_in_chunks_of_one_mebibyte() -> None:
    model = ModelConfig(d_model=256, d_ff_expert=256, n_layers=1, n_experts=2)
    run = RunConfig(name="contract", model=model)
    host = ExpertHost(make_banks(run, run.model.expert_ids))
    async with ExpertServer.serving(host, run=run, peer_id="p", listen="127.0.0.1:0") as server:
        client = Client(server)
        chunks = [c async for c in client.stub.Fetch(expert_pb2.FetchRequest(layer=0))]
        await client.close()
    sizes = [len(chunk.data) for chunk in chunks]
    assert len(sizes) == -(-sum(sizes) // 2**20) > 4
    assert set(sizes[:-1]) == {2**20}


async def test_large_and_small_calls_go_through_at_once() -> None:
    """Over INLINE_BYTES a message is read on another thread; answers must not get mixed up."""
    host = new_host()
    calls = [forward_call(n_rows=n, seed=n) for n in (50_000, 3, 10_000, 7, 1)]
    async with serving(host) as (_, client):
        answers = await asyncio.gather(*(client.transport.forward(client.peer, call, timeout_s=30) for call in calls))
    for call, answer in zip(calls, answers, strict=True):
        expected = new_host().forward_many([call])[0]
        assert isinstance(expected, ForwardAnswer)
        np.testing.assert_allclose(answer.y_RD.numpy(), expected.y_RD.numpy(), rtol=1e-5, atol=1e-6)


async def test_a_port_that_is_taken_is_named() -> None:
    async with serving() as (server, _):
        second = ExpertServer(new_host(), run=RUN, peer_id="q")
        with pytest.raises(ValueError, match=f"cannot listen on {server.address}"):
            await second.start(server.address)
        await second.stop()
