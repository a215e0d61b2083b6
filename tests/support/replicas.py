"""Replicas that share their gradients, without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from swarms import small_run
from torch import Tensor

from moe_net.client import make_banks
from moe_net.errors import InputsGoneError
from moe_net.experts.host import ExpertHost
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure
from moe_net.types import PeerInfo
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitAnswer, CommitCall, RoutedRows
from moe_net.wire.share import Share, ShareCall, share_from_state
from moe_peer.sharing import Sharing

RUN = small_run()
D, SHAPE = RUN.model.d_model, RUN.model.expert_shape
ALL = RUN.model.expert_ids


@dataclass
class Peer:
    host: ExpertHost
    sharing: Sharing
    asked: int = 0


@dataclass
class Swarm:
    """Peers that ask each other without a network; `broken` says what a call to one of them meets."""

    peers: dict[str, Peer] = field(default_factory=dict[str, Peer])
    broken: dict[str, Callable[[], Any]] = field(default_factory=dict[str, Callable[[], Any]])
    step: int = 0

    def add(self, name: str, *, shares: bool = True) -> ExpertHost:
        host = ExpertHost(make_banks(RUN, ALL, origin=1 + len(self.peers)))

        async def run(fn: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            await asyncio.sleep(0)
            return fn(*arguments, **options)

        self.peers[name] = Peer(host, Sharing(host, run, peer_id=name))
        if shares:
            self.peers[name].sharing.begin(self.ask, self.view)
        return host

    def view(self) -> View:
        return View(PeerInfo(peer_id=name, address="", experts=peer.host.experts) for name, peer in self.peers.items())

    async def ask(self, peer: PeerInfo, call: ShareCall, *, timeout_s: float) -> Share:
        there = self.peers[peer.peer_id]
        there.asked += 1
        if peer.peer_id in self.broken:
            await self.broken[peer.peer_id]()
        try:
            share = await there.sharing.answer(call, limit_s=timeout_s)
        except InputsGoneError as error:
            raise CallError(CallFailure.INPUTS_GONE, peer.peer_id, str(error)) from error
        state = share.to_state()
        return share_from_state(state, asked=call.experts, shape=SHAPE)

    async def commit(
        self, *names: str, calls: Mapping[str, tuple[bytes, ...]] | None = None, tokens: int = RUN.global_batch_tokens
    ) -> list[CommitAnswer]:
        """`calls`: those that count, at each of the peers; by default all that are staged there."""
        said = {n: commit_of(self.peers[n].host, step=self.step, tokens=tokens) for n in names}
        for name, named in (calls or {}).items():
            said[name] = replace(said[name], calls=named)
        self.step += 1
        return await asyncio.gather(*(self.peers[n].sharing.commit(call) for n, call in said.items()))


def commit_of(host: ExpertHost, *, step: int, trainer: str = "t", tokens: int = RUN.global_batch_tokens) -> CommitCall:
    """A commit that names all that the trainer has staged there."""
    staged = tuple(i for i, call in host._staging._calls.items() if call.facts.trainer == trainer)
    return CommitCall(trainer=trainer, step=step, tokens=tokens, calls=staged)


def backward(host: ExpertHost, step: int, seed: int, rows: int = 12, trainer: str = "t") -> bytes:
    """Stage the gradient of some rows of layer 0; its call id."""
    draw = torch.Generator().manual_seed(seed)
    call = BackwardCall(
        call_id=(seed + 1).to_bytes(16, "big"), trainer=trainer, step=step, layer=0,
        grad_RD=torch.randn(rows, D, generator=draw),
        rows=RoutedRows(
            x_RD=torch.randn(rows, D, generator=draw),
            experts_per_row_R=torch.ones(rows, dtype=torch.int32),
            expert_index_P=torch.randint(0, RUN.model.n_experts - 1, (rows,), generator=draw, dtype=torch.int32),
            gate_P=torch.ones(rows),
        ),
    )  # fmt: skip
    assert isinstance(host.backward_many([call])[0], BackwardAnswer)
    return call.call_id


def everything(host: ExpertHost) -> dict[str, Tensor]:
    return {n: v for layer in host.versions for n, v in host.fetch(layer, (), with_sums=False).items()}


def assert_equal(a: ExpertHost, b: ExpertHost) -> None:
    """To the bit, lineages included."""
    mine, other = everything(a), everything(b)
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert torch.equal(value, other[name]), name


def assert_close(a: ExpertHost, one: ExpertHost) -> None:
    mine, other = everything(a), everything(one)
    for name, value in other.items():
        if not name.endswith("lineage"):
            torch.testing.assert_close(mine[name], value, rtol=2e-5, atol=1e-6, msg=name)


async def times_asked(n_steps: int, failing: Callable[[], Any]) -> int:
    """How often a partner that meets each question with `failing` is asked in so many steps, all of which are made."""
    swarm = Swarm()
    living = swarm.add("a")
    swarm.add("failing")
    swarm.broken["failing"] = failing
    for step in range(n_steps):
        backward(living, step, step)
        assert (await swarm.commit("a"))[0].stepped
    return swarm.peers["failing"].asked
