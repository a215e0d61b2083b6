"""Combine with failures equals the exact formula over the survivors, gradients included."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from swarms import small_run

from moe_net.client import make_banks
from moe_net.config import RunConfig
from moe_net.experts.host import ExpertHost
from moe_net.model.remote_moe import RemoteMoE, SwarmLink
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.local import LocalTransport
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.trace import FaultEvent
from moe_net.types import PeerInfo
from moe_net.wire.messages import BackwardAnswer, BackwardCall, ForwardAnswer, ForwardCall

LAYER = 0


class Breaking(LocalTransport):
    """Peers in `dead` answer no forward; those in `forgetful` answer forward but no backward."""

    dead: Sequence[str] = ()
    forgetful: Sequence[str] = ()

    async def forward(self, peer: PeerInfo, call: ForwardCall, *, timeout_s: float) -> ForwardAnswer:
        if peer.peer_id in self.dead:
            raise CallError(CallFailure.UNREACHABLE, peer.peer_id, "dead")
        return await super().forward(peer, call, timeout_s=timeout_s)

    async def backward(self, peer: PeerInfo, call: BackwardCall, *, timeout_s: float) -> BackwardAnswer:
        if peer.peer_id in self.forgetful:
            raise CallError(CallFailure.UNREACHABLE, peer.peer_id, "forgetful")
        return await super().backward(peer, call, timeout_s=timeout_s)

    async def ping(self, peer: PeerInfo, *, timeout_s: float) -> None:
        if peer.peer_id in (*self.dead, *self.forgetful):
            raise CallError(CallFailure.UNREACHABLE, peer.peer_id, "dead or forgetful")
        await super().ping(peer, timeout_s=timeout_s)


def formula(
    moe: RemoteMoE, banks, x_TD: torch.Tensor, answered: set[int], combine: str, *, lost: Sequence[int] = ()
) -> torch.Tensor:
    """y_t = sum over surviving chosen experts of p_te E_e(x_t), over their gates' sum if normalized. Token by token.

    `lost` experts answered forward, but no gradient passes through what they computed.
    """
    state = banks[LAYER].state()
    probs_TE = F.linear(x_TD, moe.router.weight).softmax(-1)
    rows = []
    for t in range(x_TD.shape[0]):
        chosen = probs_TE[t].topk(moe.router.config.experts_per_token).indices.tolist()
        alive = [e for e in chosen if e in answered]
        y_D = torch.zeros_like(x_TD[t])
        for e in alive:
            gate, up = (x_TD[t] @ state[f"{LAYER}.{e}.w_in"]).chunk(2)
            part_D = probs_TE[t, e] * ((F.silu(gate) * up) @ state[f"{LAYER}.{e}.w_out"])
            y_D = y_D + (part_D.detach() if e in lost else part_D)
        if alive and combine == "normalized":
            y_D = y_D / sum(probs_TE[t, e] for e in alive)
        rows.append(y_D)
    # Nobody left: still a function of x and the router, with gradient zero.
    return torch.stack(rows) + 0 * (x_TD.sum() + moe.router.weight.sum())


def check(
    run: RunConfig, transport: LocalTransport, peers: list[PeerInfo], *, answered: set[int], lost: Sequence[int] = ()
) -> tuple[torch.Tensor, ExpertSwarm, list[FaultEvent]]:
    """Output and gradients of one layer equal the formula's. Returns the output, the swarm, and what it reported."""
    banks = make_banks(run, [e for e in run.model.expert_ids if e.layer == LAYER])
    view, events = View(peers), []
    x_BSD = torch.randn(2, 5, run.model.d_model, generator=torch.Generator().manual_seed(0))
    weigh_BSD = torch.randn(x_BSD.shape, generator=torch.Generator().manual_seed(1))
    with Portal() as portal:
        swarm = ExpertSwarm(trainer="t", transport=transport, view=lambda: view, on_event=events.append)
        moe = RemoteMoE(run.model, LAYER, SwarmLink(swarm=swarm, runner=portal))
        x_remote = x_BSD.clone().requires_grad_()
        y_BSD, _ = moe(x_remote)
        (y_BSD * weigh_BSD).sum().backward()
        router_grad = moe.router.weight.grad.clone()
        moe.router.weight.grad = None
    x_exact = x_BSD.clone().requires_grad_()
    exact_TD = formula(moe, banks, x_exact.flatten(0, 1), answered, run.model.router.combine, lost=lost)
    (exact_TD * weigh_BSD.flatten(0, 1)).sum().backward()
    torch.testing.assert_close(y_BSD.flatten(0, 1), exact_TD, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(x_remote.grad, x_exact.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(router_grad, moe.router.weight.grad, rtol=1e-4, atol=1e-7)
    return y_BSD, swarm, events


@pytest.mark.parametrize("combine", ["normalized", "raw"])
@pytest.mark.parametrize("dead", [[], ["p0"], ["p0", "p2"], ["p0", "p1", "p2"]])
def test_output_and_gradients_are_those_of_the_survivors(combine: str, dead: list[str]) -> None:
    run = small_run(combine=combine)
    experts = [e for e in run.model.expert_ids if e.layer == LAYER]
    peers = [
        PeerInfo(peer_id=f"p{p}", address="", experts=tuple(e for e in experts if e.index % 3 == p)) for p in range(3)
    ]
    transport = Breaking({p.peer_id: ExpertHost(make_banks(run, p.experts)) for p in peers})
    transport.dead = dead
    answered = {e.index for p in peers if p.peer_id not in dead for e in p.experts}
    y_BSD, swarm, _ = check(run, transport, peers, answered=answered)
    asked = 2 * 5 * run.model.router.experts_per_token
    assert swarm.stats.routed_pairs == asked
    assert (swarm.stats.dropped_pairs == 0) == (not dead)
    if len(dead) == 3:
        assert swarm.stats.dropped_pairs == asked
        assert not y_BSD.any(), "a token without an answer passes through the residual alone"


@pytest.mark.parametrize("combine", ["normalized", "raw"])
def test_an_expert_its_server_could_not_run_leaves_the_sum_and_its_denominator(combine: str) -> None:
    run = small_run(combine=combine)
    experts = [e for e in run.model.expert_ids if e.layer == LAYER]
    peers = [
        PeerInfo(peer_id=f"p{p}", address="", experts=tuple(e for e in experts if e.index % 2 == p)) for p in range(2)
    ]
    # p1's record still promises expert 3, which it does not host any more: it answers for the others and names it.
    hosts = {p.peer_id: ExpertHost(make_banks(run, [e for e in p.experts if e.index != 3])) for p in peers}
    _, swarm, _ = check(run, LocalTransport(hosts), peers, answered={0, 1, 2, 4, 5})
    assert swarm.stats.dropped_pairs > 0


def test_what_a_replica_answered_instead_counts_with_its_gradients() -> None:
    run = small_run()
    experts = tuple(e for e in run.model.expert_ids if e.layer == LAYER)
    peers = [PeerInfo(peer_id=f"p{p}", address="", experts=experts) for p in range(2)]
    for dead in ("p0", "p1"):
        transport = Breaking({p.peer_id: ExpertHost(make_banks(run, experts)) for p in peers})
        transport.dead = [dead]
        _, swarm, _ = check(run, transport, peers, answered=set(range(6)))
        assert swarm.stats.dropped_pairs == swarm.stats.lost_gradient_pairs == 0


@pytest.mark.parametrize("forgetful", ["p0", "p1", "p2"])
def test_a_lost_backward_is_counted_and_leaves_the_rest_exact(forgetful: str) -> None:
    run = small_run()
    experts = [e for e in run.model.expert_ids if e.layer == LAYER]
    peers = [
        PeerInfo(peer_id=f"p{p}", address="", experts=tuple(e for e in experts if e.index % 3 == p)) for p in range(3)
    ]
    transport = Breaking({p.peer_id: ExpertHost(make_banks(run, p.experts)) for p in peers})
    transport.forgetful = [forgetful]
    lost = [e.index for p in peers if p.peer_id == forgetful for e in p.experts]
    _, swarm, events = check(run, transport, peers, answered=set(range(6)), lost=lost)
    assert swarm.stats.lost_gradient_pairs > 0
    assert swarm.stats.dropped_pairs == 0
    assert {event.what for event in events} == {"backward_failed", "peer_suspended"}
    assert [event.action for event in events if event.what == "backward_failed"] == [
        "again",
        "again",
        "again",
        "give_up",
    ]
    assert swarm.stats.lost_gradient_pairs == sum(e.pairs for e in events if e.action == "give_up")
