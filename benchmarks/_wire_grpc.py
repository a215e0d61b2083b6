# pyright: basic, reportCallIssue=false
"""Echo over grpc.aio without anything of ours: raw bytes, and a stock protobuf message with a `bytes` field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
import grpc.aio
from _processes import say
from _wire_common import ROUND_TRIP_TIMEOUT_S, RoundTrip, run_side
from torch import Tensor

from moe_net.proto.v1.expert_pb2 import ForwardReply, ForwardRequest
from moe_net.rpc.grpc_client import channel_options
from moe_net.wire.validate import Limits

OPTIONS = channel_options(Limits())


async def raw(request: bytes, context: Any) -> bytes:
    del context
    return request


async def protobuf(request: ForwardRequest, context: Any) -> ForwardReply:
    del context
    return ForwardReply(y_data=request.x_data)


async def serve() -> None:
    server = grpc.aio.server(options=OPTIONS)
    handlers = {
        "Raw": grpc.unary_unary_rpc_method_handler(raw),
        "Protobuf": grpc.unary_unary_rpc_method_handler(
            protobuf,
            request_deserializer=ForwardRequest.FromString,
            response_serializer=ForwardReply.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say(event="ready", address=f"127.0.0.1:{port}")
    await server.wait_for_termination()


async def connect(address: str) -> Mapping[str, RoundTrip]:
    channel = grpc.aio.insecure_channel(address, options=OPTIONS)
    await channel.channel_ready()
    raw_call = channel.unary_unary("/echo/Raw")
    protobuf_call = channel.unary_unary(
        "/echo/Protobuf",
        request_serializer=ForwardRequest.SerializeToString,
        response_deserializer=ForwardReply.FromString,
    )

    async def raw_trip(x_RD: Tensor) -> int:
        # gRPC takes bytes only: this copy is part of any use of it.
        return len(await raw_call(x_RD.numpy().tobytes(), timeout=ROUND_TRIP_TIMEOUT_S))

    async def protobuf_trip(x_RD: Tensor) -> int:
        request = ForwardRequest(x_data=x_RD.numpy().tobytes())
        reply = await protobuf_call(request, timeout=ROUND_TRIP_TIMEOUT_S)
        return len(reply.y_data)

    return {"raw": raw_trip, "protobuf": protobuf_trip}


if __name__ == "__main__":
    run_side(serve, connect)
