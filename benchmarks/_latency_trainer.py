# pyright: basic
"""The trainer of `latency.py`: the real one, with a fixed view of the servers. Arguments: their addresses."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from _latency_run import experts_of, make_batches, make_run
from _processes import die_with_parent, serve_requests

from moe_net.garbage import tune_collector
from moe_net.model.remote_moe import SwarmLink
from moe_net.placement.view import View
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.types import PeerInfo
from moe_net.wire.allocator import tune_allocator
from moe_peer.trainer import Trainer, build_model


async def make_swarm(addresses: list[str]) -> tuple[ExpertSwarm, GrpcTransport]:
    """On the portal's loop, which then owns the channels."""
    run = make_run()
    view = View([PeerInfo(peer_id=f"server-{i}", address=a, experts=experts_of(i)) for i, a in enumerate(addresses)])
    transport = GrpcTransport(run=run.name, shape=run.model.expert_shape)
    swarm = ExpertSwarm(trainer="latency", transport=transport, view=lambda: view, encoding=run.wire_encoding)
    return swarm, transport


def main() -> None:
    die_with_parent()
    tune_allocator()
    tune_collector()
    torch.set_num_threads(1)
    run = make_run()
    with Portal() as portal:
        swarm, transport = portal.run(make_swarm(sys.argv[1:]))
        link = SwarmLink(swarm=swarm, runner=portal)
        step = 0

        def train(in_flight: int, n: int) -> dict[str, Any]:
            """A step of n micro-batches, timed as a whole, and how long nothing was computed in it."""
            nonlocal step
            trainer = Trainer(
                run=run, model=build_model(run, link), link=link, batches=make_batches(n), n_micro=n,
                in_flight=in_flight,
            )  # fmt: skip
            with trainer:
                trainer.step = step
                started_s, cpu_s = time.perf_counter(), time.process_time()
                result = trainer.train_step()
                taken_s = time.perf_counter() - started_s
                step = trainer.step
            assert swarm.stats.dropped_pairs == swarm.stats.lost_gradient_pairs == 0
            return {
                "taken_s": taken_s, "tokens": result.tokens, "idle_s": result.wait_s, "retries": swarm.stats.retries,
                "cpu_s": time.process_time() - cpu_s,
            }  # fmt: skip

        try:
            serve_requests({"train": train})
        finally:
            portal.run(transport.close())


if __name__ == "__main__":
    main()
