# pyright: basic
"""Step times when one of two replicas stalls in some of its calls: with hedging and without, in turns.

    python benchmarks/hedging.py    # about three minutes

Two server processes host all experts; the trainer prefers the one that stalls (1 s, in 5 % of its Forward, Backward and
Commit calls). README.md says how to read it.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

import torch
from _hedging_run import make_batches, make_run
from _processes import Child, end_cleanly_on_sigterm, print_table

from moe_net.model.remote_moe import SwarmLink
from moe_net.placement.select import select
from moe_net.placement.view import View
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.rpc.policy import CallPolicy
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm, SwarmStats
from moe_net.types import Encoding, PeerInfo
from moe_peer.trainer import Trainer, build_model

P99_BAR, REQUESTS_BAR = 0.3, 1.1
WARM_UP_STEPS = 20
STALLING, STEADY = "stalling", "steady"


@dataclass(slots=True)
class Contestant:
    name: str
    trainer: Trainer
    swarm: ExpertSwarm
    steps_s: list[float] = field(default_factory=list[float])
    before: SwarmStats = field(default_factory=SwarmStats)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            started_s = time.perf_counter()
            self.trainer.train_step()
            self.steps_s.append(time.perf_counter() - started_s)

    def quantile_s(self, q: float) -> float:
        ordered = sorted(self.steps_s)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    @property
    def calls_per_step(self) -> float:
        return self.swarm.stats.calls / self.trainer.step


def preferring(view: View, peer_id: str) -> str:
    """A trainer's name whose favourite replica is this one."""
    return next(name for name in map(str, range(1000)) if select(view, 0, {0: 1}, salt=name)[0] == peer_id)


async def make_swarm(view: View, hedge_fraction: float) -> tuple[ExpertSwarm, GrpcTransport]:
    run = make_run()
    transport = GrpcTransport(run=run.name, shape=run.model.expert_shape)
    policy = CallPolicy(hedge_fraction=hedge_fraction)
    name = preferring(view, STALLING)
    return (
        ExpertSwarm(trainer=name, transport=transport, view=lambda: view, encoding=Encoding.BF16, policy=policy),
        transport,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of each contestant")
    parser.add_argument("--fraction", type=float, default=0.05, help="share of calls that stall")
    parser.add_argument("--stall-s", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    torch.set_num_threads(1)
    run = make_run()
    with ExitStack() as stack:
        peers: list[PeerInfo] = []
        for peer_id, fraction in ((STALLING, arguments.fraction), (STEADY, 0.0)):
            options = (peer_id, str(fraction), str(arguments.stall_s), str(arguments.seed))
            server = stack.enter_context(Child("_hedging_server.py", *options))
            address = server.answer(60)["address"]
            peers.append(PeerInfo(peer_id=peer_id, address=address, experts=run.model.expert_ids))
        view = View(peers)
        portal = stack.enter_context(Portal())
        contestants: list[Contestant] = []
        for name, hedge_fraction in (("without hedging", 0.0), ("with hedging", 0.05)):
            swarm, transport = portal.run(make_swarm(view, hedge_fraction))
            stack.callback(lambda t=transport: portal.run(t.close()))
            stack.callback(lambda s=swarm: portal.run(s.close()))
            link = SwarmLink(swarm=swarm, runner=portal)
            trainer = Trainer(run=run, model=build_model(run, link), link=link, batches=make_batches(run))
            contestants.append(Contestant(name, trainer, swarm))
        for contestant in contestants:
            contestant.run(WARM_UP_STEPS)
            contestant.steps_s.clear()
        while any(len(contestant.steps_s) < arguments.steps for contestant in contestants):
            for contestant in contestants:
                contestant.run(min(25, arguments.steps - len(contestant.steps_s)))
        return report(contestants)


def report(contestants: list[Contestant]) -> int:
    rows = []
    for c in contestants:
        stats = c.swarm.stats
        rows.append(
            [c.name, *(f"{1e3 * c.quantile_s(q):.0f}" for q in (0.5, 0.9, 0.99)), f"{1e3 * max(c.steps_s):.0f}",
             f"{c.calls_per_step:.2f}", str(stats.hedges), str(stats.hedges_won), str(stats.dropped_pairs),
             str(stats.lost_gradient_pairs)]
        )  # fmt: skip
    print_table(
        [
            "step time, ms",
            "median",
            "p90",
            "p99",
            "max",
            "calls/step",
            "hedges",
            "won",
            "dropped",
            "lost",
        ],
        rows,
    )
    without, hedged = contestants
    tail = hedged.quantile_s(0.99) / without.quantile_s(0.99)
    requests = hedged.calls_per_step / without.calls_per_step
    print(f"median of both: {1e3 * median(without.steps_s):.0f} and {1e3 * median(hedged.steps_s):.0f} ms")
    missed = 0
    for what, value, bar in (("p99 with hedging / without", tail, P99_BAR), ("requests", requests, REQUESTS_BAR)):
        ok = value <= bar
        missed += not ok
        print(f"bar {what}: {value:.3f}, at most {bar}: {'ok' if ok else 'MISSED'}")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
