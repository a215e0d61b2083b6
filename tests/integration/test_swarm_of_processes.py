"""The whole thing as its users run it: real processes that find each other, fail, and go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from processes import READY_S, RUN, SEQ_LEN, SEQUENCES, peer_spec, start_coordinator, trainer_spec

from moe_coordinator.supervisor import Child, Supervisor
from moe_peer.checkpoint import load_experts_of, newest_checkpoint, read_meta, versions_of
from moe_peer.metrics import EvalMetrics, Event, StepMetrics, read_metrics


def losses(out: Path) -> list[float]:
    return [r.loss for r in read_metrics(out / "metrics.jsonl") if isinstance(r, StepMetrics)]


async def test_training_goes_on_without_the_coordinator_and_without_a_peer_that_has_a_replica(tmp_path: Path) -> None:
    """First the coordinator is killed, then one of two replicas of everything, in the middle of a step."""
    killed: list[str] = []
    children: dict[str, Child] = {}

    def on_event(child: Child, event: dict[str, object]) -> None:
        if child.name == "trainer" and event["event"] == "step" and event["step"] in (3, 8):
            victim = "coordinator" if event["step"] == 3 else "peer-b"
            children[victim].kill()
            killed.append(victim)

    out = tmp_path / "out"
    async with Supervisor(tmp_path / "logs", on_event=on_event) as supervisor:
        children["coordinator"], join = await start_coordinator(supervisor, tmp_path)
        for name in ("peer-a", "peer-b"):
            children[name] = await supervisor.start(peer_spec(name, join, "--experts", "*.*"))
        ready = await children["peer-a"].ready(READY_S)
        await children["peer-b"].ready(READY_S)
        trainer = await supervisor.start(trainer_spec(join, out, 20))
        assert await trainer.wait() == 0, trainer.report("failed")
        assert killed == ["coordinator", "peer-b"]
        records = read_metrics(out / "metrics.jsonl")
        steps = [r for r in records if isinstance(r, StepMetrics)]
        assert [s.step for s in steps] == list(range(20))
        # Whatever peer-b did not answer, peer-a did: at most gradients of what was in flight are lost.
        assert sum(s.dropped_pairs for s in steps) == 0
        assert all(s.live_experts == s.total_experts == 8 for s in steps)
        # Any peer's address is a way in: a newcomer finds manifest and experts with no coordinator there.
        late = await supervisor.start(trainer_spec(str(ready["dht"][0]), tmp_path / "late", 2, name="late"))
        assert await late.wait() == 0, late.report("failed")
        # A clean stop is exit code 0.
        assert await children["peer-a"].stop(READY_S) == 0
    assert steps[-1].loss < steps[0].loss


async def test_a_peer_with_the_only_replica_dies_and_its_experts_are_masked(tmp_path: Path) -> None:
    children: dict[str, Child] = {}

    def on_event(child: Child, event: dict[str, object]) -> None:
        if child.name == "trainer" and event["event"] == "step" and event["step"] == 14:
            children["peer-b"].kill()

    out = tmp_path / "out"
    async with Supervisor(tmp_path / "logs", on_event=on_event) as supervisor:
        _, join = await start_coordinator(supervisor, tmp_path)
        for name, experts in (("peer-a", "*.0-1"), ("peer-b", "*.2-3")):
            children[name] = await supervisor.start(peer_spec(name, join, "--experts", experts))
        for child in children.values():
            await child.ready(READY_S)
        trainer = await supervisor.start(trainer_spec(join, out, 20))
        assert await trainer.wait() == 0, trainer.report("failed")
    records = read_metrics(out / "metrics.jsonl")
    steps = [r for r in records if isinstance(r, StepMetrics)]
    assert [s.step for s in steps] == list(range(20))
    assert steps[0].live_experts == 8
    assert steps[-1].live_experts == 4
    assert steps[-1].dropped_pairs == 0, "tokens choose among the living once the dead are masked"
    faults = {r.what for r in records if isinstance(r, Event)}
    assert "peer_suspended" in faults
    evaluations = [r.val_nats_per_byte for r in records if isinstance(r, EvalMetrics)]
    assert evaluations[-1] < evaluations[0]
    assert (out / "loss.png").stat().st_size > 10_000
    done = trainer.last["done"]
    assert done["val_nats_per_byte"] == evaluations[-1]
    # A resume does not start the dead peer's experts afresh: the last checkpoint has them as the one before had them.
    saved = load_experts_of(Path(done["checkpoint"]), RUN, RUN.model.expert_ids)
    versions = {str(expert): version for expert, version in versions_of(saved).items()}
    assert [versions[f"{layer}.{index}"] for layer in (0, 1) for index in range(4)] == [20, 20, 10, 10] * 2
    assert "experts_carried_over" in faults
    assert "checkpoint_incomplete" not in faults
    assert done["sample"].startswith("def ")


@asynccontextmanager
async def left_without_peers(
    tmp_path: Path, steps: int, *settings: object
) -> AsyncIterator[tuple[Supervisor, str, Child, Path]]:
    """(supervisor, address to join by, a trainer whose only peer was killed after step 4, what it writes)."""
    peers: list[Child] = []

    def on_event(child: Child, event: dict[str, object]) -> None:
        if child.name == "trainer" and event["event"] == "step" and event["step"] == 4:
            peers[0].kill()

    out = tmp_path / "out"
    async with Supervisor(tmp_path / "logs", on_event=on_event) as supervisor:
        _, join = await start_coordinator(supervisor, tmp_path)
        peers.append(await supervisor.start(peer_spec("first", join)))
        await peers[0].ready(READY_S)
        trainer = await supervisor.start(trainer_spec(join, out, steps, *settings))
        await peers[0].wait()
        yield supervisor, join, trainer, out


async def test_a_trainer_left_without_experts_waits_for_the_next_peer(tmp_path: Path) -> None:
    async with left_without_peers(tmp_path, 12) as (supervisor, join, trainer, out):
        second = await supervisor.start(peer_spec("second", join))
        await second.ready(READY_S)
        assert await trainer.wait() == 0, trainer.report("failed")
    records = read_metrics(out / "metrics.jsonl")
    assert [r.step for r in records if isinstance(r, StepMetrics)] == list(range(12))
    assert {"peer_suspended", "no_live_experts"} <= {r.what for r in records if isinstance(r, Event)}


async def test_what_a_trainer_has_learned_is_kept_when_its_last_peer_does_not_come_back(tmp_path: Path) -> None:
    settings = ("--checkpoint-every", "0", "--wait-s", "1")
    async with left_without_peers(tmp_path, 50, *settings) as (_, _, trainer, out):
        assert await trainer.wait() == 1, trainer.report("ended otherwise")
    made = [r.step for r in read_metrics(out / "metrics.jsonl") if isinstance(r, StepMetrics)]
    assert read_meta(newest_checkpoint(out / "checkpoints")).step == made[-1] + 1 >= 5
    assert (out / "loss.png").exists()


async def test_a_run_is_stopped_and_resumed_by_new_processes_with_the_same_losses(tmp_path: Path) -> None:
    """Resume across processes: SIGTERM in the middle, then everything anew from the checkpoint."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for name in "1234":
        (tmp_path / name).mkdir()

    async def run(
        folder: Path, out: Path, steps: int, *, load: tuple[object, ...] = (), more: tuple[object, ...] = ()
    ) -> str:
        """What the trainer said last, if it failed."""
        async with Supervisor(folder / "logs") as supervisor:
            _, join = await start_coordinator(supervisor, folder)
            peers = [
                await supervisor.start(peer_spec(f"peer-{i}", join, "--experts", spec, *load))
                for i, spec in enumerate(("*.0,*.2", "*.1,*.3"))
            ]
            for peer in peers:
                await peer.ready(READY_S)
            trainer = await supervisor.start(trainer_spec(join, out, steps, *more))
            return "" if await trainer.wait() == 0 else trainer.report("failed")

    assert await run(tmp_path / "1", whole, 12) == ""
    assert await run(tmp_path / "2", parts, 7) == ""
    # Forgotten --load: nobody trains a trunk on experts that it has never seen without being told.
    assert "start the peers with --load" in await run(tmp_path / "4", parts, 12, more=("--resume", parts))
    assert await run(tmp_path / "3", parts, 12, load=("--load", parts), more=("--resume", parts)) == ""
    assert len(losses(whole)) == 12
    assert losses(parts) == losses(whole)
    # A step's figures are its own: the evaluation after step 9, and the checkpoint, are not counted in with step 10.
    steps = [r for r in read_metrics(whole / "metrics.jsonl") if isinstance(r, StepMetrics)]
    assert {s.calls for s in steps} == {2 * 2 * 2 + 2}
    assert {s.routed_pairs for s in steps} == {2 * 2 * SEQUENCES * SEQ_LEN}


async def test_a_newcomer_catches_up_and_then_averages_with_the_one_it_joined(tmp_path: Path) -> None:
    learned, averaged = asyncio.Event(), asyncio.Event()

    def on_event(child: Child, event: dict[str, object]) -> None:
        if child.name == "trainer" and event["event"] == "step" and event["step"] == 3:
            learned.set()
        if event["event"] == "exchange":
            averaged.set()

    async with Supervisor(tmp_path / "logs", on_event=on_event) as supervisor, asyncio.timeout(2 * READY_S):
        _, join = await start_coordinator(supervisor, tmp_path)
        first = await supervisor.start(peer_spec("first", join, "--experts", "*.*", "--exchange-every-s", 0.2))
        first_id = (await first.ready(READY_S))["peer_id"]
        trainer = await supervisor.start(trainer_spec(join, tmp_path / "out", 100_000))
        await learned.wait()
        second = await supervisor.start(peer_spec("second", join, "--experts", "*.0-1", "--exchange-every-s", 0.2))
        second_id = (await second.ready(READY_S))["peer_id"]
        caught_up = second.last["caught_up"]
        assert (caught_up["experts"], caught_up["of"]) == (4, 4)
        assert caught_up["from"] == {first_id: "0.0-1,1.0-1"}
        assert caught_up["version"] >= 1
        assert "caught_up" not in first.last
        await averaged.wait()
        exchange = (first.last | second.last)["exchange"]
        assert exchange["partner"] == min(first_id, second_id)
        assert exchange["experts"] == 2
        assert 0 <= exchange["divergence"] < 0.5
        assert await second.stop(READY_S) == 0
        await trainer.stop(READY_S)
