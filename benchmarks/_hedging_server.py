# pyright: basic
"""An expert server that stalls now and then. Arguments: peer id, share of calls that stall, stall in s, seed."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
import uvloop
from _hedging_run import make_run
from _processes import die_with_parent, say

from moe_net.client import make_banks
from moe_net.experts.host import ExpertHost
from moe_net.garbage import tune_collector
from moe_net.wire.allocator import tune_allocator
from moe_peer.server import ExpertServer


class StallingServer(ExpertServer):
    """Each Forward, Backward and Commit waits, before anything else, with a given probability."""

    def stall(self, fraction: float, stall_s: float, seed: int) -> None:
        self._fraction, self._stall_s, self._draw = fraction, stall_s, random.Random(seed)

    async def _wait(self) -> None:
        if self._draw.random() < self._fraction:
            await asyncio.sleep(self._stall_s)

    async def _forward(self, raw: bytes | memoryview, context: Any, *, write: Callable[[Any], Any]) -> Any:
        await self._wait()
        return await super()._forward(raw, context, write=write)

    async def _backward(self, raw: bytes | memoryview, context: Any, *, write: Callable[[Any], Any]) -> Any:
        await self._wait()
        return await super()._backward(raw, context, write=write)

    async def _commit(self, raw: bytes, context: Any) -> bytes:
        await self._wait()
        return await super()._commit(raw, context)


async def serve(peer_id: str, fraction: float, stall_s: float, seed: int) -> None:
    run = make_run()
    server = StallingServer(ExpertHost(make_banks(run, run.model.expert_ids)), run=run, peer_id=peer_id)
    server.stall(fraction, stall_s, seed)
    await server.start("127.0.0.1:0")
    try:
        say(event="ready", address=server.address, pid=os.getpid())
        await asyncio.Event().wait()
    finally:
        await server.stop(grace_s=0.0)


def main() -> None:
    die_with_parent()
    tune_allocator()
    tune_collector()
    torch.set_num_threads(1)
    uvloop.run(serve(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))


if __name__ == "__main__":
    main()
