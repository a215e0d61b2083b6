"""ExpertService as its clients see it: a stock protobuf client, our own, and what each refusal is called."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from expert_calls import (
    ENCODINGS,
    HOSTED,
    RUN,
    Client,
    D,
    Gated,
    backward_call,
    begun,
    commit_of,
    forward_call,
    new_host,
    refused,
    serving,
    stock_backward,
    stock_forward,
    values,
    waiting_rows,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from wire_calls import varint

from moe_coordinator.proxy import Proxy
from moe_net.client import make_banks
from moe_net.config import RunConfig
from moe_net.errors import MoeNetError
from moe_net.experts.host import ExpertHost
from moe_net.model.config import ModelConfig
from moe_net.proto.v1 import expert_pb2
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.grpc_client import MAX_CONNECTIONS, GrpcTransport
from moe_net.types import Encoding
from moe_net.wire.messages import CommitCall, ForwardAnswer, ForwardCall
from moe_net.wire.snapshot import unpack
from moe_net.wire.validate import Limits
from moe_peer import server as server_module
from moe_peer.server import SERVICE, ExpertServer


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
        unknown = b"u" * 16
        request = expert_pb2.CommitRequest(trainer="t", step=0, tokens=100, call_id=[call.call_id, unknown])
        commit = await ours.transport.commit(ours.peer, commit_of(call, unknown), timeout_s=10)
        done = await stock.stub.Commit(request, timeout=10)
        assert commit.stepped is done.stepped is True
        assert commit.missing == tuple(done.missing_call_id) == (unknown,)
        for layer in (0, 1):
            states = [await client.transport.fetch(client.peer, layer, (), timeout_s=10) for client in (ours, stock)]
            assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
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
        again = await client.transport.backward(client.peer, backward_call(call), timeout_s=10)
        resent = await client.transport.backward(client.peer, backward_call(call, resend=True), timeout_s=10)
        commit = commit_of(call, tokens=1)
        assert (await client.transport.commit(client.peer, commit, timeout_s=10)).missing == ()
    assert torch.equal(first.dx_RD, again.dx_RD)
    assert torch.equal(first.dx_RD, resent.dx_RD)
    once = new_host()
    once.backward_many([backward_call(call, resend=True)])
    once.commit(commit)
    assert any(value.any() for name, value in once.fetch(1, ()).items() if name.endswith("g_in"))
    assert all(torch.equal(host.fetch(1, ())[name], value) for name, value in once.fetch(1, ()).items())


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


@pytest.mark.parametrize("method", ["Forward", "Backward"])
async def test_a_call_that_costs_too_much_is_refused_before_it_waits(method: str) -> None:
    """One valid message of 30 MiB, of many experts per row, took four gigabytes."""
    host = ExpertHost(make_banks(RUN, HOSTED), pairs_bytes=5 * 2 * (D + 2 * 6) * 4 - 1)
    call = forward_call()
    async with serving(host) as (server, client):
        if method == "Forward":
            asked = client.stub.Forward(stock_forward(call), timeout=10)
        else:
            asked = client.stub.Backward(stock_backward(backward_call(call, resend=True)), timeout=10)
        code, details = await refused(asked)
        assert code is grpc.StatusCode.OUT_OF_RANGE
        assert "5 rows of up to 2 experts take 800 bytes" in details
        assert not server._batcher._flights


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


async def learn(client: Client) -> None:
    """A step of both layers' experts."""
    call = forward_call()
    await client.transport.forward(client.peer, call, timeout_s=10)
    await client.transport.backward(client.peer, backward_call(call), timeout_s=10)
    await client.transport.commit(client.peer, commit_of(call), timeout_s=10)


async def test_one_that_leaves_waits_for_the_trainer_that_saves_what_it_has_learned() -> None:
    async with serving() as (server, client), asyncio.timeout(60):
        health: Any = health_pb2_grpc.HealthStub(client.channel)
        await learn(client)
        leaving = asyncio.create_task(server.leave(grace_s=60))
        while (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING:
            pass
        for layer in (0, 1):
            assert not leaving.done()
            await client.transport.fetch(client.peer, layer, (), timeout_s=10)
        began_s = time.monotonic()
        await leaving
        assert time.monotonic() - began_s < server_module.LINGER_S


async def test_one_that_leaves_waits_no_longer_than_it_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "LINGER_S", 60.0)
    async with serving() as (server, client), asyncio.timeout(30):
        await server.leave(grace_s=60)  # nothing was learned
        await learn(client)
        await server.leave(grace_s=0.1)
    monkeypatch.setattr(server_module, "LINGER_S", 0.1)
    async with serving() as (server, client), asyncio.timeout(30):
        await learn(client)
        await server.leave(grace_s=60)


async def test_the_grace_of_what_runs_begins_with_the_leaving() -> None:
    host = Gated()
    async with serving(host) as (server, client):
        running = client.stub.Forward(stock_forward(forward_call()), timeout=60)
        await begun(host)
        await server.leave(grace_s=0.5)
        await asyncio.sleep(0.5)
        stopping = asyncio.create_task(server.stop(grace_s=0.5))
        async with asyncio.timeout(0.4):
            await refused(running)
        host.gate.set()
        await stopping


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


async def test_calls_at_once_take_few_connections_and_calls_one_by_one_a_single_one() -> None:
    calls = [forward_call(seed=seed) for seed in range(3 * MAX_CONNECTIONS)]
    async with serving() as (server, client), Proxy(server.address) as proxy:
        peer = replace(client.peer, address=proxy.address)
        transport = GrpcTransport(run=RUN.name, shape=RUN.model.expert_shape)
        for call in calls[:3]:
            await transport.forward(peer, call, timeout_s=60)
        assert proxy.accepted == 1
        await asyncio.gather(*(transport.forward(peer, call, timeout_s=60) for call in calls))
        assert proxy.accepted == MAX_CONNECTIONS
        # All are cut, and nobody answers: what failed is let go, so that nothing waits for a peer that is back.
        proxy.cut(math.inf)
        failed = await asyncio.gather(
            *(transport.forward(peer, call, timeout_s=60) for call in calls), return_exceptions=True
        )
        assert {error.failure for error in failed if isinstance(error, CallError)} == {CallFailure.UNREACHABLE}
        assert len(failed) == len(calls)
        assert len(transport._connections[peer.address]) == 1
        proxy.end_cut()
        async with asyncio.timeout(30):
            answer: ForwardAnswer | BaseException = CallError(CallFailure.UNREACHABLE, "p", "not asked yet")
            while isinstance(answer, CallError):  # refused at once, until the first one connects again
                (answer,) = await asyncio.gather(
                    transport.forward(peer, calls[0], timeout_s=60), return_exceptions=True
                )
        assert isinstance(answer, ForwardAnswer)
        await transport.close()
