# pyright: basic
"""One of the expert servers of `latency.py`. Argument: its number."""

from __future__ import annotations

import asyncio
import sys

import torch
import uvloop
from _latency_run import experts_of, make_run
from _processes import die_with_parent, say

from moe_net.client import make_banks
from moe_net.experts.host import ExpertHost
from moe_net.garbage import tune_collector
from moe_net.wire.allocator import tune_allocator
from moe_peer.server import ExpertServer

# Of 64 micro-batches in flight, four layers each: some 600 MiB.
STAGE_BYTES = 2**30


async def serve(number: int) -> None:
    run = make_run()
    host = ExpertHost(make_banks(run, experts_of(number)), stage_bytes=STAGE_BYTES)
    server = ExpertServer(host, run=run, peer_id=f"server-{number}")
    await server.start("127.0.0.1:0")
    try:
        say(event="ready", address=server.address)
        await asyncio.Event().wait()
    finally:
        await server.stop(grace_s=0.0)


def main() -> None:
    die_with_parent()
    tune_allocator()
    tune_collector()
    torch.set_num_threads(1)
    uvloop.run(serve(int(sys.argv[1])))


if __name__ == "__main__":
    main()
