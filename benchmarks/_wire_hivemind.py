# pyright: basic, reportAttributeAccessIssue=false
"""Echo of a serialized tensor over hivemind's P2P: one unary call, or one stream of parts as its MoE client sends them.

Unary messages are limited to MAX_UNARY_PAYLOAD_SIZE (2 MiB); its client turns to streams above that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

# hivemind recognises a stream by the name of typing's hint; that of collections.abc has none.
from typing import AsyncIterator  # noqa: UP035

from _hivemind_fixes import sockets_in_tmpdir
from _processes import say
from _wire_common import LOST, ROUND_TRIP_TIMEOUT_S, RoundTrip, run_side
from hivemind.compression import deserialize_tensor_stream, deserialize_torch_tensor, serialize_torch_tensor
from hivemind.p2p import P2P, P2PContext, ServicerBase
from hivemind.p2p.p2p_daemon_bindings.control import DEFAULT_MAX_MSG_SIZE
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse
from hivemind.utils.asyncio import amap_in_executor, iter_as_aiter
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.streaming import split_for_streaming
from torch import Tensor


class EchoServicer(ServicerBase):
    async def rpc_unary(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        (x_RD,) = (deserialize_torch_tensor(tensor) for tensor in request.tensors)
        return ExpertResponse(tensors=[serialize_torch_tensor(x_RD)])

    async def rpc_stream(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        (x_RD,) = await deserialize_tensor_stream(amap_in_executor(lambda request: request.tensors, requests))
        for part in split_for_streaming(serialize_torch_tensor(x_RD), DEFAULT_MAX_MSG_SIZE):
            yield ExpertResponse(tensors=[part])


async def serve() -> None:
    p2p = await P2P.create(host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    try:
        await EchoServicer().add_p2p_handlers(p2p)
        say(event="ready", address=str((await p2p.get_visible_maddrs())[0]))
        await asyncio.Event().wait()
    finally:
        await p2p.shutdown()


async def connect(address: str) -> Mapping[str, RoundTrip]:
    p2p = await P2P.create(initial_peers=[address], host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    server = next(peer.peer_id for peer in await p2p.list_peers() if str(peer.peer_id) in str(Multiaddr(address)))
    stub = EchoServicer.get_stub(p2p, server)

    async def unary(x_RD: Tensor) -> int:
        reply = await stub.rpc_unary(ExpertRequest(tensors=[serialize_torch_tensor(x_RD)]), ROUND_TRIP_TIMEOUT_S)
        return deserialize_torch_tensor(reply.tensors[0]).nbytes

    async def stream(x_RD: Tensor) -> int:
        parts = split_for_streaming(serialize_torch_tensor(x_RD), DEFAULT_MAX_MSG_SIZE)
        requests = amap_in_executor(lambda part: ExpertRequest(tensors=[part]), iter_as_aiter(parts))
        replies = await stub.rpc_stream(requests)
        tensors = await deserialize_tensor_stream(amap_in_executor(lambda reply: reply.tensors, replies))
        # Under load some streams end without a reply and without an error.
        return tensors[0].nbytes if tensors else LOST

    return {"unary": unary, "stream": stream}


if __name__ == "__main__":
    sockets_in_tmpdir()
    run_side(serve, connect)
