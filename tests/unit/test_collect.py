"""rpc/collect: transient faults cost time, not experts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from swarms import serve, small_run
from torch import Tensor

from moe_net.client import make_banks
from moe_net.experts.host import ExpertHost
from moe_net.placement.view import View
from moe_net.rpc import collect
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.collect import Collector
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.rpc.local import LocalTransport
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.trace import FaultEvent
from moe_net.types import ExpertId, PeerInfo

RUN = small_run()
EXPERTS = RUN.model.expert_ids
HALVES = (tuple(e for e in EXPERTS if e.index < 3), tuple(e for e in EXPERTS if e.index >= 3))
Fault = Callable[[str, int], CallFailure | None]


class Swarm(LocalTransport):
    """Peers p0, p1, .. with the given experts; `fault(peer, number of its fetch)` decides what becomes of a fetch."""

    def __init__(self, *hosted: Sequence[ExpertId]) -> None:
        self.peers = [PeerInfo(peer_id=f"p{i}", address="", experts=tuple(mine)) for i, mine in enumerate(hosted)]
        super().__init__({p.peer_id: ExpertHost(make_banks(RUN, p.experts)) for p in self.peers})
        self.fault: Fault = lambda peer, number: None
        self.fetches: Counter[str] = Counter()
        self.events: list[FaultEvent] = []
        self.now_s = 0.0
        self.running: Counter[str] = Counter()
        self.most_at_once: Counter[str] = Counter()

    async def fetch(
        self, peer: PeerInfo, layer: int, expert_index: Sequence[int], *, timeout_s: float
    ) -> dict[str, Tensor]:
        name = peer.peer_id
        self.fetches[name] += 1
        failure = self.fault(name, self.fetches[name])
        self.running[name] += 1
        self.most_at_once[name] = max(self.most_at_once[name], self.running[name])
        await asyncio.sleep(0)
        self.running[name] -= 1
        self.now_s += timeout_s if failure is CallFailure.LATE else 1.0
        if failure is not None:
            raise CallError(failure, name, "injected")
        return await super().fetch(peer, layer, expert_index, timeout_s=timeout_s)

    async def collect(self, timeout_s: float = 60.0, **more: object) -> set[str]:
        """The experts whose state arrived."""
        collector = Collector(
            view=lambda: View(self.peers), transport=self, timeout_s=timeout_s, on_event=self.events.append,
            clock_s=lambda: self.now_s, **more,
        )  # type: ignore[arg-type]  # fmt: skip
        state = await collector.collect(EXPERTS)
        return {name.rpartition(".")[0] for name in state}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "PAUSE_S", 0.0)


ALL = {str(expert) for expert in EXPERTS}


async def test_a_busy_peer_is_asked_until_it_has_time_and_is_mentioned_once_per_layer() -> None:
    swarm = Swarm(EXPERTS)
    swarm.fault = lambda peer, number: CallFailure.BUSY if number <= 12 else None
    assert await swarm.collect() == ALL
    assert [(e.what, e.action) for e in swarm.events] == [("fetch_failed", "again")] * len(RUN.model.moe_layers)


async def test_a_replica_steps_in_for_a_peer_that_is_gone() -> None:
    swarm = Swarm(EXPERTS, EXPERTS)
    for gone in ("p0", "p1"):
        swarm.fault = lambda peer, number, gone=gone: CallFailure.UNREACHABLE if peer == gone else None
        assert await swarm.collect() == ALL


@pytest.mark.parametrize("failure", [CallFailure.UNREACHABLE, CallFailure.LATE])
async def test_a_connection_that_broke_once_loses_nothing(failure: CallFailure) -> None:
    swarm = Swarm(*HALVES, HALVES[1])
    swarm.fault = lambda peer, number: failure if number == 1 and peer != "p0" else None
    assert await swarm.collect() == ALL


async def test_only_the_experts_of_a_dead_peer_are_left_out_and_it_is_not_asked_for_ever() -> None:
    swarm = Swarm(*HALVES)
    swarm.fault = lambda peer, number: CallFailure.UNREACHABLE if peer == "p1" else None
    assert await swarm.collect() == {str(expert) for expert in HALVES[0]}
    assert swarm.fetches["p1"] == collect.ATTEMPTS * len(RUN.model.moe_layers)
    assert Counter(e.action for e in swarm.events)["left_out"] == len(RUN.model.moe_layers)


async def test_the_time_ends_it_also_with_a_peer_that_is_busy_for_ever() -> None:
    swarm = Swarm(*HALVES)
    swarm.fault = lambda peer, number: CallFailure.BUSY if peer == "p1" else None
    assert await swarm.collect(timeout_s=20) == {str(expert) for expert in HALVES[0]}
    assert 20 <= swarm.now_s < 24


async def test_a_suspended_peer_is_asked_last() -> None:
    swarm = Swarm(EXPERTS, EXPERTS, EXPERTS)
    assert await swarm.collect(usable=lambda peer: peer == "p1") == ALL
    assert set(swarm.fetches) == {"p1"}
    alone = Swarm(EXPERTS)
    assert await alone.collect(usable=lambda peer: False) == ALL


async def test_a_peer_sends_one_layer_at_a_time() -> None:
    swarm = Swarm(*HALVES)
    await swarm.collect()
    assert swarm.most_at_once == {"p0": 1, "p1": 1}


async def test_a_peer_that_answers_with_another_ones_experts_is_not_believed() -> None:
    swarm = Swarm(*HALVES)
    honest = swarm.fetch

    async def lying(peer: PeerInfo, layer: int, expert_index: Sequence[int], *, timeout_s: float) -> dict[str, Tensor]:
        answer = await honest(peer, layer, expert_index, timeout_s=timeout_s)
        return {name.replace(".3.", ".0."): value for name, value in answer.items()}

    swarm.fetch = lying  # type: ignore[method-assign]
    assert await swarm.collect() == {str(expert) for expert in HALVES[0]}
    assert {e.peer for e in swarm.events} == {"p1"}


async def test_three_trainers_make_their_checkpoints_at_the_same_moment_over_the_network() -> None:
    """A server sends two fetches at once: the third is told that it is busy."""
    async with serve(RUN, n_peers=1) as servers:
        (server,) = servers.values()
        view = View([PeerInfo(peer_id="peer-0", address=server.address, experts=EXPERTS)])
        transports = [GrpcTransport(run=RUN.name, shape=RUN.model.expert_shape) for _ in range(3)]
        swarms = [ExpertSwarm(trainer=f"t{i}", transport=t, view=lambda: view) for i, t in enumerate(transports)]
        try:
            states = await asyncio.gather(*(swarm.fetch_experts(EXPERTS, timeout_s=30) for swarm in swarms))
        finally:
            for transport in transports:
                await transport.close()
        for state in states:
            assert {name.rpartition(".")[0] for name in state} == ALL
