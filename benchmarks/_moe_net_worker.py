# pyright: basic
"""Our client: RemoteMoE over gRPC, then a Commit after each backward. Arguments: width, address of the server."""

from __future__ import annotations

import sys
from typing import Any

import torch
from _moe_net_run import LAYER, make_run, peer_at
from _moe_task import first_rows, gate_weight, timed_steps
from _processes import die_with_parent, serve_requests
from torch import Tensor

from moe_net.config import RunConfig
from moe_net.garbage import tune_collector
from moe_net.model.remote_moe import RemoteMoE, SwarmLink
from moe_net.placement.view import View
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.types import Encoding
from moe_net.wire.allocator import tune_allocator


async def make_swarm(run: RunConfig, address: str) -> tuple[ExpertSwarm, GrpcTransport]:
    """On the portal's loop, which then owns the channels."""
    transport = GrpcTransport(run=run.name, shape=run.model.expert_shape)
    view = View([peer_at(address)])
    swarm = ExpertSwarm(trainer="benchmark", transport=transport, view=lambda: view, encoding=Encoding.FP32)
    return swarm, transport


def main() -> None:
    die_with_parent()
    tune_allocator()
    tune_collector()
    torch.set_num_threads(1)
    d_model, address = int(sys.argv[1]), sys.argv[2]
    run = make_run(d_model, 4 * d_model)
    with Portal() as portal:
        swarm, transport = portal.run(make_swarm(run, address))
        moe = RemoteMoE(run.model, LAYER, SwarmLink(swarm=swarm, runner=portal))
        with torch.no_grad():
            moe.router.weight.copy_(gate_weight(d_model))

        def layer(x_TD: Tensor) -> Tensor:
            return moe(x_TD[None])[0][0]

        def steps(contestant: str, tokens: int, at_least_s: float, warm_up: bool) -> dict[str, Any]:
            del contestant

            def commit() -> None:
                # The run's whole batch is one token: its gradient has been divided by how many there are already.
                portal.run(swarm.commit(moe.step, 1))
                moe.step += 1

            answer = timed_steps(layer, tokens, d_model, at_least_s, warm_up, commit)
            assert swarm.stats.dropped_pairs == swarm.stats.lost_gradient_pairs == 0
            return answer

        try:
            serve_requests({"steps": steps, "rows": lambda contestant: {"rows": first_rows(layer, d_model)}})
        finally:
            portal.run(transport.close())


if __name__ == "__main__":
    main()
