"""The experts of a run as one trainer sees them: forward, backward, commit.

T tokens, D model width, K experts per token, E experts of a layer.

Everything here runs on one event loop; `live`, `latency_bias` and `stats` may be read from other threads. No call waits
for discovery: the view is whatever snapshot the owner's background task published last.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moe_net.errors import DivergedError, WireError
from moe_net.placement.health import HealthConfig
from moe_net.placement.latency import LatencyConfig
from moe_net.placement.slow import latency_bias
from moe_net.placement.view import View
from moe_net.rpc.backward import BackwardPass
from moe_net.rpc.base import ExpertTransport
from moe_net.rpc.caller import Caller, SwarmStats
from moe_net.rpc.collect import Collector
from moe_net.rpc.commits import Commits, Sleep
from moe_net.rpc.forward import Answered, ForwardPass, LayerResult
from moe_net.rpc.ledger import Ledger
from moe_net.rpc.outlook import Outlook
from moe_net.rpc.policy import CallPolicy
from moe_net.rpc.roster import Roster
from moe_net.trace import EventSink, ignore
from moe_net.types import Encoding, ExpertId
from moe_net.wire.validate import check_finite

__all__ = ["Answered", "ExpertSwarm", "LayerResult", "SwarmStats"]


def _require_finite(values: Tensor, what: str) -> None:
    # Every server would refuse them, and each refusal would be held against the server.
    try:
        check_finite(values, what)
    except WireError as error:
        raise DivergedError(f"{error}: lower the learning rate, or go on from an earlier checkpoint") from error


class ExpertSwarm:
    """The experts of a run as one trainer sees them. `close` it on its loop."""

    def __init__(
        self,
        *,
        trainer: str,
        transport: ExpertTransport,
        view: Callable[[], View],
        encoding: Encoding = Encoding.FP32,
        policy: CallPolicy | None = None,
        health: HealthConfig | None = None,
        latency: LatencyConfig | None = None,
        clock_s: Callable[[], float] = time.monotonic,
        sleep: Sleep = asyncio.sleep,
        spread: bool = False,
        on_event: EventSink = ignore,
    ) -> None:
        """`sleep`: how those wait who ask a suspended peer whether it is back. `spread`: share each layer's
        tokens out among equal replicas, instead of asking always the same."""
        # The suffix makes a restarted trainer a new one: its step numbers begin again.
        self.trainer = f"{trainer}-{secrets.token_hex(4)}"
        # Without the suffix: the same trainer prefers the same replicas, run after run.
        self._salt = trainer
        self._spread = itertools.count() if spread else None
        self._passes = itertools.count()
        self._transport = transport
        self._clock_s = clock_s
        self._on_event = on_event
        policy = policy or CallPolicy()
        self.outlook = Outlook(
            policy=policy, health=health, latency=latency, clock_s=clock_s, on_event=on_event,
            on_suspended=lambda peer_id: self._commits.recover(peer_id),
        )  # fmt: skip
        self._ledger = Ledger(self.trainer)
        self._roster = Roster(view, self.outlook.alive, on_event)
        self._caller = Caller(trainer=self.trainer, transport=transport, outlook=self.outlook, encoding=encoding)
        self._commits = Commits(self._caller, self._ledger, self._roster.view, policy, sleep)

    @property
    def stats(self) -> SwarmStats:
        return self._caller.stats

    def view(self) -> View:
        """The latest snapshot without the peers that are suspended just now, or that have missed a commit."""
        return self.outlook.filtered(self._roster.view(), self._ledger.owing)

    def live(self, layer: int, n_experts: int) -> Tensor:
        """bool [E]: the experts of a layer that have a usable replica (for masking before top-k)."""
        return torch.tensor(self.view().live(layer, n_experts), dtype=torch.bool)

    def latency_bias(self, layer: int, n_experts: int, *, bound: float) -> Tensor | None:
        """fp32 [E], within -bound..0: what slow experts of a layer lose in the selection; None when nothing does."""
        if bound <= 0:
            return None
        bias = latency_bias(self.view(), layer, n_experts, self.outlook.slowness(), bound=bound)
        return torch.tensor(bias, dtype=torch.float32) if any(bias) else None

    async def forward(
        self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, *, step: int, train: bool
    ) -> LayerResult:
        """Run the pairs with `expert_ids_TK >= 0`; what no replica answers in time is simply not in the result.

        DivergedError when `x_TD` is not finite.
        """
        _require_finite(x_TD, f"activations before the experts of layer {layer}")
        work = ForwardPass(
            self._caller, self.view, salt=self._salt, layer=layer, x_TD=x_TD, expert_ids_TK=expert_ids_TK,
            gates_TK=gates_TK, step=step, train=train, serial=next(self._passes),
            turn=None if self._spread is None else next(self._spread),
        )  # fmt: skip
        return await work.run()

    async def backward(self, answered: list[Answered], grad_TD: Tensor, n_pairs: int) -> tuple[Tensor, Tensor]:
        """Gradients of x [T, D] and of the gates [n_pairs, flattened T*K] of an earlier `forward`.

        DivergedError when `grad_TD` is not finite.
        """
        _require_finite(grad_TD, "gradients behind the experts")
        work = BackwardPass(self._caller, self.view, self._ledger, salt=self._salt, grad_TD=grad_TD)
        return await work.run(answered, n_pairs)

    async def commit(self, step: int, tokens: int) -> None:
        """Tell every peer which calls of this step count. Returns when those that answer have answered.

        Commits reach a peer in order: one that it missed is said again before the next, so that its experts
        never divide a step's gradients by another step's tokens.
        """
        await self._commits.commit(step, tokens)

    async def close(self) -> None:
        """End the background tasks; the transport stays the caller's."""
        await self._commits.close()

    async def fetch_experts(
        self, experts: tuple[ExpertId, ...], *, timeout_s: float, suspended: bool = False
    ) -> dict[str, Tensor]:
        """State of the given experts from their replicas; those that nobody answers for are left out.

        A suspended peer is not asked, for a checkpoint waits for it as little as a step does; with `suspended` it is,
        after all others.
        """
        collector = Collector(
            view=self._roster.view if suspended else self.view, transport=self._transport, timeout_s=timeout_s,
            usable=lambda peer_id: peer_id in self.view().peers, salt=self._salt, on_event=self._on_event,
            clock_s=self._clock_s,
        )  # fmt: skip
        return await collector.collect(experts)
