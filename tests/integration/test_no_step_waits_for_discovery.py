"""No decision waits for the DHT. Lookups happen in the background; a step performs none."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from swarms import SEQUENCES, make_trainer, remote_link, small_run

from moe_net import client
from moe_net.client import make_banks
from moe_net.config import to_json
from moe_net.discovery.directory import DirectoryWatcher
from moe_net.discovery.join import Joined
from moe_net.experts.host import ExpertHost
from moe_net.model.remote_moe import SwarmLink
from moe_net.rpc.local import LocalTransport
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.types import PeerInfo
from moe_peer.config import TrainConfig
from moe_peer.metrics import StepMetrics, read_metrics
from moe_peer.train import run_train

RUN = small_run()


class HangingDiscovery:
    """Answers the first look-up; every later one hangs until it is released, as a DHT does that lost its network."""

    def __init__(self, peers: tuple[PeerInfo, ...]) -> None:
        self._peers = peers
        self.lookups = 0
        self.hanging = asyncio.Event()
        self.released = asyncio.Event()

    async def peers(self, experts: object = None) -> tuple[PeerInfo, ...]:
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


def test_a_step_does_not_even_ask_for_a_lookup() -> None:
    """Every look-up that hangs hides the next one. Here they answer at once, and none is due within the test."""
    peer = PeerInfo(peer_id="p", address="", experts=RUN.model.expert_ids)
    transport = LocalTransport({"p": ExpertHost(make_banks(RUN, peer.experts))})
    with Portal() as portal:

        async def start() -> tuple[HangingDiscovery, DirectoryWatcher]:
            discovery = HangingDiscovery((peer,))
            discovery.released.set()
            watcher = await DirectoryWatcher(discovery, interval_s=3600.0).__aenter__()
            await watcher.wait_for(lambda view: bool(view.peers), 10)
            return discovery, watcher

        discovery, watcher = portal.run(start())
        swarm = ExpertSwarm(trainer="t", transport=transport, view=lambda: watcher.view)
        trainer = make_trainer(RUN, SwarmLink(swarm=swarm, runner=portal))
        for _ in range(3):
            trainer.train_step()
        portal.run(asyncio.sleep(0))  # whatever a step left to the loop
        assert discovery.lookups == 1
        portal.run(watcher.close())


def test_the_steps_of_a_trainer_that_joined_look_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of the whole command: `moe-peer train`, its way into the run, its evaluation and its checkpoint."""
    run = replace(RUN, model=replace(RUN.model, vocab_size=256), record_ttl_s=3600.0 * 6)
    with remote_link(run, n_peers=1) as (link, _):
        discovery = HangingDiscovery(tuple(link.swarm.view().peers.values()))
        discovery.released.set()

        class JoinedDht:
            @staticmethod
            async def create(**options: object) -> HangingDiscovery:
                return discovery

        async def joined(addresses: object) -> Joined:
            return Joined(to_json(run), ("/ip4/127.0.0.1/tcp/1",))

        monkeypatch.setattr(client, "DhtDiscovery", JoinedDht)
        monkeypatch.setattr(client, "resolve_join", joined)
        config = TrainConfig(
            join=("nobody:1",), out=tmp_path / "out", data=Path(client.__file__).parent, steps=4,
            sequences=SEQUENCES, eval_every=2, eval_batches=1, checkpoint_every=2, sample_tokens=4, wait_s=10.0,
        )  # fmt: skip
        assert run_train(config) == 0
    steps = [r for r in read_metrics(tmp_path / "out" / "metrics.jsonl") if isinstance(r, StepMetrics)]
    assert [s.step for s in steps] == list(range(4))
    assert discovery.lookups == 1, "only the one before the first step"


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

    # Sixty times the peers: 176 us each way; with a scan of all of them in `live` 610 us.
    assert cost(1024) < 2.5 * cost(16)
