"""`docker compose up`: a swarm of containers trains, grows, and ends with everything that it has learned."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from composed_swarm import ComposedSwarm, composed_swarm, wait_for
from container_engine import Engine

from moe_net.checkpoint_folder import checkpoints_of
from moe_peer.checkpoint import newest_checkpoint, read_meta, saved_versions
from moe_peer.metrics import StepMetrics

pytestmark = pytest.mark.timeout(720)

SERVICES = ("coordinator", "peer", "trainer")
STEPS = 60
N_EXPERTS = 32
# A healthy container is looked at every 10 s.
HEALTHY_S = 60.0


def state_of(container: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = container["State"]
    return found


def all_healthy(swarm: ComposedSwarm) -> bool:
    return all(
        state_of(container)["Health"]["Status"] == "healthy"
        for service in SERVICES
        for container in swarm.containers(service)
    )


def wait_until_called(swarm: ComposedSwarm, container: dict[str, Any]) -> None:
    """Until the peer has said, as it does twice a minute, that rows of the trainer came."""

    def rows() -> int:
        said = re.findall(r"moe_peer\.status: in \d+ s: \d+ calls, (\d+) rows", swarm.engine.logs(container["Id"]))
        return sum(map(int, said))

    wait_for(f"rows of the trainer at {container['Name']}", rows, timeout_s=90.0)


def mean_loss(steps: list[StepMetrics]) -> float:
    return fmean(step.loss for step in steps)


def test_a_swarm_trains_takes_in_more_peers_and_stops_with_all_it_learned(
    engine: Engine, images: dict[str, str], tag: str, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    results.mkdir(mode=0o700)  # as of a user whose umask keeps others out
    with composed_swarm(engine, tag=tag, results=results) as swarm:
        swarm.up(peers=4)
        steps = list(swarm.wait_for_step(STEPS, timeout_s=180.0))
        assert mean_loss(steps[STEPS - 5 : STEPS]) < mean_loss(steps[:5]) - 1.0, "the loss does not fall"
        wait_for("health of all containers", lambda: all_healthy(swarm), timeout_s=HEALTHY_S)
        identities = {swarm.says(c["Id"], "ready")["peer_id"] for c in swarm.containers("peer")}  # type: ignore[index]
        assert len(identities) == 4, "peers share an identity"

        swarm.up(peers=6)
        newcomers = swarm.containers("peer")[4:]
        assert len(newcomers) == 2
        wait_for("health of the new peers", lambda: all_healthy(swarm), timeout_s=HEALTHY_S)
        for newcomer in newcomers:
            wait_until_called(swarm, newcomer)
        swarm.wait_for_step(swarm.steps()[-1].step + 5, timeout_s=60.0)

        swarm.compose("stop")  # the default grace period, 10 s; then the engine kills with exit code 137
        ended = {container["Name"]: state_of(container) for container in swarm.containers()}
        assert {name: state["ExitCode"] for name, state in ended.items()} == dict.fromkeys(ended, 0)
        assert not [name for name, state in ended.items() if state["OOMKilled"] or state["Running"]]
        assert len(ended) == 1 + 6 + 1 + 1  # `results` is the last

        # What was learned lies on the host.
        checkpoint = newest_checkpoint(checkpoints_of(swarm.results / "trainer"))
        n_steps = swarm.steps()[-1].step + 1
        assert read_meta(checkpoint).step == n_steps
        versions = saved_versions(checkpoint)
        assert len(versions) == N_EXPERTS
        assert set(versions.values()) == {n_steps}, f"experts of {n_steps} steps have made {versions}"

        # And the same command goes on with it.
        swarm.up(peers=6)
        steps = list(swarm.wait_for_step(n_steps + 5, timeout_s=120.0))
        assert [step.step for step in steps] == list(range(len(steps))), "steps are missing, or were made twice"
        assert abs(mean_loss(steps[n_steps:]) - mean_loss(steps[n_steps - 10 : n_steps])) < 0.5
