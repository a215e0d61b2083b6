"""What members on several machines announce, by the real commands on hosts of their own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import dht_member
import pytest
from networks import Sites, two_sites
from processes import READY_S, RUN, module, peer_spec, trainer_spec

from moe_coordinator.config import to_toml
from moe_coordinator.supervisor import Child, ChildError, ChildSpec, Event, Supervisor

COORDINATOR, PEER, TRAINER, ONLOOKER = range(4)


@pytest.fixture
def sites() -> Iterator[Sites]:
    with two_sites(4) as sites:
        yield sites


def on(sites: Sites, host: int, spec: ChildSpec) -> ChildSpec:
    return replace(spec, argv=sites.on(host, spec.argv))


async def start_coordinator(sites: Sites, supervisor: Supervisor, folder: Path, *more: str) -> Event:
    (folder / "run.toml").write_text(to_toml(RUN))
    argv = module("moe_coordinator.cli", "serve", "--config", folder / "run.toml", "--listen", "0.0.0.0:7700", *more)
    child = await supervisor.start(on(sites, COORDINATOR, ChildSpec(name="coordinator", argv=argv)))
    return await child.ready(READY_S)


async def test_members_on_other_machines_announce_addresses_that_others_can_call(sites: Sites, tmp_path: Path) -> None:
    async with Supervisor(tmp_path / "logs") as supervisor:
        ready = await start_coordinator(sites, supervisor, tmp_path, "--dht-listen", "/ip4/0.0.0.0/tcp/7701")
        assert ready["address"] == f"{sites.address(COORDINATOR)}:7700"
        (dht,) = ready["dht"]
        assert dht.startswith(f"/ip4/{sites.address(COORDINATOR)}/tcp/7701/p2p/")
        peer = await supervisor.start(on(sites, PEER, peer_spec("peer", ready["address"])))
        served = await peer.ready(READY_S)
        assert served["address"].startswith(f"{sites.address(PEER)}:")
        assert [way.startswith(f"/ip4/{sites.address(PEER)}/tcp/") for way in served["dht"]] == [True]
        # One that is reached through another machine only: by the member's address, without the coordinator's.
        trainer = await supervisor.start(on(sites, TRAINER, trainer_spec(served["dht"][0], tmp_path / "out", 2)))
        assert await trainer.wait() == 0, trainer.report("failed")

        spec = peer_spec("deaf", ready["address"], "--listen", "127.0.0.1:0")
        deaf = await supervisor.start(on(sites, TRAINER, spec))
        with pytest.raises(ChildError, match=rf"reached from {sites.address(TRAINER)}: say --listen") as failure:
            await deaf.ready(READY_S)
        assert "exit code 2" in str(failure.value)


async def test_a_peer_whose_line_comes_back_with_another_address_announces_that(sites: Sites, tmp_path: Path) -> None:
    seen: asyncio.Queue[list[str]] = asyncio.Queue()

    def note(child: Child, event: Event) -> None:
        if event["event"] == "view":
            seen.put_nowait(event["seen"])

    async def until(holds: Callable[[list[str]], bool]) -> None:
        async with asyncio.timeout(10 * RUN.record_ttl_s):
            while not holds(await seen.get()):
                pass

    async with Supervisor(tmp_path / "logs", on_event=note) as supervisor:
        ready = await start_coordinator(sites, supervisor, tmp_path)
        peer = await supervisor.start(on(sites, PEER, peer_spec("peer", ready["address"])))
        served = await peer.ready(READY_S)
        onlooker = (RUN.name, "10.77.0.4:1", str(RUN.record_ttl_s), "/ip4/10.77.0.4/tcp/0", *ready["dht"])
        argv = (sys.executable, dht_member.__file__, *onlooker)
        await supervisor.start(on(sites, ONLOOKER, ChildSpec(name="onlooker", argv=argv)))
        await until(lambda view: served["address"] in view)
        sites.move(PEER, "10.77.0.99")
        port = served["address"].rpartition(":")[2]
        await until(lambda view: f"10.77.0.99:{port}" in view and served["address"] not in view)
