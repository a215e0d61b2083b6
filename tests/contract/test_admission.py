"""What a server admits: a bounded queue, bounded memory, no wait beyond the caller's deadline."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
from expert_calls import (
    RUN,
    Gated,
    backward_call,
    begun,
    forward_call,
    new_host,
    refused,
    serving,
    stock_backward,
    stock_forward,
    waiting_rows,
)

from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.types import PeerInfo
from moe_net.wire.matrices import INLINE_BYTES
from moe_net.wire.validate import Limits
from moe_peer.batcher import Kind
from moe_peer.server import SERVICE, ExpertServer


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
