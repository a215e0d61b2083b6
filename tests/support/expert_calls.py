"""Calls to an ExpertService, as messages of a stock client and as ours; a server to send them to."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from moe_net.client import make_banks
from moe_net.config import RunConfig
from moe_net.experts.host import ExpertHost
from moe_net.model.config import ModelConfig, RouterConfig
from moe_net.proto.v1 import expert_pb2, expert_pb2_grpc, tensor_pb2
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.types import Encoding, PeerInfo
from moe_net.wire import compress
from moe_net.wire.messages import BackwardCall, CommitCall, ForwardCall, RoutedRows
from moe_peer.server import ExpertServer

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


def commit_of(of: ForwardCall, *others: bytes, tokens: int = RUN.global_batch_tokens) -> CommitCall:
    """Of the call's step: it counts, and so shall `others`."""
    return CommitCall(trainer=of.trainer, step=of.step, tokens=tokens, calls=(of.call_id, *others))


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
