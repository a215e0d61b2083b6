"""The container engine that the tests use: one that runs already, or one that they start for themselves."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from egress import URL, egress

START_S = 60.0
STOP_S = 60.0
CGROUPS = Path("/sys/fs/cgroup")
PR_SET_PDEATHSIG = 1


class EngineError(Exception):
    """There is no engine and none can be started, or a command of it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    client: str
    """A `docker` that this engine understands and that can build with BuildKit."""
    environment: Mapping[str, str]
    """The environment of every command that talks to this engine."""
    borrowed: bool
    """It runs for others too, and goes on when the tests have ended. Ours needs a proxy (`egress`) to build."""

    def run(self, *arguments: object, timeout_s: float = 120.0, stdin: int | None = None) -> str:
        """What `docker ARGUMENTS` printed."""
        return command([self.client, *map(str, arguments)], self.environment, timeout_s=timeout_s, stdin=stdin)

    def logs(self, container: str) -> str:
        """All that a container said, for people as well as for machines."""
        argv = [self.client, "logs", container]
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, timeout=60.0, check=True)
        return done.stdout + done.stderr


def command(argv: list[str], environment: Mapping[str, str], *, timeout_s: float, stdin: int | None = None) -> str:
    """What a command printed on stdout; an error with what it said when it failed."""
    done = subprocess.run(
        argv, env=environment, stdin=subprocess.DEVNULL if stdin is None else stdin, capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise EngineError(f"{' '.join(argv)} failed ({done.returncode}): {done.stderr[-4000:]}{done.stdout[-2000:]}")
    return done.stdout


def find_client() -> str | None:
    """The first `docker` of PATH that builds with BuildKit: up to version 22 by itself, later on through buildx."""
    for folder in [*os.get_exec_path(), "/usr/bin"]:
        client = shutil.which("docker", path=folder)
        if client is None:
            continue
        version = subprocess.run([client, "--version"], capture_output=True, text=True, check=False).stdout
        major = version.removeprefix("Docker version ").split(".")[0]
        buildx = subprocess.run([client, "buildx", "version"], capture_output=True, check=False)
        if buildx.returncode == 0 or (major.isdigit() and int(major) < 23):
            return client
    return None


def environment_for(client: str, host: str | None) -> dict[str, str]:
    """The environment of commands that talk to the engine at `host` (None: wherever docker finds one)."""
    environment = {**os.environ, "DOCKER_BUILDKIT": "1", "COMPOSE_DOCKER_CLI_BUILD": "1"}
    # docker-compose builds with the `docker` that it finds first.
    environment["PATH"] = os.pathsep.join([str(Path(client).parent), environment["PATH"]])
    if host is not None:
        environment["DOCKER_HOST"] = host
        environment.pop("DOCKER_CONTEXT", None)
    return environment


def answers(engine: Engine) -> bool:
    done = subprocess.run(
        [engine.client, "info"], env=engine.environment, capture_output=True, timeout=30.0, check=False
    )
    return done.returncode == 0


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def only_child(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def remove_cgroups(name: str) -> None:
    """Removes what the engine made of this name in each hierarchy; empty by now."""
    for top in [*CGROUPS.glob(f"*/{name}"), *CGROUPS.glob(name)]:
        for folder in sorted(top.rglob("*/"), key=lambda path: len(path.parts), reverse=True):
            folder.rmdir()
        top.rmdir()


@contextmanager
def started_engine(client: str) -> Iterator[Engine]:
    """An engine in namespaces of its own: processes, mounts, bridges and firewall rules end with it, and with us.

    What it leaves is its folder and its cgroups, and those are removed here.
    """
    # Not a folder of pytest's: a unix socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="moe-engine-"))
    name = folder.name
    host = f"unix://{folder}/docker.sock"
    daemon = (
        f"ip link set lo up && exec dockerd --data-root {folder}/data --exec-root {folder}/exec "
        f"-H {host} --pidfile {folder}/docker.pid --cgroup-parent /{name}"
    )
    log = folder / "dockerd.log"
    with log.open("wb") as file:
        # tini reaps what containerd leaves: in there it is process 1.
        process = subprocess.Popen(
            ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
             "tini", "-s", "--", "sh", "-c", daemon],
            env={**os.environ, "HTTP_PROXY": URL, "HTTPS_PROXY": URL}, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
    try:
        engine = Engine(client=client, environment=environment_for(client, host), borrowed=False)
        deadline_s = time.monotonic() + START_S
        while not (folder / "docker.sock").exists() or not answers(engine):
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            if process.returncode is not None or time.monotonic() > deadline_s:
                raise EngineError(f"dockerd did not start: {log.read_text()[-4000:]}")
        with egress(Path(f"/proc/{only_child(process.pid)}/ns/net")):
            yield engine
    finally:
        init = only_child(process.pid)
        if init is not None:
            os.kill(init, signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        remove_cgroups(name)
        shutil.rmtree(folder)


@contextmanager
def running_engine() -> Iterator[Engine]:
    """An engine that runs already, as `docker info` finds it; otherwise one that ends with the block."""
    client = find_client()
    if client is not None:
        borrowed = Engine(client=client, environment=environment_for(client, None), borrowed=True)
        if answers(borrowed):
            yield borrowed
            return
    missing = [tool for tool in ("dockerd", "unshare", "tini", "ip", "iptables") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing or client is None:
        raise EngineError(
            "no container engine answers (`docker info`), and to start one takes root and Debian's docker.io, "
            "docker-compose, debootstrap, iptables and iproute2"
        )
    with started_engine(client) as started:
        yield started
