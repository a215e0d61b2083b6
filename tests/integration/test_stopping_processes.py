"""SIGTERM, in whatever order: everybody leaves in time with exit code 0, and what was learned is saved.

Docker kills after 10 s, and whoever stops a service waits for it. On a quiet machine all are gone within 2 s, or 4 s
when members stand still.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import READY_S, RUN, peer_spec, start_coordinator, trainer_spec

from moe_coordinator.supervisor import Child, Supervisor
from moe_peer.checkpoint import newest_checkpoint, read_meta, saved_versions
from moe_peer.metrics import Event, StepMetrics, read_metrics

LEAVE_S = 10.0
FOR_EVER = 100_000


async def stop(*children: Child) -> None:
    """All at the same moment; each of them leaves in time and well."""

    async def leave(child: Child) -> float:
        began_s = time.monotonic()
        child.terminate()
        code = await child.wait()
        assert code == 0, child.report(f"ended with {code}")
        return time.monotonic() - began_s

    took_s = await asyncio.gather(*map(leave, children))
    assert max(took_s) < LEAVE_S, {child.name: s for child, s in zip(children, took_s, strict=True)}


@dataclass(slots=True, kw_only=True)
class Swarm:
    supervisor: Supervisor
    coordinator: Child
    join: str
    peers: list[Child]
    trainer: Child
    out: Path
    events: asyncio.Queue[dict[str, object]]
    """What the trainer says."""

    async def step(self, number: int) -> None:
        """Wait until the trainer has made it."""
        async with asyncio.timeout(READY_S):
            while True:
                said = await self.events.get()
                if said["event"] == "step" and said["step"] == number:
                    return

    def steps_made(self) -> int:
        return 1 + max(r.step for r in read_metrics(self.out / "metrics.jsonl") if isinstance(r, StepMetrics))

    def faults(self) -> set[str]:
        return {r.what for r in read_metrics(self.out / "metrics.jsonl") if isinstance(r, Event)}

    def check_saved(self, *, at_least: int | None = None) -> None:
        """The checkpoint has every step that was made, and every expert after as many, or after `at_least` so many."""
        made = self.steps_made()
        checkpoint = newest_checkpoint(self.out / "checkpoints")
        done = self.trainer.last["done"]
        assert (done["steps"], done["checkpoint"]) == (made, str(checkpoint))
        assert "sample" not in done
        assert read_meta(checkpoint).step == made
        saved = saved_versions(checkpoint)
        assert sorted(saved) == list(RUN.model.expert_ids)
        assert min(saved.values()) >= (made if at_least is None else at_least)
        assert (self.out / "loss.png").exists()


@asynccontextmanager
async def swarm(folder: Path, *settings: object, steps: int = FOR_EVER) -> AsyncIterator[Swarm]:
    """A coordinator, two peers that share the experts out, and a trainer that has begun."""
    events = asyncio.Queue[dict[str, object]]()

    def on_event(child: Child, event: dict[str, object]) -> None:
        if child.name == "trainer":
            events.put_nowait(event)

    async with Supervisor(folder / "logs", on_event=on_event) as supervisor:
        coordinator, join = await start_coordinator(supervisor, folder)
        peers = [
            await supervisor.start(peer_spec(name, join, "--experts", experts))
            for name, experts in (("peer-a", "*.0-1"), ("peer-b", "*.2-3"))
        ]
        for peer in peers:
            await peer.ready(READY_S)
        out = folder / "out"
        trainer = await supervisor.start(trainer_spec(join, out, steps, *settings))
        await trainer.ready(READY_S)
        yield Swarm(
            supervisor=supervisor, coordinator=coordinator, join=join, peers=peers, trainer=trainer, out=out,
            events=events,
        )  # fmt: skip


async def test_all_go_at_the_same_moment_and_the_experts_are_saved(tmp_path: Path) -> None:
    async with swarm(tmp_path, "--checkpoint-every", 0) as s:
        await s.step(13)
        await stop(s.trainer, *s.peers, s.coordinator)
        s.check_saved()
        assert "experts_carried_over" not in s.faults()


async def test_the_peers_go_first_and_the_trainer_saves_what_it_has(tmp_path: Path) -> None:
    async with swarm(tmp_path, "--checkpoint-every", 5) as s:
        await s.step(6)
        await stop(s.coordinator)
        await stop(*s.peers)
        await stop(s.trainer)
        s.check_saved(at_least=5)


async def test_peers_that_stand_still_do_not_hold_a_trainer(tmp_path: Path) -> None:
    async with swarm(tmp_path, "--checkpoint-every", 5) as s:
        await s.step(6)
        for peer in s.peers:
            peer.suspend()
        await stop(s.trainer)
        s.check_saved(at_least=5)
        assert "experts_carried_over" in s.faults()


async def test_members_that_stand_still_do_not_hold_a_peer_or_the_coordinator(tmp_path: Path) -> None:
    async with swarm(tmp_path) as s:
        await s.step(3)
        s.trainer.suspend()
        s.peers[1].suspend()
        await stop(s.peers[0])
        await stop(s.coordinator)


async def test_an_evaluation_is_given_up(tmp_path: Path) -> None:
    async with swarm(tmp_path, "--eval-batches", 10_000) as s:
        await stop(s.trainer)
        assert "val_nats_per_byte" not in s.trainer.last["done"]
        assert "checkpoint" not in s.trainer.last["done"], "nothing was learned"


async def test_the_sample_comes_last_and_is_given_up(tmp_path: Path) -> None:
    async with swarm(tmp_path, "--sample-tokens", 100_000, steps=3) as s:
        async with asyncio.timeout(READY_S):
            while not (s.out / "loss.png").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert s.trainer.running
        await stop(s.trainer)
        s.check_saved()
        assert s.trainer.last["done"]["val_nats_per_byte"] > 0


async def test_a_trainer_that_waits_for_peers_leaves_at_once(tmp_path: Path) -> None:
    async with Supervisor(tmp_path / "logs") as supervisor:
        coordinator, join = await start_coordinator(supervisor, tmp_path)
        trainer = await supervisor.start(trainer_spec(join, tmp_path / "out", 3))
        async with asyncio.timeout(READY_S):
            while not (tmp_path / "out").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await stop(trainer, coordinator)
