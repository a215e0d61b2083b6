# pyright: basic
"""Our expert server with the benchmark's weights. Argument: width."""

from __future__ import annotations

import asyncio
import sys

import torch
import uvloop
from _moe_net_run import EXPERTS, LAYER, PEER, make_run
from _moe_task import expert_weights
from _processes import die_with_parent, say

from moe_net.client import make_banks
from moe_net.config import RunConfig
from moe_net.experts.host import ExpertHost
from moe_net.garbage import tune_collector
from moe_net.wire.allocator import tune_allocator
from moe_net.wire.state import tensor_name
from moe_peer.server import ExpertServer


def make_host(run: RunConfig) -> ExpertHost:
    host = ExpertHost(make_banks(run, EXPERTS))
    state = host.fetch(LAYER, ())
    for expert in EXPERTS:
        w_in_DF, w_out_FD = expert_weights(expert.index, run.model.d_model)
        state |= {tensor_name(expert, "w_in"): w_in_DF, tensor_name(expert, "w_out"): w_out_FD}
    host.load_state(state)
    return host


async def serve(d_model: int) -> None:
    run = make_run(d_model, 4 * d_model)
    server = ExpertServer(make_host(run), run=run, peer_id=PEER)
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
