"""A peer in a container that has less than the machine takes what the container has, and survives there."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from composed_swarm import wait_for
from container_engine import Engine
from container_images import ROOT

from moe_net.config import RunConfig, load_toml
from moe_net.experts.bank import memory_bytes
from moe_peer.config import parse_experts

pytestmark = pytest.mark.timeout(720)

LOAD_S = 120
MEMORY_BYTES = 2**30
# All of its experts take more than the container has.
RUN = """
name = "small-container"
global_batch_tokens = 2048

[model]
d_model = 256
d_ff_expert = 1024
n_layers = 2
n_experts = 96
n_heads = 4
n_kv_heads = 2

[model.router]
experts_per_token = 2
"""


@contextmanager
def network(engine: Engine) -> Iterator[str]:
    """A network of its own; in the end its containers are gone, and it is."""
    name = f"moe-test-{secrets.token_hex(4)}"
    engine.run("network", "create", name)
    try:
        yield name
    finally:
        containers = engine.run("ps", "--all", "--quiet", "--filter", f"network={name}").split()
        if containers:
            engine.run("rm", "--force", "--volumes", *containers)
        engine.run("network", "rm", name)


def ready(engine: Engine, container: str) -> dict[str, Any]:
    """What a member said when it was ready."""

    def look() -> dict[str, Any] | None:
        events = [json.loads(line) for line in engine.run("logs", container).splitlines() if line.startswith("{")]
        return next((event for event in events if event["event"] == "ready"), None)

    return wait_for(f"{container} to be ready", look, timeout_s=90.0)


def test_a_peer_with_one_processor_and_one_gib_survives_two_minutes_of_full_load(
    engine: Engine, images: dict[str, str], tmp_path: Path
) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(RUN)
    run = load_toml(RunConfig, toml)
    assert memory_bytes(len(run.model.expert_ids), run.model.expert_shape) > MEMORY_BYTES
    with network(engine) as name:
        common = [
            "run",
            "--detach",
            "--read-only",
            "--tmpfs",
            "/tmp",
            "--network",
            name,
            "--volume",
            f"{toml}:/run.toml:ro",
        ]
        coordinator = engine.run(
            *common, "--network-alias", "coordinator", images["coordinator"], "serve", "--config", "/run.toml",
            "--listen", "0.0.0.0:7700", "--dht-listen", "/ip4/0.0.0.0/tcp/7701", "--advertise", "coordinator",
        ).strip()  # fmt: skip
        ready(engine, coordinator)
        peer = engine.run(
            *common, "--memory", "1g", "--cpus", "1", images["peer"], "serve", "--join", "coordinator:7700",
            "--listen", "0.0.0.0:7702", "--dht-listen", "/ip4/0.0.0.0/tcp/7703",
        ).strip()  # fmt: skip
        said = ready(engine, peer)
        hosted = parse_experts(said["experts"], run.model)
        assert 0 < memory_bytes(len(hosted), run.model.expert_shape) < MEMORY_BYTES / 2
        stderr = engine.logs(peer)
        assert re.search(r"\b1 threads?\b", stderr), stderr

        load = engine.run(
            *common, "--volume", f"{ROOT / 'docker/tests/support/full_load.py'}:/full_load.py:ro",
            "--entrypoint", "python", images["peer"], "/full_load.py", "/run.toml", said["address"], said["experts"],
            LOAD_S,
        ).strip()  # fmt: skip
        failed = engine.run("wait", load, timeout_s=LOAD_S + 120.0).strip()
        state = json.loads(engine.run("inspect", peer))[0]["State"]
        assert (state["Running"], state["OOMKilled"]) == (True, False), state
        assert failed == "0", engine.logs(load)
        counts = json.loads(engine.run("logs", load))
        assert counts["answered"] > LOAD_S, counts
        assert counts["committed"] > 0, counts

        engine.run("stop", peer)
        state = json.loads(engine.run("inspect", peer))[0]["State"]
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False), state
