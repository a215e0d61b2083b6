"""A joining replica over real gRPC: whose state it takes, and what it does about those who fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import torch
from swarms import small_run
from torch import Tensor

import moe_peer.server
from moe_net.client import make_banks
from moe_net.errors import BusyError
from moe_net.experts.host import ExpertHost
from moe_net.kernels.types import WeightGrads
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.types import ExpertId, PeerInfo
from moe_net.wire.messages import CommitCall
from moe_net.wire.snapshot import pack
from moe_net.wire.state import max_state_bytes
from moe_peer.catchup import catch_up, next_fetch, rank, without_peer
from moe_peer.server import ExpertServer
from moe_peer.streams import Places

RUN = small_run()
ALL = RUN.model.expert_ids


def new_host(experts: Sequence[ExpertId] = ALL, *, steps: int = 0) -> ExpertHost:
    host = ExpertHost(make_banks(RUN, experts))
    draw = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for bank in host._banks.values():
            grads = WeightGrads(*(torch.empty_like(w).normal_(generator=draw) for w in bank._optimizer.w))
            bank.step(
                replace(bank.close([], RUN.global_batch_tokens), grads=grads, filled_E=(True,) * len(bank.indices))
            )
    return host


@asynccontextmanager
async def swarm(hosts: dict[str, ExpertHost]) -> AsyncIterator[tuple[View, GrpcTransport]]:
    async with AsyncExitStack() as stack:
        peers: list[PeerInfo] = []
        for name, host in hosts.items():
            serving = ExpertServer.serving(host, run=RUN, peer_id=name, listen="127.0.0.1:0", grace_s=1.0)
            server = await stack.enter_async_context(serving)
            peers.append(PeerInfo(peer_id=name, address=server.address, experts=host.experts))
        transport = GrpcTransport(run=RUN.name, shape=RUN.model.expert_shape)
        stack.push_async_callback(transport.close)
        yield View(peers), transport


async def join(hosts: dict[str, ExpertHost], joiner: ExpertHost, *, dead: PeerInfo | None = None) -> dict[str, int]:
    """How many experts came from whom."""
    async with swarm(hosts) as (view, transport):
        if dead is not None:
            view = View([*view.peers.values(), dead])
        taken = await catch_up(joiner, view, transport, own_id="me", timeout_s=30)
    return {part.peer: len(part.experts) for part in taken}


def assert_same(host: ExpertHost, other: ExpertHost, layer: int, indices: Sequence[int]) -> None:
    for name, value in other.fetch(layer, indices).items():
        assert torch.equal(host.fetch(layer, indices)[name], value), name


async def test_weights_moments_and_versions_come_from_the_replica_that_knows_most() -> None:
    old, new = new_host(steps=1), new_host(steps=3)
    some = [ExpertId(0, 1), ExpertId(0, 4), ExpertId(1, 2)]
    joiner = new_host(some)
    assert await join({"a": old, "b": new}, joiner) == {"b": 3}
    assert_same(joiner, new, 0, (1, 4))
    assert_same(joiner, new, 1, (2,))
    assert joiner.versions == {0: {1: 3, 4: 3}, 1: {2: 3}}
    assert joiner.committed_tokens == 0


async def test_experts_come_from_several_peers_and_those_nobody_hosts_start_fresh() -> None:
    left, right = new_host([e for e in ALL if e.index < 2], steps=2), new_host([ExpertId(1, 3)], steps=1)
    joiner = new_host()
    assert await join({"a": left, "b": right}, joiner) == {"a": 4, "b": 1}
    assert_same(joiner, left, 0, (0, 1))
    assert_same(joiner, right, 1, (3,))
    assert_same(joiner, new_host(), 0, (2, 3, 4, 5))


async def test_layers_that_came_before_and_after_a_commit_end_their_steps_together() -> None:
    earlier, later = (new_host([e for e in ALL if e.layer == layer], steps=1) for layer in (0, 1))
    later.commit(CommitCall(trainer="t", step=1, tokens=5))
    joiner = new_host()
    assert await join({"a": earlier, "b": later}, joiner) == {"a": len(ALL) // 2, "b": len(ALL) // 2}
    assert len({bank.committed_tokens for bank in joiner._banks.values()}) == 1
    joiner.commit(CommitCall(trainer="t", step=2, tokens=RUN.global_batch_tokens))
    assert joiner.versions == {layer: dict.fromkeys(indices, 2) for layer, indices in joiner.versions.items()}


async def test_fresh_replicas_have_nothing_to_give() -> None:
    assert await join({"a": new_host()}, new_host()) == {}


async def test_a_checkpoint_wins_over_replicas_that_know_no_more() -> None:
    joiner = new_host(steps=2)
    mine = joiner.fetch(0, ())
    assert await join({"a": new_host(steps=2), "b": new_host(steps=1)}, joiner) == {}
    assert all(torch.equal(mine[name], value) for name, value in joiner.fetch(0, ()).items())
    assert await join({"a": new_host(steps=3)}, joiner) == {"a": len(ALL)}


class Liar(ExpertHost):
    """Says it is far ahead, and gives state that no bank may take."""

    @property
    def versions(self) -> dict[int, dict[int, int]]:
        return {layer: dict.fromkeys(versions, 99) for layer, versions in super().versions.items()}

    def fetch(self, layer: int, indices: Sequence[int], *, with_sums: bool = True) -> dict[str, Tensor]:
        state = super().fetch(layer, indices, with_sums=with_sums)
        name = next(n for n in state if n.endswith("v_in"))
        return state | {name: -torch.ones_like(state[name])}


class Generous(Liar):
    """Gives experts that nobody asked for."""

    def fetch(self, layer: int, indices: Sequence[int], *, with_sums: bool = True) -> dict[str, Tensor]:
        return ExpertHost.fetch(self, layer, [0, 1])


@pytest.mark.parametrize("liar", [Liar, Generous])
async def test_who_is_dead_or_answers_badly_is_passed_over(liar: type[Liar], caplog: pytest.LogCaptureFixture) -> None:
    honest, joiner = new_host(steps=2), new_host([ExpertId(0, 0), ExpertId(1, 5)])
    gone = PeerInfo(peer_id="0", address="127.0.0.1:1", experts=tuple(ALL))
    assert await join({"a": liar(make_banks(RUN, ALL)), "b": honest}, joiner, dead=gone) == {"b": 2}
    assert_same(joiner, honest, 0, (0,))
    assert "0: unreachable" in caplog.text


async def test_a_busy_replica_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    donor, joiner = new_host(steps=1), new_host([ExpertId(0, 0)])
    full, one = True, Places.one

    def refuse(places: Places) -> AbstractContextManager[None]:
        if full:
            raise BusyError("full")
        return one(places)

    monkeypatch.setattr(Places, "one", refuse)
    monkeypatch.setattr("moe_peer.catchup.BUSY_PAUSE_S", 0.01)
    async with swarm({"a": donor}) as (view, transport):
        catching = asyncio.create_task(catch_up(joiner, view, transport, own_id="me", timeout_s=30))
        calls = transport.traffic.calls
        async with asyncio.timeout(20):
            while transport.traffic.calls < calls + 4:  # noqa: ASYNC110  refused, and asking again
                await asyncio.sleep(0)
        full = False
        assert [part.peer for part in await catching] == ["a"]


async def test_a_replica_that_sends_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack(new_host().fetch(0, ()), run=RUN.name, shape=RUN.model.expert_shape)
    assert len(data) <= max_state_bytes(RUN.model.n_experts, RUN.model.expert_shape)
    monkeypatch.setattr(moe_peer.server, "_pack", lambda *_: (bytes(64 << 20), b""))
    async with swarm({"a": new_host()}) as (view, transport):
        with pytest.raises(CallError, match="more than") as caught:
            await transport.fetch(view.peers["a"], 0, (), timeout_s=30)
        assert transport.traffic.received_bytes < 4 << 20
    assert caught.value.failure is CallFailure.REFUSED


def test_the_ranking_is_by_version_and_a_fetch_takes_what_one_peer_is_best_for() -> None:
    a, b, c = ExpertId(0, 0), ExpertId(0, 1), ExpertId(1, 0)
    versions = {"p": {a: 5, b: 3}, "q": {a: 5, b: 4, c: 1}, "r": {a: 2}}
    candidates = rank(versions, {a: 1, b: 3, c: 1})
    assert candidates == {a: [(5, "p"), (5, "q"), (2, "r")], b: [(4, "q")]}
    assert next_fetch(candidates) == ("p", 0, [0])
    assert next_fetch(without_peer(candidates, "p")) == ("q", 0, [0, 1])
    assert without_peer(candidates, "q") == {a: [(5, "p"), (2, "r")]}
