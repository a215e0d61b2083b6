"""An ExpertSwarm over peers in this process, whose calls fail, stall and are logged as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch
from swarms import small_run

from moe_net.client import make_banks
from moe_net.experts.host import ExpertHost
from moe_net.placement.latency import LatencyConfig
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.local import LocalTransport
from moe_net.rpc.policy import CallPolicy
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.trace import FaultEvent
from moe_net.types import PeerInfo
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitAnswer, CommitCall, ForwardAnswer, ForwardCall

RUN = small_run()
EXPERTS = tuple(e for e in RUN.model.expert_ids if e.layer == 0)
IDS_TK = torch.tensor([[0, 3], [5, 1], [2, 4], [0, 1]])
GATES_TK = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
X_TD = torch.randn(4, RUN.model.d_model, generator=torch.Generator().manual_seed(1))

Fault = Callable[[str, str], CallFailure | None]


class Faulty(LocalTransport):
    """Asks `fault(method, peer)` before each call, `lost_answer` after it; keeps a log."""

    def __init__(self, hosts: dict[str, ExpertHost]) -> None:
        super().__init__(hosts)
        self.log: list[tuple[str, str, object]] = []
        self.fault: Fault = lambda method, peer: None
        self.lost_answer: Fault = lambda method, peer: None
        self.stalled: dict[tuple[str, str], asyncio.Event] = {}
        self.events: list[FaultEvent] = []
        self.busy_s = 0.0

    async def _stall(self, method: str, peer: PeerInfo) -> None:
        if (method, peer.peer_id) in self.stalled:
            await self.stalled[method, peer.peer_id].wait()

    def asked(self, method: str) -> list[str]:
        return [peer for name, peer, _ in self.log if name == method]

    def happened(self) -> list[tuple[str, str]]:
        return [(event.what, event.action) for event in self.events]

    def _check(self, fault: Fault, method: str, peer: PeerInfo) -> None:
        failure = fault(method, peer.peer_id)
        if failure is not None:
            raise CallError(failure, peer.peer_id, "injected", queue_s=self.busy_s)

    async def forward(self, peer: PeerInfo, call: ForwardCall, *, timeout_s: float) -> ForwardAnswer:
        self.log.append(("forward", peer.peer_id, call))
        await self._stall("forward", peer)
        self._check(self.fault, "forward", peer)
        return await super().forward(peer, call, timeout_s=timeout_s)

    async def backward(self, peer: PeerInfo, call: BackwardCall, *, timeout_s: float) -> BackwardAnswer:
        self.log.append(("backward", peer.peer_id, call))
        await self._stall("backward", peer)
        self._check(self.fault, "backward", peer)
        answer = await super().backward(peer, call, timeout_s=timeout_s)
        self._check(self.lost_answer, "backward", peer)
        return answer

    async def commit(self, peer: PeerInfo, call: CommitCall, *, timeout_s: float) -> CommitAnswer:
        self.log.append(("commit", peer.peer_id, call))
        await self._stall("commit", peer)
        self._check(self.fault, "commit", peer)
        return await super().commit(peer, call, timeout_s=timeout_s)

    async def ping(self, peer: PeerInfo, *, timeout_s: float) -> None:
        self.log.append(("ping", peer.peer_id, None))
        self._check(self.fault, "ping", peer)


class Clock:
    """Time passes only where somebody sleeps on it."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, wait_s: float) -> None:
        self.now_s += wait_s
        await asyncio.sleep(0)


Swarm = tuple[ExpertSwarm, Faulty, dict[str, ExpertHost], Clock]


def swarm_of(replicas: int, *, stage_bytes: int = 2**20, spread: bool = False, **policy: float) -> Swarm:
    """Peers p0, p1, ..: each hosts the whole layer."""
    peers = [PeerInfo(peer_id=f"p{i}", address="", experts=EXPERTS) for i in range(replicas)]
    hosts = {p.peer_id: ExpertHost(make_banks(RUN, EXPERTS), stage_bytes=stage_bytes) for p in peers}
    transport, view, clock = Faulty(hosts), View(peers), Clock()
    limits = CallPolicy(attempts=3, retry_pause_s=1e-6, **policy)  # type: ignore[arg-type]
    events: list[FaultEvent] = []
    swarm = ExpertSwarm(
        trainer="t", transport=transport, view=lambda: view, policy=limits, clock_s=clock, sleep=clock.sleep,
        latency=LatencyConfig(min_samples=2), spread=spread, on_event=events.append,
    )  # fmt: skip
    transport.events = events
    return swarm, transport, hosts, clock


async def forward(swarm: ExpertSwarm, step: int = 0):
    return await swarm.forward(0, X_TD, IDS_TK, GATES_TK, step=step, train=True)


def grads(host: ExpertHost) -> torch.Tensor:
    """Change of the weights by a step on all that is staged: shows which gradients are there."""
    before = {k: v for k, v in host.fetch(0, []).items() if k.endswith("w_in")}
    staged = host._staging._calls
    (trainer,) = {call.facts.trainer for call in staged.values()}
    host.commit(CommitCall(trainer=trainer, step=0, tokens=RUN.global_batch_tokens, calls=tuple(staged)))
    after = host.fetch(0, [])
    return torch.stack([after[k] - before[k] for k in sorted(before)])
