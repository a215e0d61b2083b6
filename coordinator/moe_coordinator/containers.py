"""Faults carried out on the containers of a Compose project, by the docker command line."""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_coordinator.faults import Action, Fault, FaultPlan, is_cut
from moe_coordinator.proxy_command import Change
from moe_net.config import to_json
from moe_net.errors import MoeNetError

# An idle engine answers within a second; one whose two cores build and train may need a few.
ANSWER_TIMEOUT_S = 60.0


class DockerError(MoeNetError):
    """The docker command failed, or a container did not do what it was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """Which start of a container this is, and whether it still runs."""

    started_at: str
    """The time as the engine writes it; another one means that the container was started again."""
    running: bool
    """Paused counts as running."""
    exit_code: int
    """The exit code of the container's last end."""


async def docker(*arguments: str) -> str:
    """What `docker ARGUMENTS` prints; DockerError with its complaint when it fails."""
    process = await asyncio.create_subprocess_exec("docker", *arguments, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            stdout, stderr = await process.communicate()
    except TimeoutError:
        raise DockerError(f"docker {' '.join(arguments)}: no answer in {ANSWER_TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise DockerError(f"docker {' '.join(arguments)}: {stderr.decode().strip()}")
    return stdout.decode()


class Containers:
    """The services of one project, each of one container. A fault's target is a service; the proxy of `peer-2` is the
    service `proxy-2`."""

    def __init__(self, project: str, plan: FaultPlan) -> None:
        self._project = project
        self._plan = plan
        # By target: (network, aliases) that it had before it was disconnected.
        self._networks: dict[str, list[tuple[str, list[str]]]] = {}

    async def id_of(self, service: str) -> str:
        """The id of the service's container; ValueError when it has none, or several."""
        labels = (f"project={self._project}", f"service={service}")
        filters = [word for label in labels for word in ("--filter", f"label=com.docker.compose.{label}")]
        found = (await docker("ps", "--all", "--quiet", "--no-trunc", *filters)).split()
        if len(found) != 1:
            raise ValueError(f"project {self._project}: {service} has {len(found)} containers, and not one")
        return found[0]

    async def life(self, service: str) -> Life:
        """How its container is."""
        seen = await self._inspect(service)
        state = seen["State"]
        return Life(
            started_at=state["StartedAt"],
            running=state["Running"],
            exit_code=state["ExitCode"],
        )

    async def check(self) -> None:
        """ValueError names the first fault that this project cannot have."""
        for number, fault in enumerate(self._plan.fault):
            for service in (fault.target, _proxy(fault.target)) if fault.on_network else (fault.target,):
                try:
                    await self.id_of(service)
                except ValueError as error:
                    raise ValueError(f"fault.{number}.target: {error}") from None

    async def perform(self, action: Action, active: Sequence[Fault]) -> None:
        """Begin the fault, or end it; `active` are those that last from now on, in the order of their beginnings."""
        target, began = action.fault.target, action.phase == "began"
        match action.fault.what:
            case "kill":
                await docker("kill", await self.id_of(target))
            case "term":
                await docker("kill", "--signal", "TERM", await self.id_of(target))
            case "stop":
                await docker("pause" if began else "unpause", await self.id_of(target))
            case "restart":
                await docker("kill" if began else "start", await self.id_of(target))
            case "disconnect" if began:
                await self._disconnect(target)
            case "disconnect":
                await self._connect(target)
            case _:
                await self._tell_proxy(target, active)

    async def _disconnect(self, target: str) -> None:
        container = await self.id_of(target)
        networks: dict[str, Any] = (await self._inspect(target))["NetworkSettings"]["Networks"]
        self._networks[target] = [(name, list(network["Aliases"] or ())) for name, network in networks.items()]
        for name in networks:
            await docker("network", "disconnect", name, container)

    async def _connect(self, target: str) -> None:
        container = await self.id_of(target)
        for name, aliases in self._networks.pop(target):
            # Without them nobody would find it by the name of its service any more.
            await docker("network", "connect", *(f"--alias={alias}" for alias in aliases), name, container)

    async def _tell_proxy(self, target: str, active: Iterable[Fault]) -> None:
        """Its conditions and cuts as they are to be now, by its stdin: no port is open for it, and no file shared."""
        active = tuple(active)
        up, down = self._plan.conditions(target, active)
        change = Change(up=up, down=down, cut=is_cut(target, active))
        proxy = await self.id_of(_proxy(target))
        attached = await asyncio.create_subprocess_exec(
            "docker", "attach", "--sig-proxy=false", proxy, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
        )
        assert attached.stdin is not None
        assert attached.stdout is not None
        try:
            attached.stdin.write(to_json(change).encode() + b"\n")
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answer = json.loads(await attached.stdout.readline() or b"{}")
        except TimeoutError:
            raise DockerError(f"{_proxy(target)} says nothing about {change} in {ANSWER_TIMEOUT_S:g} s") from None
        finally:
            attached.kill()
            await attached.wait()
        if answer.get("event") != "changed":
            raise DockerError(f"{_proxy(target)} does not take {change}: {answer}")

    async def _inspect(self, service: str) -> dict[str, Any]:
        return json.loads(await docker("inspect", await self.id_of(service)))[0]


def _proxy(peer: str) -> str:
    """The service of the proxy in front of this peer."""
    return peer.replace("peer-", "proxy-", 1)
