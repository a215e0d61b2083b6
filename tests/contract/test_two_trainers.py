"""Two trainers over gRPC, each a step apart from the other at random: the experts are to the bit those of one process
that is fed the committed calls in the order of the commits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from swarms import small_run

from moe_net.client import make_banks
from moe_net.experts.commits import Closed
from moe_net.experts.host import ExpertHost
from moe_net.placement.view import View
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.types import PeerInfo
from moe_net.wire.messages import (
    BackwardCall,
    CommitAnswer,
    CommitCall,
    ForwardCall,
    RoutedRows,
)
from moe_peer.server import ExpertServer

STEPS, TOKENS, CHOICES = 200, 8, 2
RUN = replace(small_run(), global_batch_tokens=2 * TOKENS)
LAYERS = range(RUN.model.n_layers)


class Recording(ExpertHost):
    """A real one that writes down what came."""

    def __init__(self) -> None:
        super().__init__(make_banks(RUN, RUN.model.expert_ids))
        self.rows: dict[bytes, RoutedRows] = {}
        self.backwards: dict[bytes, BackwardCall] = {}
        self.commits: list[CommitCall] = []

    def forward_many(self, calls: Sequence[ForwardCall]) -> list[object]:  # type: ignore[override]
        self.rows |= {call.call_id: call.rows for call in calls}
        return super().forward_many(calls)  # type: ignore[return-value]

    def backward_many(self, calls: Sequence[BackwardCall]) -> list[object]:  # type: ignore[override]
        self.backwards |= {call.call_id: call for call in calls}
        return super().backward_many(calls)  # type: ignore[return-value]

    def begin_commit(self, call: CommitCall) -> tuple[CommitAnswer, Closed | None]:
        self.commits.append(call)
        return super().begin_commit(call)


async def train(swarm: ExpertSwarm, seed: int) -> None:
    """Steps of random rows, at a random pace."""
    values, pace = torch.Generator().manual_seed(seed), random.Random(seed)
    for step in range(STEPS):
        for layer in LAYERS:
            x_TD = torch.randn(TOKENS, RUN.model.d_model, generator=values)
            ids_TK = torch.stack(
                [torch.randperm(RUN.model.n_experts, generator=values)[:CHOICES] for _ in range(TOKENS)]
            )
            gates_TK = torch.rand(TOKENS, CHOICES, generator=values)
            result = await swarm.forward(layer, x_TD, ids_TK, gates_TK, step=step, train=True)
            await asyncio.sleep(pace.choice([0, 0, 0.002]))
            grad_TD = torch.randn(TOKENS, RUN.model.d_model, generator=values)
            await swarm.backward(result.answered, grad_TD, ids_TK.numel())
        await swarm.commit(step, TOKENS)
        await asyncio.sleep(pace.choice([0, 0, 0, 0.01]))


async def test_the_experts_of_two_trainers_are_those_of_one_process_to_the_bit() -> None:
    host = Recording()
    transports: list[GrpcTransport] = []
    swarms: list[ExpertSwarm] = []
    async with ExpertServer.serving(host, run=RUN, peer_id="p", listen="127.0.0.1:0") as server:
        view = View([PeerInfo(peer_id="p", address=server.address, experts=RUN.model.expert_ids)])
        for name in ("a", "b"):
            transports.append(GrpcTransport(run=RUN.name, shape=RUN.model.expert_shape))
            swarms.append(ExpertSwarm(trainer=name, transport=transports[-1], view=lambda: view))
        await asyncio.gather(*(train(swarm, seed) for seed, swarm in enumerate(swarms)))
        for swarm, transport in zip(swarms, transports, strict=True):
            assert swarm.stats.lost_gradient_pairs == swarm.stats.dropped_pairs == 0
            await swarm.close()
            await transport.close()
        order = [call.trainer for call in host.commits]
        assert len(order) == 2 * STEPS
        assert len(set(zip(order[::2], order[1::2], strict=True))) > 1, "batches of one trainer's commits alone, too"
    one = ExpertHost(make_banks(RUN, RUN.model.expert_ids))
    for commit in host.commits:
        for call_id in commit.calls:
            one.backward_many([replace(host.backwards[call_id], rows=host.rows[call_id])])
        assert one.commit(commit).missing == ()
    assert host.versions == one.versions
    for layer in LAYERS:
        state, expected = host.fetch(layer, ()), one.fetch(layer, ())
        assert all(torch.equal(state[name], value) for name, value in expected.items() if "lineage" not in name)
