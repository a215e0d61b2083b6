# pyright: basic
"""One training run of the failure benchmark: a small model on text, four servers in this process, faults on demand.

The servers are called without a network; everything above them is what a trainer runs: plans, breaker, fail-over,
commits in order. Time is the run's own: a second per step.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeVar

import numpy as np
import torch

from moe_net.client import make_banks
from moe_net.config import RunConfig
from moe_net.data.batches import Batches, eval_batches
from moe_net.data.corpus import join, load_corpus
from moe_net.errors import NoLiveExpertsError
from moe_net.experts.host import ExpertHost
from moe_net.experts.replicate import average
from moe_net.model import remote_moe
from moe_net.model.config import ModelConfig, RouterConfig
from moe_net.model.remote_moe import SwarmLink
from moe_net.model.router import combine_denominator
from moe_net.optim import OptimizerConfig
from moe_net.placement.health import HealthConfig
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.local import LocalTransport
from moe_net.rpc.policy import CallPolicy
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.types import PeerInfo
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitAnswer, CommitCall, ForwardAnswer, ForwardCall
from moe_peer.trainer import Trainer, build_model

AnswerT = TypeVar("AnswerT")
SERVERS, SEQUENCES, SEQ_LEN = 4, 16, 64
MEET_EVERY = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What goes wrong, and what is done about it."""

    faults: Literal["none", "calls", "servers"] = "none"
    """`calls`: each (server, call) fails by itself; `servers`: servers are dead for a while, then back."""
    fraction: float = 0.0
    """Of the calls that fail, or of the time that a server is dead."""
    combine: Literal["renormalise", "zero-fill"] = "renormalise"
    """Divide by the gates of the experts that answered, or of all that were asked."""
    retries: bool = False
    """Ask again; otherwise a failure is final, and nobody is spared for it."""
    replicas: int = 1
    """Servers that host each expert; they average every `MEET_EVERY` steps."""
    seed: int = 0
    steps: int = 600


class Faulty(LocalTransport):
    """Calls fail before they are done (`dead`), never after: what is lost, is lost whole."""

    def __init__(self, hosts: dict[str, ExpertHost], fails: Callable[[str], bool]) -> None:
        super().__init__(hosts)
        self.fails = fails

    def _gate(self, peer: PeerInfo) -> None:
        if self.fails(peer.peer_id):
            raise CallError(CallFailure.UNREACHABLE, peer.peer_id, "injected")

    async def forward(self, peer: PeerInfo, call: ForwardCall, *, timeout_s: float) -> ForwardAnswer:
        if call.train:
            self._gate(peer)
        return await super().forward(peer, call, timeout_s=timeout_s)

    async def backward(self, peer: PeerInfo, call: BackwardCall, *, timeout_s: float) -> BackwardAnswer:
        self._gate(peer)
        return await super().backward(peer, call, timeout_s=timeout_s)

    async def ping(self, peer: PeerInfo, *, timeout_s: float) -> None:
        self._gate(peer)
        await super().ping(peer, timeout_s=timeout_s)


class FaultyServers(Faulty):
    """A dead server takes no commit either; it hears of it when it is back."""

    async def commit(self, peer: PeerInfo, call: CommitCall, *, timeout_s: float) -> CommitAnswer:
        self._gate(peer)
        return await super().commit(peer, call, timeout_s=timeout_s)


class StepTime:
    """A clock that a step moves on by a second; who sleeps on it wakes up then."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._moved = asyncio.Event()

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, wait_s: float) -> None:
        if wait_s < 0.01:  # a pause within the step
            await asyncio.sleep(0)
            return
        until_s = self.now_s + wait_s
        while self.now_s < until_s:
            await self._moved.wait()

    async def advance(self) -> None:
        self.now_s += 1.0
        self._moved.set()
        self._moved = asyncio.Event()
        for _ in range(20):  # who was woken asks, and is answered, before the next step
            await asyncio.sleep(0)


class Churn:
    """Each server is up and down in turn, for times drawn from exponential distributions."""

    MEAN_DOWN_STEPS = 50.0

    def __init__(self, names: list[str], fraction: float, seed: int) -> None:
        self._draw = random.Random(seed)
        self._mean_up_steps = self.MEAN_DOWN_STEPS * (1 - fraction) / fraction
        self.dead = {name: self._draw.random() < fraction for name in names}
        self._left = {name: self._draw.expovariate(1 / self._mean(name)) for name in names}

    def _mean(self, name: str) -> float:
        return self.MEAN_DOWN_STEPS if self.dead[name] else self._mean_up_steps

    def step(self) -> None:
        for name in self.dead:
            self._left[name] -= 1
            while self._left[name] < 0:
                self.dead[name] = not self.dead[name]
                self._left[name] += self._draw.expovariate(1 / self._mean(name))


class Gossip:
    """The servers' meetings, as `moe_peer.gossip` arranges them: two that share experts take the mean of both."""

    def __init__(self, hosts: Mapping[str, ExpertHost]) -> None:
        self._hosts = hosts

    async def meet(self, alive: Callable[[str], bool]) -> None:
        for a, b in combinations([name for name in self._hosts if alive(name)], 2):
            shared = sorted(set(self._hosts[a].experts) & set(self._hosts[b].experts))
            for layer in sorted({expert.layer for expert in shared}):
                self._average(a, b, layer, [expert.index for expert in shared if expert.layer == layer])

    def _average(self, a: str, b: str, layer: int, indices: list[int]) -> None:
        state = {name: self._hosts[name].fetch(layer, indices, with_sums=False) for name in (a, b)}
        mean = average(state[a], state[b])
        for me in (a, b):
            self._hosts[me].replace_state(layer, mean)


def make_run(case: Case) -> RunConfig:
    return RunConfig(
        name="failures",
        seed=case.seed,
        model=ModelConfig(
            vocab_size=256, seq_len=SEQ_LEN, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16,
            n_experts=8, d_ff_expert=64, init_std=0.06, router=RouterConfig(experts_per_token=2, balance_loss=0.01),
        ),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20, total_steps=case.steps),
        global_batch_tokens=SEQUENCES * SEQ_LEN,
        wire="fp32",
    )  # fmt: skip


def train(case: Case) -> dict[str, float]:
    """Validation loss in nats per byte (nothing fails there), and the shares that were lost in training."""
    torch.set_num_threads(1)
    run = make_run(case)
    if case.combine == "zero-fill":
        remote_moe.combine_denominator = lambda gates_TK, answered_TK, mode: combine_denominator(
            gates_TK, torch.ones_like(answered_TK), mode
        )
    else:
        remote_moe.combine_denominator = combine_denominator
    names = [f"server-{i}" for i in range(SERVERS)]
    dealt = {
        name: tuple(expert for expert in run.model.expert_ids if (i - expert.index) % SERVERS < case.replicas)
        for i, name in enumerate(names)
    }
    view = View(PeerInfo(peer_id=name, address="", experts=experts) for name, experts in dealt.items())
    hosts = {
        name: ExpertHost(make_banks(run, experts, origin=1 + i)) for i, (name, experts) in enumerate(dealt.items())
    }
    draw = random.Random(1000 + case.seed)
    churn = Churn(names, case.fraction, 1000 + case.seed) if case.faults == "servers" else None
    fails: Callable[[str], bool] = lambda name: False  # noqa: E731
    if churn is not None:
        fails = lambda name: churn.dead[name]  # noqa: E731
    elif case.faults == "calls":
        fails = lambda name: draw.random() < case.fraction  # noqa: E731
    kind = Faulty if churn is None else FaultyServers
    transport = kind(hosts, fails)
    policy, health = CallPolicy(retry_pause_s=1e-6), HealthConfig()
    if case.faults == "calls" and not case.retries:
        policy, health = CallPolicy(attempts=1), HealthConfig(failures_to_suspend=10**9)
    with Portal() as portal:

        async def connect() -> tuple[ExpertSwarm, StepTime]:
            clock = StepTime()
            return (
                ExpertSwarm(
                    trainer="t", transport=transport, view=lambda: view, policy=policy, health=health, clock_s=clock,
                    sleep=clock.sleep,
                ),
                clock,
            )  # fmt: skip

        swarm, clock = portal.run(connect())
        link = SwarmLink(swarm=swarm, runner=portal)
        corpus = load_corpus(None, max_bytes=2**22)
        text = np.frombuffer(join(corpus.train), dtype=np.uint8)
        batches = Batches(text, seq_len=SEQ_LEN, sequences_per_micro=SEQUENCES, seed=run.seed)
        trainer = Trainer(run=run, model=build_model(run, link), link=link, batches=batches)
        waited, gossip = 0, Gossip(hosts)
        while trainer.step < case.steps:
            try:
                trainer.train_step()
            except NoLiveExpertsError:  # all four are dead: as `moe-peer train`, wait
                waited += 1
            if churn is not None:
                churn.step()
            portal.run(clock.advance())
            if case.replicas > 1 and trainer.step % MEET_EVERY == 0:
                portal.run(gossip.meet(lambda name: churn is None or not churn.dead[name]))
        lost = swarm.stats.dropped_pairs / max(1, swarm.stats.routed_pairs)
        lost_backward = swarm.stats.lost_gradient_pairs / max(1, swarm.stats.routed_pairs)
        transport.fails = lambda name: False
        for _ in range(64):  # everybody is back for the evaluation
            portal.run(clock.advance())
        held_out = np.frombuffer(join(corpus.held_out), dtype=np.uint8)
        nats, tokens = trainer.evaluate(list(eval_batches(held_out, 16, seq_len=SEQ_LEN, sequences=SEQUENCES)))
        assert len(swarm.view().peers) == SERVERS
        portal.run(swarm.close())
    return {"loss": nats / tokens, "dropped": lost, "lost_backward": lost_backward, "waited": waited}
