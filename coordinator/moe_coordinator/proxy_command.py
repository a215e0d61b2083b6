"""`moe-coordinator proxy`: the bad network in front of one server, as a process of its own."""

from __future__ import annotations

import asyncio
import json
import math
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass

import uvloop

from moe_coordinator.config import ProxyOptions
from moe_coordinator.faults import FaultPlan
from moe_coordinator.proxy import Proxy
from moe_coordinator.shaping import Conditions
from moe_net.config import from_json, load_toml
from moe_net.discovery.listen import check_unused
from moe_net.preflight import must_read_file
from moe_net.signals import on_signals, stop_signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What one line of stdin asks for; what is absent stays as it is."""

    up: Conditions | None = None
    """Conditions of the way to the target from now on."""
    down: Conditions | None = None
    """Conditions of the way from the target from now on."""
    cut: bool | None = None
    """true: connections are reset and new ones refused, until false."""


def main(options: ProxyOptions) -> int:
    """Carry connections until a signal asks to stop, which ends the process with exit code 0 wherever it is."""
    if options.faults is not None:
        must_read_file("--faults", options.faults)
    plan = FaultPlan() if options.faults is None else load_toml(FaultPlan, options.faults)
    # The proxy's own sockets share their port, and would share it with others.
    check_unused(options.listen)
    uvloop.run(_carry(options, plan))
    return 0


def change(proxy: Proxy, asked: Change) -> None:
    """Do what was asked for; asked twice, it is as asked once."""
    if asked.up is not None:
        proxy.up = asked.up
    if asked.down is not None:
        proxy.down = asked.down
    if asked.cut:
        proxy.cut(math.inf)
    elif asked.cut is not None:
        proxy.end_cut()


async def _carry(options: ProxyOptions, plan: FaultPlan) -> None:
    up, down = plan.conditions(options.name, ())
    host, _, port = options.listen.rpartition(":")
    proxy = Proxy(options.target, host=host, port=int(port), seed=f"{plan.seed}/{options.name}", up=up, down=down)
    # Nothing has to be put in order, and what waits for the resolver or for a host that does not answer may wait long.
    with on_signals(lambda _: os._exit(0), stop_signals()):
        async with proxy:
            _say("ready", role="proxy", name=options.name, address=proxy.address, target=options.target)
            await _hear(lambda asked: change(proxy, asked))
            await asyncio.Event().wait()  # nobody speaks any more; connections are carried all the same


async def _hear(do: Callable[[Change], None]) -> None:
    """Carry out what stdin says, line by line, until it ends; each is answered on stdout."""
    loop = asyncio.get_running_loop()
    stdin = sys.stdin.fileno()
    if not _can_be_awaited(stdin):
        return
    reader = asyncio.StreamReader(loop=loop)
    pipe = os.fdopen(os.dup(stdin), "rb", buffering=0)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader, loop=loop), pipe)
    try:
        while line := await reader.readline():
            try:
                do(from_json(Change, line.decode()))
            except ValueError as error:
                _say("refused", error=str(error))
            else:
                _say("changed")
    finally:
        transport.close()


def _can_be_awaited(fd: int) -> bool:
    """False for files and for /dev/null, which never have anything to wait for."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)


def _say(event: str, **values: object) -> None:
    print(json.dumps({"event": event, **values}), flush=True)
