"""Invariant 5: no decision waits for the DHT. Lookups happen in the background; a step performs none."""

from __future__ import annotations

import asyncio
import time

from swarms import make_trainer, small_run

from moe_net.client import make_banks
from moe_net.discovery.directory import DirectoryWatcher
from moe_net.experts.host import ExpertHost
from moe_net.model.remote_moe import SwarmLink
from moe_net.rpc.local import LocalTransport
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.types import PeerInfo

RUN = small_run()


class HangingDiscovery:
    """Answers the first look-up; every later one hangs until it is released, as a DHT does that lost its network."""

    def __init__(self, peers: tuple[PeerInfo, ...]) -> None:
        self._peers = peers
        self.lookups = 0
        self.hanging = asyncio.Event()
        self.released = asyncio.Event()

    async def peers(self) -> tuple[PeerInfo, ...]:
        self.lookups += 1
        if self.lookups > 1:
            self.hanging.set()
            await self.released.wait()
        return self._peers

    async def announce(self, record: bytes, *, peer_id: str, expires_at_s: float) -> None:
        raise AssertionError("a trainer announces nothing")

    async def put_manifest(self, manifest_json: str, *, expires_at_s: float) -> None:
        raise AssertionError("a trainer publishes nothing")

    async def get_manifest(self) -> str | None:
        raise AssertionError("not in a step")

    async def close(self) -> None:
        self.released.set()


def test_training_goes_on_while_every_lookup_hangs() -> None:
    peer = PeerInfo(peer_id="p", address="", experts=RUN.model.expert_ids)
    transport = LocalTransport({"p": ExpertHost(make_banks(RUN, peer.experts))})
    with Portal() as portal:

        async def start() -> tuple[HangingDiscovery, DirectoryWatcher]:
            discovery = HangingDiscovery((peer,))
            watcher = await DirectoryWatcher(discovery, interval_s=0.01).__aenter__()
            await watcher.wait_for(lambda view: bool(view.peers), 10)
            await asyncio.wait_for(discovery.hanging.wait(), 10)
            return discovery, watcher

        discovery, watcher = portal.run(start())
        swarm = ExpertSwarm(trainer="t", transport=transport, view=lambda: watcher.view)
        trainer = make_trainer(RUN, SwarmLink(swarm=swarm, runner=portal))
        before = discovery.lookups
        losses = [trainer.train_step().loss for _ in range(3)]
        assert len(losses) == 3
        assert swarm.stats.dropped_pairs == 0
        assert discovery.lookups == before, "a step looked something up"
        portal.run(discovery.close())
        portal.run(watcher.close())


def test_a_view_costs_no_more_when_the_run_is_large() -> None:
    """Masking and choosing read a snapshot in memory: their cost is that of the layer, not of the directory."""
    from moe_net.placement.select import select
    from moe_net.placement.view import View
    from moe_net.types import ExpertId

    def cost(n_peers: int) -> float:
        view = View(
            PeerInfo(
                peer_id=f"{i:04d}", address="", experts=tuple(ExpertId(i * 4 // 64, (i * 4 + j) % 64) for j in range(4))
            )
            for i in range(n_peers)
        )
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(20):
                view.live(0, 64)
                select(view, 0, dict.fromkeys(range(64), 1))
            best = min(best, time.perf_counter() - started)
        return best

    # Sixty times the peers; a scan of all of them would cost about that much more.
    assert cost(1024) < 10 * cost(16)
