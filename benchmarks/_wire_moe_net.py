# pyright: basic
"""Echo through our own Forward: real server, real client transport, a host that gives each row back as it came.

The server decodes, checks shapes and that every value is finite, queues, hands over to the device thread and encodes;
the client encodes, decodes and checks the answer. Only the experts are missing.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from _moe_net_run import EXPERTS, LAYER, PEER, make_run, peer_at
from _processes import say
from _wire_common import D_MODEL, ROUND_TRIP_TIMEOUT_S, RoundTrip, rows_of, run_side
from torch import Tensor

from moe_net.client import make_banks
from moe_net.errors import ExpertCallError, WireError
from moe_net.experts.host import ExpertHost
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.types import Encoding
from moe_net.wire import codec
from moe_net.wire.messages import ForwardAnswer, ForwardCall, RoutedRows
from moe_net.wire.validate import Limits, check_finite
from moe_peer.server import ExpertServer

RUN = make_run(D_MODEL, 1)
VERSIONS = {0: 0}  # of the one expert that `make_call` asks


class EchoHost(ExpertHost):
    """Experts that do nothing."""

    def forward_many(self, calls: Sequence[ForwardCall]) -> list[ForwardAnswer | ExpertCallError | WireError]:
        return [ForwardAnswer(y_RD=call.rows.x_RD, versions=VERSIONS, encoding=call.reply_encoding) for call in calls]


def make_call(x_RD: Tensor) -> ForwardCall:
    """One expert per row; no Backward will follow."""
    n_rows = x_RD.shape[0]
    rows = RoutedRows(
        x_RD=x_RD,
        experts_per_row_R=torch.ones(n_rows, dtype=torch.int32),
        expert_index_P=torch.zeros(n_rows, dtype=torch.int32),
        gate_P=torch.ones(n_rows),
    )
    return ForwardCall(
        call_id=os.urandom(16),
        trainer="benchmark",
        step=0,
        layer=LAYER,
        rows=rows,
        train=False,
        encoding=Encoding.FP32,
        reply_encoding=Encoding.FP32,
    )


async def serve() -> None:
    server = ExpertServer(EchoHost(make_banks(RUN, EXPERTS)), run=RUN, peer_id=PEER)
    await server.start("127.0.0.1:0")
    try:
        say(event="ready", address=server.address)
        await asyncio.Event().wait()
    finally:
        await server.stop(grace_s=0.0)


async def connect(address: str) -> Mapping[str, RoundTrip]:
    transport = GrpcTransport(run=RUN.name, shape=RUN.model.expert_shape)
    peer = peer_at(address)

    async def forward(x_RD: Tensor) -> int:
        answer = await transport.forward(peer, make_call(x_RD), timeout_s=ROUND_TRIP_TIMEOUT_S)
        return answer.y_RD.nbytes

    return {"forward": forward}


def _median_s(work: Callable[[], object]) -> float:
    taken_s: list[float] = []
    for _ in range(20):
        start_s = time.perf_counter()
        work()
        taken_s.append(time.perf_counter() - start_s)
    return median(taken_s)


def measure_parts(payload_bytes: int) -> dict[str, dict[str, float]]:
    """Seconds of what our code does in one round trip, each alone and warm."""
    limits, x_RD = Limits(), rows_of(payload_bytes)
    call, answer = make_call(x_RD), ForwardAnswer(y_RD=x_RD, versions=VERSIONS)
    request, reply = codec.encode_forward_call(call), codec.encode_forward_answer(answer)
    return {
        "parts_s": {
            "encode request": _median_s(lambda: codec.encode_forward_call(call)),
            "decode request (checks of values included)": _median_s(lambda: codec.decode_forward_call(request, limits)),
            "encode reply": _median_s(lambda: codec.encode_forward_answer(answer)),
            "decode reply (checks of values included)": _median_s(lambda: codec.decode_forward_answer(reply, limits)),
            "finite check alone": _median_s(lambda: check_finite(x_RD, "x")),
            "copy into bytes": _median_s(lambda: x_RD.numpy().tobytes()),
        }
    }


if __name__ == "__main__":
    run_side(serve, connect, {"parts": measure_parts})
