"""The swarm of `docker/compose.yaml` on an engine: up, scaled, watched, stopped, and gone again without a trace."""

from __future__ import annotations

import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from container_engine import Engine, command
from container_images import ROOT

from moe_peer.metrics import Record, StepMetrics, read_metrics

COMPOSE_FILE = ROOT / "docker" / "compose.yaml"
T = TypeVar("T")

POLL_S = 0.5
# Containers, one after the other, on a machine of two cores with other things to do.
UP_S = 300.0


def wait_for(what: str, look: Callable[[], T | None], *, timeout_s: float) -> T:
    """What `look` returns as soon as it is something; TimeoutError says what did not come."""
    deadline_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (found := look()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        pause.wait(POLL_S)
    return found


def compose_command() -> list[str]:
    """`docker-compose` where there is one, the plugin of `docker` otherwise: compose.yaml is for both."""
    return ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposedSwarm:
    engine: Engine
    project: str
    tag: str
    results: Path
    """On the host; the trainer's folder lies in it."""
    files: tuple[Path, ...] = (COMPOSE_FILE,)

    def compose(self, *arguments: object, timeout_s: float = UP_S) -> str:
        files = [word for file in self.files for word in ("--file", str(file))]
        environment = {**self.engine.environment, "MOE_NET_TAG": self.tag, "MOE_NET_RESULTS": str(self.results)}
        argv = [*compose_command(), "--project-name", self.project, *files, *map(str, arguments)]
        return command(argv, environment, timeout_s=timeout_s)

    def up(self, *, peers: int) -> None:
        self.compose("up", "--detach", "--no-build", "--no-recreate", "--scale", f"peer={peers}")

    def containers(self, service: str | None = None) -> list[dict[str, Any]]:
        """What `docker inspect` says of each, ended ones too, in the order of their numbers."""
        labels = [f"label=com.docker.compose.project={self.project}"]
        labels += [f"label=com.docker.compose.service={service}"] if service is not None else []
        filters = [word for label in labels for word in ("--filter", label)]
        names = self.engine.run("ps", "--all", "--quiet", *filters).split()
        found: list[dict[str, Any]] = json.loads(self.engine.run("inspect", *names)) if names else []
        return sorted(found, key=lambda c: int(c["Config"]["Labels"]["com.docker.compose.container-number"]))

    def logs(self, service: str) -> str:
        return self.compose("logs", "--no-color", service)

    def says(self, container: str, event: str) -> dict[str, Any] | None:
        """The last line of JSON of this event that a container printed."""
        found = None
        for line in self.engine.run("logs", container).splitlines():
            if line.startswith("{") and (values := json.loads(line))["event"] == event:
                found = values
        return found

    def records(self) -> list[Record]:
        path = self.results / "trainer" / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def steps(self) -> list[StepMetrics]:
        return [record for record in self.records() if isinstance(record, StepMetrics)]

    def wait_for_step(self, step: int, *, timeout_s: float) -> Sequence[StepMetrics]:
        """The steps up to this one and later. AssertionError as soon as a member had to be started again."""

        def look() -> Sequence[StepMetrics] | None:
            restarted = [container["Name"] for container in self.containers() if container["RestartCount"]]
            assert not restarted, f"{restarted} ended without being told to"
            steps = self.steps()
            return steps if steps and steps[-1].step >= step else None

        return wait_for(f"step {step} of the trainer", look, timeout_s=timeout_s)

    def left(self) -> list[str]:
        """What the engine still has of this project."""
        label = f"label=com.docker.compose.project={self.project}"
        kinds = {"container": ["ps", "--all"], "network": ["network", "ls"], "volume": ["volume", "ls"]}
        found = [
            f"{kind} {name}"
            for kind, listing in kinds.items()
            for name in self.engine.run(*listing, "--quiet", "--filter", label).split()
        ]
        return found + [f"volume {name}" for name in self.volumes_in_use()]

    def volumes_in_use(self) -> list[str]:
        """Volumes of its containers: those without a name carry no label."""
        return [m["Name"] for c in self.containers() for m in c["Mounts"] if m["Type"] == "volume"]


@contextmanager
def composed_swarm(
    engine: Engine, *, tag: str, results: Path, files: Sequence[Path] = (COMPOSE_FILE,)
) -> Iterator[ComposedSwarm]:
    """A swarm that is not up yet; afterwards nothing of it is there. When the test fails, it says what was logged."""
    swarm = ComposedSwarm(
        engine=engine, project=f"moe-test-{secrets.token_hex(4)}", tag=tag, results=results, files=tuple(files)
    )
    before = set(engine.run("volume", "ls", "--quiet").split())
    try:
        yield swarm
    except BaseException:
        print(swarm.compose("logs", "--no-color", "--tail", "40"))
        print(swarm.compose("ps"))
        raise
    finally:
        volumes = set(swarm.volumes_in_use())
        swarm.compose("down", "--volumes", "--timeout", "10")
        left = swarm.left() + sorted(volumes & set(engine.run("volume", "ls", "--quiet").split()) - before)
        # The trainer's files belong to a user that has no name here.
        engine.run(
            "run", "--rm", "--network", "none", "--user", "root", "--volume", f"{results}:/results",
            "--entrypoint", "find", f"moe-net-peer:{tag}", "/results", "-mindepth", "1", "-delete",
        )  # fmt: skip
        assert not left, f"left behind: {left}"
