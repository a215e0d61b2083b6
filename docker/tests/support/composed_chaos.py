"""A composed swarm under faults: `make compose-chaos` runs this file, and a test does the same with fewer faults."""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from composed_swarm import COMPOSE_FILE, ComposedSwarm, composed_swarm
from container_engine import Engine, running_engine
from container_images import ROOT, built_images

CHAOS_FILE = ROOT / "docker" / "compose.chaos.yaml"
FAULTS_FILE = ROOT / "docker" / "chaos.toml"


@contextmanager
def named_peers(engine: Engine, *, tag: str, results: Path, faults: Path) -> Iterator[ComposedSwarm]:
    """A swarm that is up: named peers behind proxies, whose network is as bad as the file says."""
    with_faults = replace(engine, environment={**engine.environment, "MOE_NET_FAULTS": str(faults)})
    with composed_swarm(with_faults, tag=tag, results=results, files=(COMPOSE_FILE, CHAOS_FILE)) as swarm:
        swarm.compose("up", "--detach", "--no-build")
        yield swarm


def suffer(swarm: ComposedSwarm, faults: Path, *, for_s: float) -> tuple[int, str]:
    """Does to the swarm what the file says; the exit code of `moe-coordinator chaos`, and what it said. That is printed
    as it comes, too."""
    command = [
        sys.executable, "-m", "moe_coordinator.cli", "chaos", "--project", swarm.project, "--faults", str(faults),
        "--metrics", str(swarm.results / "trainer" / "metrics.jsonl"), "--for-s", str(for_s),
    ]  # fmt: skip
    said: list[str] = []
    with subprocess.Popen(
        command, env=swarm.engine.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    return process.returncode, "".join(said)


def main() -> int:
    """Exit code 0 when training has taken it."""
    tag = f"chaos-{secrets.token_hex(4)}"
    with (
        running_engine() as engine,
        built_images(engine, tag=tag),
        tempfile.TemporaryDirectory(prefix="moe-chaos-") as folder,
        named_peers(engine, tag=tag, results=Path(folder), faults=FAULTS_FILE) as swarm,
    ):
        code, _ = suffer(swarm, FAULTS_FILE, for_s=300.0)
        if code != 0:
            for container in swarm.containers("trainer"):
                print(engine.logs(container["Id"])[-4000:])
        return code


if __name__ == "__main__":
    raise SystemExit(main())
