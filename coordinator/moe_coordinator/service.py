"""CoordinatorService over gRPC, with health and reflection beside it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moe_net.proto.v1 import coordinator_pb2, coordinator_pb2_grpc

SERVICE = "moe_net.v1.CoordinatorService"
# Calls still running at a stop get this long.
STOP_GRACE_S = 1.0


class CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Answers newcomers with what does not change while the process lives."""

    def __init__(self, *, manifest_json: str, dht_addresses: Sequence[str]) -> None:
        self._reply = coordinator_pb2.GetRunReply(manifest_json=manifest_json, dht_addresses=dht_addresses)

    async def GetRun(
        self,
        request: coordinator_pb2.GetRunRequest,
        context: grpc.aio.ServicerContext[coordinator_pb2.GetRunRequest, coordinator_pb2.GetRunReply],
    ) -> coordinator_pb2.GetRunReply:
        return self._reply


@asynccontextmanager
async def running_server(servicer: CoordinatorServicer, listen: str) -> AsyncGenerator[str]:
    """A serving gRPC server; yields its `host:port`. ValueError when `listen` cannot be bound."""
    # Otherwise a second coordinator shares the port silently, and newcomers are dealt out to two swarms.
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(servicer, server)
    # The stub package knows only the threaded servicer.
    health_servicer = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ValueError(f"cannot listen on {listen}: {error}") from error
    await server.start()
    try:
        for name in ("", SERVICE):
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        yield f"{listen.rpartition(':')[0]}:{port}"
    finally:
        await health_servicer.enter_graceful_shutdown()
        await server.stop(STOP_GRACE_S)
