"""Replicas that share their gradients over real gRPC, and what a broken or forged share leaves."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from grpc import StatusCode
from swarms import small_run
from torch import Tensor

from moe_net.client import make_banks
from moe_net.experts.host import ExpertHost
from moe_net.placement.view import View
from moe_net.proto.v1 import expert_pb2
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.grpc_client import SERVICE, GrpcTransport
from moe_net.types import ExpertId, PeerInfo
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitCall, RoutedRows
from moe_net.wire.share import MAX_COMMITS, MAX_SHARED_EXPERTS, ShareCall, commit_key, max_share_bytes
from moe_net.wire.snapshot import pack
from moe_peer import server as server_module
from moe_peer.server import MAX_SHARES, ExpertServer
from moe_peer.sharing import STRANGERS_FACTOR

RUN = small_run()
D, SHAPE = RUN.model.d_model, RUN.model.expert_shape
BATCH = b"b" * 32


@dataclass
class Pair:
    hosts: list[ExpertHost]
    servers: list[ExpertServer]
    peers: list[PeerInfo]
    transport: GrpcTransport
    steps: int = field(default=0)

    async def step(self, *which: int) -> None:
        """Each of these servers has a gradient of its own, and hears of the commit that names it."""
        calls = {i: gradient(self.steps, 10 * self.steps + i) for i in which}
        for i, call in calls.items():
            assert isinstance(self.hosts[i].backward_many([call])[0], BackwardAnswer)
        await asyncio.gather(
            *(self.transport.commit(self.peers[i], commit_of(call), timeout_s=30) for i, call in calls.items())
        )
        self.steps += 1


def commit_of(*calls: BackwardCall) -> CommitCall:
    """The one that ends their step."""
    return CommitCall(
        trainer="t", step=calls[0].step, tokens=RUN.global_batch_tokens, calls=tuple(call.call_id for call in calls)
    )


def gradient(step: int, seed: int) -> BackwardCall:
    draw = torch.Generator().manual_seed(seed)
    rows = RoutedRows(
        x_RD=torch.randn(8, D, generator=draw),
        experts_per_row_R=torch.ones(8, dtype=torch.int32),
        expert_index_P=torch.randint(0, RUN.model.n_experts, (8,), generator=draw, dtype=torch.int32),
        gate_P=torch.ones(8),
    )
    return BackwardCall(
        call_id=(seed + 1).to_bytes(16, "big"), trainer="t", step=step, layer=1,
        grad_RD=torch.randn(8, D, generator=draw), rows=rows,
    )  # fmt: skip


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    hosts = [ExpertHost(make_banks(RUN, RUN.model.expert_ids, origin=1 + i)) for i in range(2)]
    async with AsyncExitStack() as stack:
        transport = GrpcTransport(run=RUN.name, shape=SHAPE)
        stack.push_async_callback(transport.close)
        servers = [
            await stack.enter_async_context(
                ExpertServer.serving(host, run=RUN, peer_id=name, listen="127.0.0.1:0", grace_s=1.0)
            )
            for name, host in zip("ab", hosts, strict=True)
        ]
        peers = [
            PeerInfo(peer_id=name, address=server.address, experts=RUN.model.expert_ids)
            for name, server in zip("ab", servers, strict=True)
        ]
        for server in servers:
            server.sharing.begin(transport.share, lambda: View(peers))
        yield Pair(hosts, servers, peers, transport)


def everything(host: ExpertHost) -> list[Tensor]:
    return [v for layer in host.versions for _, v in sorted(host.fetch(layer, (), with_sums=False).items())]


async def test_two_that_get_half_of_the_rows_each_stay_equal_to_the_bit_and_close_to_one() -> None:
    one = ExpertHost(make_banks(RUN, RUN.model.expert_ids, origin=9))
    async with pair() as p:
        for step in range(5):
            calls = [gradient(step, 10 * step + i) for i in range(2)]
            for call in calls:
                one.backward_many([call])
            one.commit(commit_of(*calls))
            await p.step(0, 1)
        a, b = map(everything, p.hosts)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert all(value.any() for name, value in one.fetch(1, (), with_sums=False).items() if name.endswith("m_in")), (
            "all have learned"
        )
        for name, value in one.fetch(1, (), with_sums=False).items():
            if not name.endswith("lineage"):
                torch.testing.assert_close(p.hosts[0].fetch(1, ())[name], value, rtol=1e-4, atol=1e-6)


async def test_one_that_is_gone_or_behind_does_not_hold_up_the_other() -> None:
    async with pair() as p:
        await p.step(0, 1)
        # b hears of no commit: a goes on without it, and soon does not even ask.
        for _ in range(4):
            await p.step(0)
        assert p.hosts[0].versions[1] == dict.fromkeys(range(RUN.model.n_experts), 5)
        await p.servers[1].stop(grace_s=0)
        for _ in range(4):
            await p.step(0)
        assert p.hosts[0].versions[1] == dict.fromkeys(range(RUN.model.n_experts), 9)


async def test_a_replica_whose_steps_end_at_other_commits_says_where_it_is() -> None:
    async with pair() as p:
        calls = [CommitCall(trainer="t", step=i, tokens=RUN.global_batch_tokens // 2) for i in range(3)]
        for call in calls:
            await asyncio.gather(*(p.transport.commit(peer, call, timeout_s=30) for peer in p.peers))
        asked = ShareCall(batch=BATCH, experts=RUN.model.expert_ids, commits=tuple(map(commit_key, calls[1:])))
        share = await p.transport.share(p.peers[0], asked, timeout_s=10)
        assert (share.experts, share.committed_tokens) == ({}, calls[2].tokens)


def request(batch: bytes = BATCH, layer: int = 1, n_commits: int = 0, n_experts: int = 2) -> bytes:
    experts = [expert_pb2.LayerExperts(layer=layer, expert_index=range(n_experts))]
    return expert_pb2.ShareRequest(batch=batch, experts=experts, commit=range(n_commits)).SerializeToString()


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"\xff\xff\xff", StatusCode.INVALID_ARGUMENT),
        (request(batch=b""), StatusCode.INVALID_ARGUMENT),
        (request(batch=bytes(33)), StatusCode.INVALID_ARGUMENT),
        (request(n_commits=MAX_COMMITS + 1), StatusCode.INVALID_ARGUMENT),
        (request(n_experts=MAX_SHARED_EXPERTS + 1), StatusCode.OUT_OF_RANGE),
        (request(), StatusCode.DEADLINE_EXCEEDED),
    ],
)
async def test_a_wrong_request_gets_a_status(raw: bytes, code: StatusCode) -> None:
    async with pair() as p, grpc.aio.insecure_channel(p.peers[0].address) as channel:
        call = channel.unary_stream(SERVICE + "Share")(raw, timeout=0.3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is code


async def test_a_step_that_is_over_is_refused_at_once_and_unknown_experts_are_left_out() -> None:
    async with pair() as p:
        await p.step(0, 1)
        batch = p.servers[0].sharing._batch
        strange = (*RUN.model.expert_ids, ExpertId(77, 5))
        share = await p.transport.share(p.peers[0], ShareCall(batch=batch, experts=strange), timeout_s=10)
        assert share.origin == 1
        assert share.experts.keys() < set(RUN.model.expert_ids)
        await p.step(0, 1)
        with pytest.raises(CallError) as caught:
            await p.transport.share(p.peers[0], ShareCall(batch=batch, experts=strange), timeout_s=10)
        assert caught.value.failure is CallFailure.INPUTS_GONE


async def test_waiting_for_no_real_batch_takes_no_place_of_those_that_are_sent_a_share() -> None:
    async with pair() as p, grpc.aio.insecure_channel(p.peers[0].address) as channel:
        ask = channel.unary_stream(SERVICE + "Share")
        calls = [ask(request(batch=bytes([i]) * 32), timeout=0.5) for i in range(MAX_SHARES + 4)]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED


async def test_those_who_ask_at_once_are_sent_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, made, pack_it = threading.Event(), threading.Semaphore(0), server_module._pack

    def gated(*arguments: Any) -> tuple[bytes, bytes]:
        made.release()
        assert gate.wait(30)
        return pack_it(*arguments)

    async with pair() as p:
        await p.step(0, 1)
        call = ShareCall(batch=p.servers[0].sharing._batch, experts=RUN.model.expert_ids)
        monkeypatch.setattr(server_module, "_pack", gated)
        asking = [asyncio.create_task(p.transport.share(p.peers[0], call, timeout_s=2.5)) for _ in range(6)]
        async with asyncio.timeout(2):
            while p.servers[0]._shares.taken < len(asking):  # noqa: ASYNC110
                await asyncio.sleep(0)
        gate.set()
        shares = await asyncio.gather(*asking)
        assert all(share.experts.keys() == shares[0].experts.keys() for share in shares)
        assert made.acquire(blocking=False)
        assert not made.acquire(blocking=False), "made once"


def forged(state: dict[str, Tensor]) -> list[bytes]:
    data = pack(state, run=RUN.name, shape=SHAPE)
    chunk = expert_pb2.FetchChunk(data=data, sha256=hashlib.sha256(data).digest())
    return [chunk.SerializeToString()]


def some_share(index: int = 0, value: float = 0.0) -> dict[str, Tensor]:
    sums = {"g_in": (D, SHAPE.d_hidden), "g_out": (SHAPE.d_ff, D)}
    grads = {f"1.{index}.{name}": torch.full(size, value) for name, size in sums.items()}
    return {"origin": torch.tensor(7), "clock": torch.tensor(1), f"1.{index}.rows": torch.tensor([3, 0]), **grads}


LIES: dict[str, Callable[[], list[bytes]]] = {
    "nothing": list,
    "no protobuf": lambda: [b"\xff\xff"],
    "no file": lambda: [expert_pb2.FetchChunk(data=b"x", sha256=hashlib.sha256(b"x").digest()).SerializeToString()],
    "an expert that was not asked": lambda: forged(some_share(5)),
    "not finite": lambda: forged(some_share(value=float("inf"))),
    "without end": lambda: [expert_pb2.FetchChunk(data=bytes(1 << 20)).SerializeToString()] * 64,
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_replica_that_answers_badly_is_left_out(lie: str) -> None:
    async def stream(raw: bytes, context: Any) -> AsyncIterator[bytes]:
        for chunk in LIES[lie]():
            yield chunk

    server = grpc.aio.server()
    handlers = {"Share": grpc.unary_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.strip("/"), handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    liar = PeerInfo(peer_id="liar", address=f"127.0.0.1:{port}", experts=(ExpertId(1, 0), ExpertId(1, 1)))
    async with pair() as p:
        with pytest.raises(CallError) as caught:
            await p.transport.share(liar, ShareCall(batch=BATCH, experts=liar.experts), timeout_s=10)
        assert caught.value.failure is CallFailure.REFUSED
        assert p.transport.traffic.received_bytes < max_share_bytes(2, SHAPE) + (2 << 20)
        p.servers[0].sharing.begin(p.transport.share, lambda: View([liar]))
        p.servers[1].sharing.begin(p.transport.share, lambda: View(()))
        await p.step(0, 1)
        assert all(set(lineage.seen) <= {1} for lineage in p.hosts[0]._banks[1].lineages.values())
        assert p.hosts[0].versions[1][0] == 1
    await server.stop(0)


async def test_many_who_send_junk_are_not_asked_all_at_once() -> None:
    asked, left = 0, asyncio.Event()

    async def stream(raw: bytes, context: Any) -> AsyncIterator[bytes]:
        nonlocal asked
        asked += 1
        await left.wait()
        yield b"junk"

    server = grpc.aio.server()
    handlers = {"Share": grpc.unary_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.strip("/"), handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sybils = [PeerInfo(peer_id=f"s{i}", address=f"127.0.0.1:{port}", experts=RUN.model.expert_ids) for i in range(24)]
    async with pair() as p:
        p.servers[0].sharing.begin(p.transport.share, lambda: View([*sybils, p.peers[1]]))
        p.servers[1].sharing.begin(p.transport.share, lambda: View([p.peers[0]]))
        await p.step(0, 1)
        assert 0 < asked <= STRANGERS_FACTOR
    left.set()
    await server.stop(0)
