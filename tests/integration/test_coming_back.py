"""The same commands in the same folders, again: `docker compose up`, a restart policy, a host that is back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from processes import READY_S, peer_spec, start_coordinator, trainer_spec

from moe_coordinator.supervisor import Child, Supervisor
from moe_peer.metrics import Event, StepMetrics, read_metrics

STEPS = 30


class Run:
    """What is the same every time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "results"
        self.out.mkdir()
        self.steps = asyncio.Queue[int]()

    def on_event(self, child: Child, event: dict[str, int]) -> None:
        if child.name == "trainer" and str(event["event"]) == "step":
            self.steps.put_nowait(event["step"])

    @asynccontextmanager
    async def peers(self, name: str) -> AsyncIterator[tuple[Supervisor, str, list[Child]]]:
        async with Supervisor(self.folder / name, on_event=self.on_event) as supervisor:
            coordinator, join = await start_coordinator(supervisor, self.folder)
            peers = [
                await supervisor.start(peer_spec(f"peer-{i}", join, "--experts", experts, "--load", self.out))
                for i, experts in enumerate(("*.0-1", "*.2-3"))
            ]
            for peer in peers:
                await peer.ready(READY_S)
            yield supervisor, join, [coordinator, *peers]

    async def train(self, supervisor: Supervisor, join: str) -> Child:
        return await supervisor.start(trainer_spec(join, self.out, STEPS, "--go-on"))

    async def until_step(self, number: int) -> None:
        async with asyncio.timeout(READY_S):
            while await self.steps.get() != number:
                pass

    def made(self) -> list[int]:
        return [r.step for r in read_metrics(self.out / "metrics.jsonl") if isinstance(r, StepMetrics)]

    def differences(self) -> list[str]:
        records = read_metrics(self.out / "metrics.jsonl")
        return [r.detail for r in records if isinstance(r, Event) and r.what == "experts_differ"]


async def test_the_same_commands_begin_a_run_come_back_to_it_and_have_nothing_left_to_do(tmp_path: Path) -> None:
    run = Run(tmp_path)
    async with run.peers("first") as (supervisor, join, others):
        trainer = await run.train(supervisor, join)
        await run.until_step(3)
        everybody = [trainer, *others]
        for child in everybody:
            child.terminate()
        assert [await child.wait() for child in everybody] == [0, 0, 0, 0], trainer.report("ended otherwise")
        assert "no checkpoint in" in trainer.log_path.read_text()
    made = len(run.made())
    assert 4 <= made < STEPS
    async with run.peers("second") as (supervisor, join, _):
        trainer = await run.train(supervisor, join)
        assert (await trainer.ready(READY_S))["step"] == made
        # Every expert is as the checkpoint has it.
        assert run.differences() == []
        await run.until_step(22)
        # The trainer dies, and the peers live on: they are later than its last checkpoint, after step 20.
        trainer.kill()
        await trainer.wait()
        trainer = await run.train(supervisor, join)
        assert await trainer.wait() == 0, trainer.report("failed")
        assert "going on from" in trainer.log_path.read_text()
        assert trainer.last["ready"]["step"] == 20
        (difference,) = run.differences()
        assert "8 ahead" in difference
        assert difference in trainer.log_path.read_text()
        assert run.made() == list(range(STEPS))
        trainer = await run.train(supervisor, join)
        assert await trainer.wait() == 0
        assert "30 of 30 steps: nothing is left to train" in trainer.log_path.read_text()


async def test_a_trainer_that_is_back_before_its_peers_waits_for_them(tmp_path: Path) -> None:
    run = Run(tmp_path)
    async with run.peers("first") as (supervisor, join, _):
        trainer = await run.train(supervisor, join)
        await run.until_step(12)
        trainer.terminate()
        assert await trainer.wait() == 0
    made = len(run.made())
    async with Supervisor(tmp_path / "second", on_event=run.on_event) as supervisor:
        _, join = await start_coordinator(supervisor, tmp_path)
        trainer = await run.train(supervisor, join)
        async with asyncio.timeout(READY_S):
            while "going on from" not in trainer.log_path.read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await supervisor.start(peer_spec("peer", join, "--load", run.out))
        assert await trainer.wait() == 0, trainer.report("failed")
        assert trainer.last["ready"]["step"] == made
    assert run.differences() == []
    assert run.made() == list(range(STEPS))
