"""Micro-batches in flight compute what they compute one after the other."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from swarms import SEQUENCES, make_trainer, small_run
from torch import Tensor

from moe_net.client import host_here, make_banks
from moe_net.config import RunConfig
from moe_net.errors import DivergedError, NoLiveExpertsError
from moe_net.experts.host import ExpertHost
from moe_net.model.remote_moe import SwarmLink
from moe_net.model.transformer import Transformer
from moe_net.placement.view import View
from moe_net.rpc.base import ExpertTransport
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.rpc.local import LocalTransport
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.types import ExpertId, PeerInfo
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitAnswer, CommitCall, ForwardAnswer, ForwardCall
from moe_peer.cut import Cut
from moe_peer.server import ExpertServer
from moe_peer.trainer import Trainer, build_model

M = SEQUENCES


@contextmanager
def two_servers(run: RunConfig, *, max_batch_rows: int) -> Iterator[tuple[SwarmLink, list[ExpertHost]]]:
    """Real servers; with `max_batch_rows=1` no two calls are merged, so that a call's result is its own, to the bit."""
    hosts, servers, peers = list[ExpertHost](), list[ExpertServer](), list[PeerInfo]()
    with Portal() as portal:
        for p in range(2):
            mine = [e for e in run.model.expert_ids if e.index % 2 == p]
            hosts.append(ExpertHost(make_banks(run, mine)))

        async def start() -> None:
            for p, host in enumerate(hosts):
                server = ExpertServer(host, run=run, peer_id=f"peer-{p}", max_batch_rows=max_batch_rows)
                await server.start("127.0.0.1:0")
                servers.append(server)
                peers.append(PeerInfo(peer_id=f"peer-{p}", address=server.address, experts=host.experts))

        portal.run(start())
        transport = GrpcTransport(run=run.name, shape=run.model.expert_shape)
        view = View(peers)
        try:
            yield SwarmLink(swarm=swarm(transport, view), runner=portal), hosts
        finally:
            portal.run(transport.close())
            for server in servers:
                portal.run(server.stop(grace_s=1.0))


def swarm(transport: ExpertTransport, view: View) -> ExpertSwarm:
    return ExpertSwarm(trainer="test", transport=transport, view=lambda: view)


def states(hosts: Sequence[ExpertHost]) -> dict[str, Tensor]:
    return {name: t for host in hosts for layer in host.versions for name, t in host.fetch(layer, ()).items()}


def one_step(run: RunConfig, *, in_flight: int, max_batch_rows: int) -> tuple[list[Tensor], dict[str, Tensor], float]:
    with (
        two_servers(run, max_batch_rows=max_batch_rows) as (link, hosts),
        make_trainer(run, link, n_micro=M, in_flight=in_flight) as trainer,
    ):
        loss = trainer.train_step().loss
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    # Of servers that are stopped: these have made the step to which the commit led.
    return gradients, states(hosts), loss


def test_the_trunks_gradient_is_that_of_the_sequential_order_to_the_bit() -> None:
    run = small_run(jitter=0.05, capacity_factor=1.0)
    expected, expert_expected, loss_expected = one_step(run, in_flight=1, max_batch_rows=1)
    gradients, experts, loss = one_step(run, in_flight=M, max_batch_rows=1)
    assert loss == loss_expected
    assert len(gradients) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    # After their step.
    assert experts.keys() == expert_expected.keys()
    for name, value in experts.items():
        torch.testing.assert_close(
            value, expert_expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_calls_that_a_server_merges_change_nothing_but_rounding() -> None:
    run = small_run()
    expected, _, _ = one_step(run, in_flight=1, max_batch_rows=2048)
    gradients, _, _ = one_step(run, in_flight=M, max_batch_rows=2048)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)


class Gathering:
    """A transport whose calls of a layer and direction wait until those of `n` micro-batches are there."""

    def __init__(self, inner: ExpertTransport, n: int) -> None:
        self._inner, self._n = inner, n
        self._waiting: dict[tuple[str, int], list[asyncio.Event]] = {}

    async def _gather(self, kind: str, layer: int) -> None:
        together = self._waiting.setdefault((kind, layer), [])
        mine = asyncio.Event()
        together.append(mine)
        if len(together) == self._n:
            del self._waiting[kind, layer]
            for event in together:
                event.set()
        async with asyncio.timeout(20):
            await mine.wait()

    async def forward(self, peer: PeerInfo, call: ForwardCall, *, timeout_s: float) -> ForwardAnswer:
        await self._gather("forward", call.layer)
        return await self._inner.forward(peer, call, timeout_s=timeout_s)

    async def backward(self, peer: PeerInfo, call: BackwardCall, *, timeout_s: float) -> BackwardAnswer:
        await self._gather("backward", call.layer)
        return await self._inner.backward(peer, call, timeout_s=timeout_s)

    async def commit(self, peer: PeerInfo, call: CommitCall, *, timeout_s: float) -> CommitAnswer:
        return await self._inner.commit(peer, call, timeout_s=timeout_s)

    async def fetch(
        self, peer: PeerInfo, layer: int, expert_index: Sequence[int], *, timeout_s: float
    ) -> dict[str, Tensor]:
        return await self._inner.fetch(peer, layer, expert_index, timeout_s=timeout_s)

    async def close(self) -> None:
        return None


def test_calls_of_all_micro_batches_are_under_way_at_once() -> None:
    """Every layer's calls, forward and backward, wait for those of all four: one after the other, none would end."""
    run = small_run()
    experts = tuple(ExpertId(e.layer, e.index) for e in run.model.expert_ids)
    host = ExpertHost(make_banks(run, experts))
    view = View([PeerInfo(peer_id="here", address="", experts=experts)])
    with Portal() as portal:
        link = SwarmLink(swarm=swarm(Gathering(LocalTransport({"here": host}), M), view), runner=portal)
        with make_trainer(run, link, n_micro=M, in_flight=M) as trainer:
            result = trainer.train_step()
    assert result.tokens == run.global_batch_tokens
    assert result.in_flight == M


class Watched(Transformer):
    """Counts its outputs that are still alive, each of which holds its graph, and counts its calls."""

    def watch(self, *, lost: int | None = None, infinite: int | None = None) -> None:
        self.outputs: list[weakref.ref[Tensor]] = []
        self.most_alive = 0
        self._lost, self._infinite = lost, infinite

    def forward(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        self.outputs.append(weakref.ref(torch.empty(0)))
        number = len(self.outputs) - 1
        if number == self._lost:
            raise NoLiveExpertsError("no live expert")
        output = super().forward(*args, **kwargs)  # type: ignore[arg-type]
        # Of the graph's last node: it goes when the graph goes.
        self.outputs[number] = weakref.ref(output.logits_BSV)
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.outputs))
        if number == self._infinite:
            return output._replace(logits_BSV=output.logits_BSV * torch.inf)
        return output


def watched(trainer: Trainer, *, lost: int | None = None, infinite: int | None = None) -> Watched:
    model = trainer.model
    model.__class__ = Watched
    assert isinstance(model, Watched)
    model.watch(lost=lost, infinite=infinite)
    return model


def test_no_more_graphs_are_alive_than_may_be_in_flight() -> None:
    run = small_run()
    gc.disable()  # what needs a collector to be freed is not bounded
    try:
        with host_here(run, n_peers=2) as link, make_trainer(run, link, n_micro=4, in_flight=2) as trainer:
            model = watched(trainer)
            for _ in range(5):
                trainer.train_step()
            assert len(model.outputs) == 20
            assert 1 <= model.most_alive <= 2
            assert all(ref() is None for ref in model.outputs)
    finally:
        gc.enable()


def test_experts_lost_in_the_second_of_four_leave_a_step_that_can_be_made_or_made_again() -> None:
    """Whether another has sent gradients by then is a race; the step is whole in both cases."""
    run = small_run()
    for _ in range(10):
        with host_here(run, n_peers=2) as link, make_trainer(run, link, n_micro=4, in_flight=4) as trainer:
            watched(trainer, lost=1)
            try:
                result = trainer.train_step()
            except NoLiveExpertsError:
                assert trainer.step == 0
                assert all(p.grad is None for p in trainer.model.parameters())
                assert trainer.train_step().tokens == run.global_batch_tokens
            else:
                assert result.tokens in (16, 32, 48)
                assert trainer.step == 1
                assert trainer.train_step().tokens == run.global_batch_tokens


def test_a_gradient_that_is_not_finite_ends_the_step_and_leaves_no_thread_busy() -> None:
    """One of four diverges; waits of the others, in the middle of their backward too, are cancelled."""
    run = small_run()
    for _ in range(5):
        with (
            two_servers(run, max_batch_rows=1) as (link, _),
            make_trainer(run, link, n_micro=4, in_flight=4) as trainer,
        ):
            watched(trainer, infinite=1)
            with pytest.raises(DivergedError):
                trainer.train_step()
            assert trainer.step == 0
            assert trainer.train_step().tokens == run.global_batch_tokens


@pytest.mark.parametrize("in_flight", [1, 3])
def test_evaluation_does_not_depend_on_what_is_in_flight(in_flight: int) -> None:
    run = small_run()
    with host_here(run, n_peers=2) as link, make_trainer(run, link, n_micro=4, in_flight=in_flight) as trainer:
        windows = [torch.arange(17).repeat(3, 1).add(i).numpy() for i in range(6)]
        with torch.no_grad():
            expected = 0.0
            trainer.model.eval()
            for rows in windows:
                logits, _ = trainer.model(torch.from_numpy(rows[:, :-1]))
                targets = torch.from_numpy(rows[:, 1:])
                expected += float(
                    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
                )
        assert trainer.evaluate(windows) == (expected, 6 * 48)


def test_a_cut_that_is_chosen_on_the_way_keeps_the_place_in_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole step, then four micro-batches in flight: the same samples, so the same losses."""
    run = small_run(balance_loss=0.0)
    with host_here(run, n_peers=2) as link:
        trainer = make_trainer(run, link)
        expected = [trainer.train_step().loss for _ in range(8)]
    monkeypatch.setattr("moe_peer.cut.LOCAL_WAIT_S", 0.0)
    monkeypatch.setattr("moe_peer.cut.predicted_s", lambda cut, seen: 1 / cut.in_flight)
    cuts = [Cut(micro_batches=m, in_flight=m) for m in (1, 2, 4)]
    with host_here(run, n_peers=2) as link:
        first = make_trainer(run, link)
        with Trainer(run=run, model=build_model(run, link), link=link, batches=first.batches, choices=cuts) as trainer:
            results = [trainer.train_step() for _ in range(8)]
    assert [r.in_flight for r in results] == [1, 1, 1, 1, 4, 4, 4, 4]
    assert [r.loss for r in results] == pytest.approx(expected, rel=1e-5)


def test_a_swarm_on_this_machine_keeps_one_micro_batch() -> None:
    run = small_run()
    cuts = [Cut(micro_batches=m, in_flight=m) for m in (1, 2, 4)]
    with two_servers(run, max_batch_rows=2048) as (link, _):
        first = make_trainer(run, link)
        with Trainer(run=run, model=build_model(run, link), link=link, batches=first.batches, choices=cuts) as trainer:
            results = [trainer.train_step() for _ in range(8)]
    assert {r.in_flight for r in results} == {1}
    assert all(r.wait_s > 0 for r in results)
