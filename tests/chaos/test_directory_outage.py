"""The DHT is gone for longer than records live, and training does not notice: no decision waits for it."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import psutil
from processes import READY_S, RUN, peer_spec, start_coordinator, trainer_spec

from moe_coordinator.supervisor import Child, Supervisor
from moe_peer.metrics import Event, StepMetrics, read_metrics

TTL_S = 2.0


def dht_daemons(children: list[Child]) -> list[psutil.Process]:
    """The libp2p daemons of these processes: the whole DHT, apart from the trainer's own client."""
    found = [p for child in children for p in psutil.Process(child.pid).children(recursive=True)]
    daemons = [p for p in found if "p2pd" in p.name()]
    assert len(daemons) == len(children)
    return daemons


async def test_training_goes_on_while_every_node_of_the_dht_is_frozen(tmp_path: Path) -> None:
    started = asyncio.Event()

    def on_event(child: Child, event: dict[str, object]) -> None:
        if child.name == "trainer" and event["event"] == "step" and event["step"] == 3:
            started.set()

    out = tmp_path / "out"
    run = replace(RUN, record_ttl_s=TTL_S)
    async with Supervisor(tmp_path / "logs", on_event=on_event) as supervisor:
        coordinator, join = await start_coordinator(supervisor, tmp_path, run)
        peers = [
            await supervisor.start(peer_spec(f"peer-{i}", join, "--experts", spec))
            for i, spec in enumerate(("*.0-1", "*.2-3"))
        ]
        for peer in peers:
            await peer.ready(READY_S)
        trainer = await supervisor.start(trainer_spec(join, out, 100_000))
        await asyncio.wait_for(started.wait(), READY_S)
        daemons = dht_daemons([coordinator, *peers])
        try:
            for daemon in daemons:
                daemon.send_signal(signal.SIGSTOP)
            frozen_s = time.time()
            # Records lapse, and the trainer's look-ups find nobody, time out, and find nothing.
            await asyncio.sleep(6 * TTL_S)
        finally:
            for daemon in daemons:
                daemon.send_signal(signal.SIGCONT)
        thawed_s = time.time()
        assert await trainer.stop(READY_S) == 0, trainer.report("failed")
    records = read_metrics(out / "metrics.jsonl")
    steps = [r for r in records if isinstance(r, StepMetrics) and frozen_s + 1 < r.at_s < thawed_s]
    assert len(steps) > 20, "hardly a step was made during the outage"
    assert all(s.live_experts == s.total_experts for s in steps)
    assert sum(s.dropped_pairs for s in steps) == 0
    assert max(s.step_s for s in steps) < 2.0
    assert "no_live_experts" not in {r.what for r in records if isinstance(r, Event)}


async def test_a_trainer_joins_when_two_of_its_three_addresses_are_dead(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        dead = f"127.0.0.1:{nobody.getsockname()[1]}"
        async with Supervisor(tmp_path / "logs") as supervisor:
            _, join = await start_coordinator(supervisor, tmp_path)
            peer = await supervisor.start(peer_spec("peer", join))
            dht = str((await peer.ready(READY_S))["dht"][0])
            gone = dht.replace(f"/tcp/{dht.split('/tcp/')[1].split('/')[0]}", f"/tcp/{nobody.getsockname()[1]}")
            for name, way_in in {"by-coordinator": join, "by-peer": dht}.items():
                options = ("--join", dead, "--join", gone)
                trainer = await supervisor.start(trainer_spec(way_in, tmp_path / name, 3, *options, name=name))
                assert await trainer.wait() == 0, trainer.report("failed")
