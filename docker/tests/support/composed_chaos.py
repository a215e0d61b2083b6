"""A composed swarm under faults: `make compose-chaos` runs this file, and a test does the same with fewer faults."""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from composed_swarm import COMPOSE_FILE, composed_swarm
from container_engine import Engine, running_engine
from container_images import ROOT, built_images

CHAOS_FILE = ROOT / "docker" / "compose.chaos.yaml"
FAULTS_FILE = ROOT / "docker" / "chaos.toml"


def chaos(engine: Engine, *, tag: str, results: Path, faults: Path, for_s: float) -> subprocess.CompletedProcess[str]:
    """Starts the swarm with its proxies, has `moe-coordinator chaos` do what the file says, and takes all down.

    What the command says goes to our stderr and stdout as well, as it comes.
    """
    with_faults = replace(engine, environment={**engine.environment, "MOE_NET_FAULTS": str(faults)})
    with composed_swarm(with_faults, tag=tag, results=results, files=(COMPOSE_FILE, CHAOS_FILE)) as swarm:
        swarm.compose("up", "--detach", "--no-build")
        command = [
            sys.executable, "-m", "moe_coordinator.cli", "chaos", "--project", swarm.project, "--faults", str(faults),
            "--metrics", str(results / "trainer" / "metrics.jsonl"), "--for-s", str(for_s),
        ]  # fmt: skip
        with subprocess.Popen(
            command, env=engine.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                print(line, end="", flush=True)
                said.append(line)
    return subprocess.CompletedProcess(command, process.returncode, "".join(said))


if __name__ == "__main__":
    tag = f"chaos-{secrets.token_hex(4)}"
    with (
        running_engine() as found,
        built_images(found, tag=tag),
        tempfile.TemporaryDirectory(prefix="moe-chaos-") as folder,
    ):
        done = chaos(found, tag=tag, results=Path(folder), faults=FAULTS_FILE, for_s=300.0)
    raise SystemExit(done.returncode)
