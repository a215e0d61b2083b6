"""rpc/swarm against peers that answer what no honest one would: no answer of theirs ends or holds up a training."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from faulty_swarms import EXPERTS, IDS_TK, RUN, X_TD, Clock, Faulty, forward, swarm_of
from swarms import make_trainer, small_run

from moe_net.client import make_banks
from moe_net.experts.host import ExpertHost
from moe_net.model.remote_moe import SwarmLink
from moe_net.placement.latency import LatencyConfig
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure, Failed
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.rpc.local import LocalTransport
from moe_net.rpc.outlook import CallKind, Outlook
from moe_net.rpc.policy import CallPolicy
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm, LayerResult
from moe_net.types import PeerInfo
from moe_net.wire.messages import BackwardAnswer, BackwardCall, ForwardAnswer, ForwardCall

Answer = TypeVar("Answer", ForwardAnswer, BackwardAnswer)


class Liar(LocalTransport):
    """Answers of `peer-1` hold `value` in the field of that name while `lies`."""

    def __init__(self, hosts: dict[str, ExpertHost], field: str, value: float) -> None:
        super().__init__(hosts)
        self.field, self.value, self.lies = field, value, False

    def _lie(self, peer: PeerInfo, answer: Answer) -> Answer:
        if not self.lies or peer.peer_id != "peer-1" or not hasattr(answer, self.field):
            return answer
        return replace(answer, **{self.field: torch.full_like(getattr(answer, self.field), self.value)})

    async def forward(self, peer: PeerInfo, call: ForwardCall, *, timeout_s: float) -> ForwardAnswer:
        return self._lie(peer, await super().forward(peer, call, timeout_s=timeout_s))

    async def backward(self, peer: PeerInfo, call: BackwardCall, *, timeout_s: float) -> BackwardAnswer:
        return self._lie(peer, await super().backward(peer, call, timeout_s=timeout_s))


@pytest.mark.parametrize("value", [3e38, -2e18, -1e11, 9e8])
@pytest.mark.parametrize("field", ["y_RD", "dx_RD", "gate_grad_P"])
def test_no_finite_answer_ends_a_training(field: str, value: float) -> None:
    run = small_run()
    experts = run.model.expert_ids
    peers = [
        PeerInfo(peer_id=f"peer-{p}", address="", experts=tuple(e for e in experts if e.index % 2 == p))
        for p in range(2)
    ]
    transport = Liar({peer.peer_id: ExpertHost(make_banks(run, peer.experts)) for peer in peers}, field, value)
    with Portal() as portal:
        swarm = ExpertSwarm(trainer="t", transport=transport, view=lambda: View(peers), encoding=run.wire_encoding)
        trainer = make_trainer(run, SwarmLink(swarm=swarm, runner=portal))
        losses: list[float] = []
        for step in range(4):
            transport.lies = step == 1
            losses.append(trainer.train_step().loss)
        assert all(loss < 100 for loss in losses), losses
        assert all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())
        believed = value == 9e8
        assert (swarm.stats.dropped_pairs + swarm.stats.lost_gradient_pairs > 0) is not believed
        portal.run(swarm.close())


async def test_an_answer_in_which_no_expert_ran_is_held_against_its_peer() -> None:
    swarm, transport, _, _ = swarm_of(replicas=2)
    honest = transport.forward
    favourite = ""

    async def lying(peer: PeerInfo, call: ForwardCall, *, timeout_s: float) -> ForwardAnswer:
        nonlocal favourite
        answer = await honest(peer, call, timeout_s=timeout_s)
        favourite = favourite or peer.peer_id
        asked = tuple(sorted(set(call.rows.expert_index_P.tolist())))
        return answer if peer.peer_id != favourite else replace(answer, failed_experts=asked)

    transport.forward = lying  # type: ignore[method-assign]
    for step in range(4):
        result = await forward(swarm, step)
        assert bool(result.answered_TK.all()), "the replica has run them"
    assert ("peer_suspended", "masked") in transport.happened()
    assert ("forward_failed", "elsewhere") in transport.happened()
    await swarm.close()


async def test_a_peer_that_is_busy_with_every_commit_holds_up_one_step_for_a_moment() -> None:
    swarm, transport, _, clock = swarm_of(replicas=1, min_timeout_s=2.0)
    transport.busy_s = 1e4
    for step in range(3):
        await swarm.commit(step, 1)
    transport.fault = lambda method, peer: CallFailure.BUSY if (method, peer) == ("commit", "p0") else None
    began_s = clock.now_s
    await swarm.commit(3, 1)
    assert clock.now_s - began_s <= 2.0
    assert "p0" not in swarm.view().peers, "it owes a commit, and is asked in the background"
    assert ("peer_suspended", "masked") in transport.happened()
    await swarm.close()


async def test_a_step_does_not_wait_for_a_stranger_who_stalls_while_others_have_its_experts() -> None:
    peers = [PeerInfo(peer_id=f"p{i}", address="", experts=EXPERTS) for i in range(2)]
    directory = [View(peers[:1])]
    transport = Faulty({p.peer_id: ExpertHost(make_banks(RUN, EXPERTS)) for p in peers})
    swarm = ExpertSwarm(
        trainer="t", transport=transport, view=lambda: directory[0], latency=LatencyConfig(min_samples=2), spread=True
    )
    for step in range(3):
        await backward(swarm, await forward(swarm, step))
        await swarm.commit(step, 64)
    directory[0] = View(peers)
    transport.stalled = {(name, "p1"): asyncio.Event() for name in ("forward", "commit")}
    async with asyncio.timeout(20):
        assert (await forward(swarm, 3)).answered_TK.all()
        await swarm.commit(3, 64)
    assert "p1" in transport.asked("forward")
    assert "p1" in transport.asked("commit")
    await swarm.close()


async def known_alone(monkeypatch: pytest.MonkeyPatch) -> tuple[ExpertSwarm, Faulty, Clock]:
    """A swarm of one peer that has answered often enough for its deadline to be `min_timeout_s`, 2 s. Pauses pass by
    its clock."""
    swarm, transport, _, clock = swarm_of(replicas=1, min_timeout_s=2.0)
    for _ in range(3):
        await backward(swarm, await forward(swarm))
    turn = asyncio.sleep

    async def sleep(wait_s: float) -> None:
        clock.now_s += wait_s
        await turn(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return swarm, transport, clock


async def backward(swarm: ExpertSwarm, result: LayerResult) -> torch.Tensor:
    return (await swarm.backward(result.answered, torch.ones_like(X_TD), IDS_TK.numel()))[0]


@pytest.mark.parametrize("says_s", [0.0, 1.5, 1e4])
@pytest.mark.parametrize("method", ["forward", "backward"])
async def test_the_only_replica_that_is_always_busy_holds_up_a_step_for_one_deadline_and_is_masked(
    method: str, says_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm, transport, clock = await known_alone(monkeypatch)
    transport.busy_s, began_s = says_s, clock.now_s
    transport.fault = lambda name, peer: CallFailure.BUSY if name == method else None
    result = await forward(swarm)
    if method == "backward":
        assert not (await backward(swarm, result)).any()
    assert clock.now_s - began_s <= 2.0
    assert ("peer_suspended", "masked") in transport.happened()
    await swarm.close()


async def test_a_peer_that_takes_a_deadline_to_break_a_connection_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swarm, transport, clock = await known_alone(monkeypatch)

    def slowly(name: str, peer: str) -> CallFailure | None:
        clock.now_s += 2.0 * (name == "forward")
        return CallFailure.UNREACHABLE if name == "forward" else None

    began_s, transport.fault = clock.now_s, slowly
    assert not (await forward(swarm)).answered_TK.any()
    assert clock.now_s - began_s <= 2.0
    assert ("peer_suspended", "masked") in transport.happened()
    await swarm.close()


async def test_a_peer_that_asks_for_inputs_which_it_was_sent_is_blamed_and_asked_once_more() -> None:
    swarm, transport, _, _ = swarm_of(replicas=2)
    result = await forward(swarm)
    liar = result.answered[0].peer.peer_id
    transport.fault = lambda name, peer: CallFailure.INPUTS_GONE if (name, peer) == ("backward", liar) else None
    assert (await backward(swarm, result)).any(), "the replica has made it"
    assert transport.asked("backward").count(liar) == 2
    assert ("backward_failed", "elsewhere") in transport.happened()
    await swarm.close()


async def test_a_queue_that_is_longer_than_a_deadline_but_empties_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swarm, transport, clock = await known_alone(monkeypatch)
    empty_at_s = clock.now_s + 3.0

    def queued(name: str, peer: str) -> CallFailure | None:
        transport.busy_s = empty_at_s - clock.now_s
        return CallFailure.BUSY if name == "forward" and transport.busy_s > 2.0 else None

    transport.fault = queued
    assert (await forward(swarm)).answered_TK.all()
    assert ("peer_suspended", "masked") not in transport.happened()
    await swarm.close()


@pytest.mark.parametrize("others_answered", [True, False])
def test_a_late_peer_is_watched_for_what_it_cost_unless_it_may_have_been_our_connection(others_answered: bool) -> None:
    clock = Clock()
    outlook = Outlook(policy=CallPolicy(), clock_s=clock)
    peer = PeerInfo(peer_id="p0", address="", experts=EXPERTS)
    late = Failed(error=CallError(CallFailure.LATE, "p0", "no answer"), waited_s=2.0)
    for other, moment_s in {"p1": 0.1, "p2": 2.0}.items():
        clock.now_s += moment_s
        if others_answered or other == "p1":
            outlook.answered(other, CallKind.FORWARD, 4, 0.05)
    outlook.blame(peer, CallKind.FORWARD, 4, late)
    outlook.back("p0", away_s=0.0)
    clock.now_s += 6.0
    outlook.answered("p0", CallKind.FORWARD, 4, 0.1)
    outlook.blame(peer, CallKind.FORWARD, 4, late)
    due_s = outlook.probe_due_s("p0")
    assert due_s is not None
    assert (due_s - clock.now_s >= 0.5) is others_answered, "it is fine after 0.5 s otherwise"


def test_the_view_without_suspended_peers_is_made_once() -> None:
    outlook = Outlook(policy=CallPolicy())
    view = View([PeerInfo(peer_id=f"p{i}", address="", experts=EXPERTS) for i in range(3)])
    assert outlook.filtered(view) is view
    without = outlook.filtered(view, {"p1"})
    assert without.peers.keys() == {"p0", "p2"}
    assert outlook.filtered(view, {"p1"}) is without
    assert outlook.filtered(view, {"p2"}).peers.keys() == {"p0", "p1"}
    other = View([*view.peers.values(), PeerInfo(peer_id="p9", address="", experts=EXPERTS)])
    assert outlook.filtered(other, {"p2"}).peers.keys() == {"p0", "p1", "p9"}


async def test_connections_to_addresses_of_before_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_net.rpc.grpc_client.IDLE_S", 0.0)
    transport = GrpcTransport(run=RUN.name, shape=RUN.model.expert_shape)
    connections = transport._connections
    with transport._methods("127.0.0.1:1"):
        for port in range(2, 40):
            with transport._methods(f"127.0.0.1:{port}"):
                assert connections.keys() == {"127.0.0.1:1", f"127.0.0.1:{port}"}, "the one with a call stays"
    await transport.close()
