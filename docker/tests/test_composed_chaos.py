"""`compose.chaos.yaml`: training goes on while containers are killed, paused, cut off and lose their network."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from composed_chaos import CHAOS_FILE, FAULTS_FILE, named_peers, suffer
from composed_swarm import COMPOSE_FILE, ComposedSwarm, compose_command, wait_for
from container_engine import Engine, command

from moe_coordinator.faults import FaultPlan
from moe_net.config import load_toml
from moe_peer.metrics import Event

pytestmark = pytest.mark.timeout(480)

# What `make compose-chaos` does in five minutes, in 78 s.
FAULTS = """
[network]
round_trip_s = 0.02
bandwidth_mib_s = 10.0
[[fault]]
at_s = 3.0
target = "peer-0"
what = "restart"
after_s = 2.0
[[fault]]
at_s = 18.0
target = "peer-1"
what = "stop"
duration_s = 10.0
[[fault]]
at_s = 28.0
target = "peer-2"
what = "disconnect"
duration_s = 20.0
[[fault]]
at_s = 36.0
target = "coordinator"
what = "restart"
after_s = 3.0
[[fault]]
at_s = 52.0
target = "peer-3"
what = "cut"
duration_s = 2.0
"""


def check_used(swarm: ComposedSwarm, service: str) -> None:
    """TimeoutError when the trainer does not call this peer: stopped in its tracks, it would be missed."""
    (container,) = swarm.containers(service)
    ready = swarm.says(container["Id"], "ready")
    assert ready is not None
    since_s = time.time()

    def missed() -> bool:
        return any(
            isinstance(r, Event) and (r.what, r.peer) == ("peer_suspended", ready["peer_id"]) and r.at_s > since_s
            for r in swarm.records()
        )

    swarm.engine.run("pause", container["Id"])
    try:
        wait_for(f"a call of the trainer to {service}", missed, timeout_s=30.0)
    finally:
        swarm.engine.run("unpause", container["Id"])


def test_training_survives_what_is_done_to_its_containers(
    engine: Engine, images: dict[str, str], tag: str, tmp_path: Path
) -> None:
    faults = tmp_path / "faults.toml"
    faults.write_text(FAULTS)
    with named_peers(engine, tag=tag, results=tmp_path / "results", faults=faults) as swarm:
        # Peers may take 30 s to be back after the last of them.
        code, said = suffer(swarm, faults, for_s=78.0)
        assert code == 0, "it has said what it missed"
        for event in ("restart of peer-0", "stop of peer-1", "disconnect of peer-2", "restart of coordinator"):
            assert f"after {event} ended" in said
        # Each expert has another host: that all are live does not say that these peers are back.
        for peer in ("peer-0", "peer-1", "peer-2"):
            check_used(swarm, peer)
        # Connections outlive twenty seconds; who makes a new one asks for the name.
        networks = swarm.containers("peer-2")[0]["NetworkSettings"]["Networks"].values()
        assert all("peer-2" in network["Aliases"] for network in networks)


def test_the_schedule_of_five_minutes_is_as_hard_as_it_says() -> None:
    faults = load_toml(FaultPlan, FAULTS_FILE).fault
    kills = sorted(f.at_s or 0.0 for f in faults if f.what == "restart" and f.target.startswith("peer-"))
    assert kills == [10.0 + 30.0 * n for n in range(10)], "one each half minute"
    others = {(f.what, f.lasts_s) for f in faults if not f.on_network and not f.target.startswith("coordinator")}
    assert {("stop", 20.0), ("disconnect", 60.0)} <= others
    assert [f.target for f in faults if f.what == "restart"].count("coordinator") == 1


def test_both_files_together_are_a_project_of_named_peers_behind_proxies(engine: Engine) -> None:
    files = [word for file in (COMPOSE_FILE, CHAOS_FILE) for word in ("--file", str(file))]
    services = command([*compose_command(), *files, "config", "--services"], engine.environment, timeout_s=60.0).split()
    numbered = {f"{kind}-{n}" for kind in ("peer", "proxy") for n in range(4)}
    assert set(services) == {"coordinator", "peer", "results", "trainer"} | numbered
