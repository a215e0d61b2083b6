"""Calls that last: watches, reflection and fetches have few places, and nobody can hold those of others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from moe_net.client import make_banks
from moe_net.config import RunConfig
from moe_net.experts.host import ExpertHost
from moe_net.model.config import ModelConfig
from moe_net.proto.v1 import expert_pb2, expert_pb2_grpc
from moe_peer.server import MAX_FETCHES, SERVICE, ExpertServer
from moe_peer.streams import MAX_REFLECTIONS, MAX_WATCHES, FewReflections

RUN = RunConfig(name="long", model=ModelConfig(d_model=512, d_ff_expert=512, n_layers=1, n_experts=2))
"""Its state, 20 MB, does not fit into what gRPC sends to a client that does not read."""


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[tuple[ExpertServer, grpc.aio.Channel, Any]]:
    """(server, channel, stub)"""
    host = ExpertHost(make_banks(RUN, RUN.model.expert_ids))
    async with ExpertServer.serving(host, run=RUN, peer_id="p", listen="127.0.0.1:0", **settings) as server:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(server.address, options=options) as channel:
            yield server, channel, expert_pb2_grpc.ExpertServiceStub(channel)


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def test_idle_watches_and_reflections_are_few_and_take_nobodys_place() -> None:
    async with serving(max_concurrent_calls=MAX_WATCHES + MAX_REFLECTIONS + 4) as (_, channel, stub):
        health: Any = health_pb2_grpc.HealthStub(channel)
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest(service=SERVICE)) for _ in range(MAX_WATCHES)]
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        streams = [reflection.ServerReflectionInfo() for _ in range(MAX_REFLECTIONS)]
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        for stream in streams:
            await stream.write(question)
            assert (await stream.read()).HasField("list_services_response")
        for _ in range(20):  # these go at once, and leave no trace
            code, details = await refused(health.Watch(health_pb2.HealthCheckRequest(), timeout=30).read())
            assert (code, "at most" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
            code, details = await refused(reflection.ServerReflectionInfo(timeout=30).read())
            assert (code, "at most" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        assert (await stub.Info(expert_pb2.InfoRequest(), timeout=30)).peer_id == "p"
        watches.pop().cancel()
        async with asyncio.timeout(30):
            while not await is_taken(health.Watch(health_pb2.HealthCheckRequest(), timeout=30)):
                pass
        for call in (*watches, *streams):
            call.cancel()


async def is_taken(watch: Any) -> bool:
    """It got a place."""
    try:
        await watch.read()
    except grpc.aio.AioRpcError as error:
        return error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED
    watch.cancel()
    return True


async def test_a_reflection_stream_ends_by_itself() -> None:
    server = grpc.aio.server()
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(FewReflections((SERVICE,), timeout_s=0.1), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        code, details = await refused(stub.ServerReflectionInfo(timeout=30).read())
    await server.stop(None)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "a stream may last" in details


async def to_the_end(stream: Any) -> None:
    while await stream.read():
        pass


async def test_more_fetches_at_once_than_there_is_memory_for_are_refused() -> None:
    async with serving() as (server, _, stub):
        with ExitStack() as stack:
            for _ in range(MAX_FETCHES):
                stack.enter_context(server._fetches.one())
            code, details = await refused(stub.Fetch(expert_pb2.FetchRequest(layer=0), timeout=30).read())
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "at most 2 may be" in details
        assert await stub.Fetch(expert_pb2.FetchRequest(layer=0), timeout=30).read()


async def test_a_fetch_that_nobody_reads_gives_its_place_back() -> None:
    async with serving(chunk_timeout_s=0.2, grace_s=0.0) as (server, _, stub):
        unread = [stub.Fetch(expert_pb2.FetchRequest(layer=0)) for _ in range(MAX_FETCHES)]
        for call in unread:
            await call.initial_metadata()
        async with asyncio.timeout(30):
            while server._fetches.taken:  # noqa: ASYNC110
                await asyncio.sleep(0)
        chunks = [c async for c in stub.Fetch(expert_pb2.FetchRequest(layer=0), timeout=30)]
        assert chunks[-1].sha256
        with pytest.raises(grpc.aio.AioRpcError, match="in time, then no more") as caught:
            await to_the_end(unread[0])
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
