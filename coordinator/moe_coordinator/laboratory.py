"""Carries out a plan of faults on the processes of a local swarm and on the way to its peers."""

from __future__ import annotations

import asyncio
import io
import json
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from moe_coordinator.faults import Action, FaultPlan, advance, describe, is_cut, timetable
from moe_coordinator.proxy import Proxy
from moe_coordinator.shaping import PERFECT
from moe_coordinator.supervisor import Child, ChildError, ChildSpec, Event, Supervisor
from moe_net.screen import Lossy

FAULTS_FILE = "faults.jsonl"


@asynccontextmanager
async def open_proxies(plan: FaultPlan, *, n_peers: int) -> AsyncGenerator[Mapping[str, Proxy]]:
    """By peer's name, those that `plan` needs: they listen, and carry connections until this is left."""
    async with AsyncExitStack() as stack:
        proxies: dict[str, Proxy] = {}
        for index in range(n_peers):
            name = f"peer-{index}"
            if plan.needs_proxy(name):
                up, down = plan.conditions(name, ())
                proxy = Proxy(seed=plan.seed * 1000 + index, up=up, down=down)
                proxies[name] = await stack.enter_async_context(proxy)
        yield proxies


class Laboratory:
    """Open it (`Laboratory.open`) inside the supervisor's context: it starts children, until it is left. Its proxies
    are opened before (`open_proxies`): whom the supervisor stops has the way to others until then.

    The swarm tells it of every member it has started (`add`) and of every step of the first trainer (`on_step`).
    """

    def __init__(
        self,
        plan: FaultPlan,
        supervisor: Supervisor,
        proxies: Mapping[str, Proxy],
        note: TextIO | None,
        *,
        say: Callable[[str], None],
        ready_timeout_s: float,
    ) -> None:
        self.proxies = proxies
        """By peer's name; peers that nothing ever happens on the way to have none."""
        self.members: dict[str, Child] = {}
        """By name; the latest of those that had it."""
        self._plan = plan
        self._supervisor = supervisor
        self._note = note
        self._say = say
        self._ready_timeout_s = ready_timeout_s
        self._specs: dict[str, ChildSpec] = {}
        self._hosts: dict[str, str] = {}
        self._restarts: dict[str, int] = {}
        self._state = timetable(plan.fault)
        self._step: int | None = None
        self._changed = asyncio.Event()
        # A start must not be cancelled half-way, with a process that nobody knows; what comes after it may be.
        self._starting: set[asyncio.Task[None]] = set()
        self._watching: set[asyncio.Task[None]] = set()
        self._left = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        plan: FaultPlan,
        supervisor: Supervisor,
        proxies: Mapping[str, Proxy],
        out: Path,
        *,
        say: Callable[[str], None],
        ready_timeout_s: float,
    ) -> AsyncGenerator[Laboratory]:
        """Faults happen until this is left, which ends those that go on: whoever is stopped then can save what it has
        learned. They are noted in `out`/faults.jsonl."""
        path = out / FAULTS_FILE
        path.unlink(missing_ok=True)
        with ExitStack() as stack:
            note = None
            if plan.fault:
                note = io.TextIOWrapper(Lossy(path, "w", name=str(path), tell=say), line_buffering=True)
                stack.enter_context(note)
            lab = cls(plan, supervisor, proxies, note, say=say, ready_timeout_s=ready_timeout_s)
            lab._watching.add(asyncio.create_task(lab._keep_time()))
            try:
                yield lab
            finally:
                await lab._leave()

    async def _leave(self) -> None:
        self._left = True
        for proxy in self.proxies.values():
            proxy.shape(PERFECT)
            proxy.end_cut()
        for child in self.members.values():
            child.resume()
        for task in self._watching:
            task.cancel()
        tasks = self._starting | self._watching
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.result()

    def add(self, spec: ChildSpec, child: Child, *, hosts: str = "") -> None:
        """A member of the swarm, which may be a fault's target; `hosts` says what is lost with it."""
        self.members[spec.name] = child
        self._specs[spec.name] = spec
        self._hosts[spec.name] = hosts

    async def ready(self, child: Child) -> str:
        """Wait until a peer serves, and send its proxy's connections there; its address as others know it.

        ChildError as of `Child.ready`.
        """
        event = await child.ready(self._ready_timeout_s)
        if child.name in self.proxies:
            self.proxies[child.name].target = str(event["listen"])
        return str(event["address"])

    def on_step(self, step: int) -> None:
        """The first trainer has made this step. What is due then has happened when this returns."""
        self._step = step
        self._advance(step)
        self._changed.set()

    def _advance(self, step: int | None) -> None:
        self._state, actions = advance(self._state, now_s=time.monotonic(), step=step)
        for action in actions:
            self._do(action)

    async def _keep_time(self) -> None:
        while True:
            self._changed.clear()
            next_s = self._state.next_s
            try:
                async with asyncio.timeout(None if next_s is None else max(0.0, next_s - time.monotonic())):
                    await self._changed.wait()
            except TimeoutError:
                self._advance(None)

    def _do(self, action: Action) -> None:
        fault, began = action.fault, action.phase == "began"
        child = self.members.get(fault.target)
        if child is None:  # the first trainer was faster than the start of the others
            self._say(f"step {self._step}: {fault.target} is not there yet: no {fault.what}")
            return
        done = "" if child.running or fault.on_network or (fault.what == "restart" and not began) else " (it has ended)"
        match fault.what:
            case "kill":
                child.kill()
            case "term":
                child.terminate()
            case "stop" if began:
                child.suspend()
            case "stop":
                child.resume()
            case "restart" if began:
                child.kill()
            case "restart":
                self._starting.add(asyncio.create_task(self._restart(fault.target, child)))
            case "cut" if began:
                self.proxies[fault.target].cut(math.inf)
            case "cut":
                if not is_cut(fault.target, self._state.active):
                    self.proxies[fault.target].end_cut()
            case _:
                proxy = self.proxies[fault.target]
                proxy.up, proxy.down = self._plan.conditions(fault.target, self._state.active)
        self._say(f"step {self._step}: {describe(action, hosts=self._hosts[fault.target])}{done}")
        event = {"time_s": time.time(), "step": self._step, "what": fault.what, "target": fault.target}
        assert self._note is not None
        self._note.write(json.dumps({**event, "phase": action.phase}) + "\n")

    async def _restart(self, name: str, old: Child) -> None:
        await old.wait()  # it may have to give its port back
        self._restarts[name] = self._restarts.get(name, 0) + 1
        spec = replace(self._specs[name], log_suffix=f".{self._restarts[name]}")
        spec = at_same_ports(spec, old.last.get("ready")) if name == "coordinator" else self._with_a_way_in(spec)
        if self._left:
            return
        child = await self._supervisor.start(spec)
        self.members[name] = child
        if not self._left:
            self._watching.add(asyncio.create_task(self._greet(child)))

    def _with_a_way_in(self, spec: ChildSpec) -> ChildSpec:
        """A peer's, which joins by another member when the coordinator is not there."""
        others = [other for other in self.members.values() if other.running and other.name != spec.name]
        ways = [str(other.last["ready"]["dht"][0]) for other in others if other.last.get("ready", {}).get("dht")]
        if not ways or self.members["coordinator"].running:
            return spec
        # Any member is a way in. Asked as well, the dead coordinator would cost the whole --join-timeout-s.
        at = spec.argv.index("--join")
        return replace(spec, argv=(*spec.argv[: at + 1], ways[0], *spec.argv[at + 2 :]))

    async def _greet(self, child: Child) -> None:
        try:
            self._say(f"{child.name} serves again at {await self.ready(child)}")
        except ChildError as error:
            if not child.stopping:  # else it was killed meanwhile
                self._say(str(error))


def at_same_ports(coordinator: ChildSpec, ready: Event | None) -> ChildSpec:
    """The coordinator where the others look for it; `ready` is what it said the first time, if it came that far."""
    if ready is None:
        return coordinator
    at = coordinator.argv.index("--listen")
    dht = str(ready["dht"][0]).partition("/p2p/")[0]
    argv = (*coordinator.argv[:at], "--listen", str(ready["listen"]), "--dht-listen", dht, *coordinator.argv[at + 2 :])
    return replace(coordinator, argv=argv)
