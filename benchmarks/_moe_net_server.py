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
from torch import Tensor

from moe_net.experts.bank import ExpertBank
from moe_net.experts.host import ExpertHost
from moe_net.garbage import tune_collector
from moe_net.wire.allocator import tune_allocator
from moe_peer.server import ExpertServer


def make_bank(d_model: int) -> ExpertBank:
    run = make_run(d_model, 4 * d_model)
    bank = ExpertBank(
        layer=LAYER,
        indices=[expert.index for expert in EXPERTS],
        shape=run.model.expert_shape,
        optimizer=run.optimizer,
        global_batch_tokens=run.global_batch_tokens,
        run=run.name,
        seed=run.seed,
        init_std=run.model.init_std,
    )
    state: dict[str, Tensor] = bank.state()
    for expert in EXPERTS:
        w_in_DF, w_out_FD = expert_weights(expert.index, d_model)
        state |= {f"{expert}.w_in": w_in_DF, f"{expert}.w_out": w_out_FD}
    bank.load_state(state)
    return bank


async def serve(d_model: int) -> None:
    server = ExpertServer(ExpertHost({LAYER: make_bank(d_model)}), run=make_run(d_model, 4 * d_model), peer_id=PEER)
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
