"""One trainer's side of the experts: fan a layer's rows out, gather what answers, commit (design, D3 to D7).

T tokens, D model width, K experts per token, R rows of one call, P pairs of one call.

Everything here runs on one event loop; `live` and `stats` may be read from other threads. No call waits for
discovery: the view is whatever snapshot the owner's background task published last.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moe_net.errors import DivergedError, WireError
from moe_net.placement.health import (
    CallFailed,
    CallSucceeded,
    HealthConfig,
    HealthEvent,
    HealthState,
    after_event,
    usable,
)
from moe_net.placement.select import select
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure, ExpertTransport
from moe_net.rpc.plan import Shipment, add_rows, answered_pairs, ship
from moe_net.rpc.policy import CallPolicy, Move, after_backward, after_commit, after_forward, pause_s
from moe_net.trace import EventSink, FaultEvent, ignore
from moe_net.types import Encoding, ExpertId, PeerInfo
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitCall, ForwardAnswer, ForwardCall
from moe_net.wire.validate import check_finite


def _require_finite(values: Tensor, what: str) -> None:
    # Every server would refuse them, and each refusal would be held against the server.
    try:
        check_finite(values, what)
    except WireError as error:
        raise DivergedError(f"{error}: lower the learning rate, or go on from an earlier checkpoint") from error


@dataclass(slots=True)
class SwarmStats:
    """Counters since the start; a trainer reports differences."""

    calls: int = 0
    """Forward, Backward and Commit calls that were sent."""
    retries: int = 0
    """Of those, not the first for their rows."""
    rows: int = 0
    """Rows sent forward."""
    routed_pairs: int = 0
    """(token, expert) pairs the router asked for."""
    dropped_pairs: int = 0
    """Pairs without an answer in forward."""
    lost_gradient_pairs: int = 0
    """Pairs that ran forward but whose gradient could not be delivered."""
    staleness_sum: int = 0
    """Steps an expert made between a call's forward and its backward, summed over calls and experts."""
    staleness_max: int = 0
    staleness_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answered:
    """A call that a server answered, kept for its backward."""

    call: ForwardCall
    peer: PeerInfo
    shipment: Shipment
    ran_P: Tensor
    versions: dict[int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerResult:
    """What came back for one layer."""

    y_TD: Tensor
    """Sum over servers of their partial sums, not divided by anything."""
    answered_TK: Tensor
    """bool: the pairs that are in the sum."""
    answered: list[Answered] = field(default_factory=list[Answered])
    """For `ExpertSwarm.backward`."""


class ExpertSwarm:
    """The experts of a run as one trainer sees them."""

    def __init__(
        self,
        *,
        trainer: str,
        transport: ExpertTransport,
        view: Callable[[], View],
        encoding: Encoding = Encoding.FP32,
        policy: CallPolicy | None = None,
        health: HealthConfig | None = None,
        clock_s: Callable[[], float] = time.monotonic,
        on_event: EventSink = ignore,
    ) -> None:
        # The suffix makes a restarted trainer a new one: its step numbers begin again.
        self.trainer = f"{trainer}-{secrets.token_hex(4)}"
        # Without the suffix: the same trainer prefers the same replicas, run after run.
        self._salt = trainer
        self.stats = SwarmStats()
        self._transport = transport
        self._view = view
        self._encoding = encoding
        self._policy = policy or CallPolicy()
        self._health_config = health or HealthConfig()
        self._health = HealthState()
        self._clock_s = clock_s
        self._on_event = on_event
        self._owed: dict[str, list[CommitCall]] = {}

    # Who is there -----------------------------------------------------------------------------------------

    def view(self) -> View:
        """The latest snapshot without the peers that are suspended just now, or that have missed a commit.

        Gradients must not reach a peer before the commits of earlier steps have: its experts would divide them by
        those steps' tokens. So a peer that was away is asked by the next `commit` first; nothing is lost by that.
        """
        view = self._view()
        return view.without([p for p in view.peers if self._owed.get(p) or not self._usable(p)])

    def _usable(self, peer_id: str) -> bool:
        return usable(self._health, peer_id, self._clock_s(), self._health_config)

    def live(self, layer: int, n_experts: int) -> Tensor:
        """bool [E]: the experts of a layer that have a usable replica (for masking before top-k)."""
        return torch.tensor(self.view().live(layer, n_experts), dtype=torch.bool)

    def _note(self, event: HealthEvent) -> None:
        self._health = after_event(self._health, event, self._clock_s(), self._health_config)

    # Forward ----------------------------------------------------------------------------------------------

    async def forward(
        self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, *, step: int, train: bool
    ) -> LayerResult:
        """Run the pairs with `expert_ids_TK >= 0`; what no replica answers in time is simply not in the result.

        DivergedError when `x_TD` is not finite.
        """
        _require_finite(x_TD, f"activations before the experts of layer {layer}")
        deadline_s = self._clock_s() + self._policy.forward_timeout_s
        result = LayerResult(y_TD=torch.zeros_like(x_TD), answered_TK=torch.zeros_like(expert_ids_TK, dtype=torch.bool))
        pending_TK = expert_ids_TK >= 0
        self.stats.routed_pairs += int(pending_TK.sum())
        tried: set[tuple[int, str]] = set()
        attempt = 0
        while bool(pending_TK.any()):
            attempt += 1
            view = self.view()
            wanted = Counter(expert_ids_TK[pending_TK].tolist())
            server_of = self._choose(view, layer, wanted, tried)
            shipments = ship(
                x_TD, expert_ids_TK, gates_TK, pending_TK, server_of,
                encoding=self._encoding, max_tensor_bytes=self._policy.max_tensor_bytes,
                max_rows=self._policy.max_rows,
            )  # fmt: skip
            if not shipments:
                break
            if attempt > 1:
                self.stats.retries += len(shipments)
            answers = await asyncio.gather(
                *(self._forward_one(layer, view.peers[s.peer_id], s, step, train, deadline_s) for s in shipments)
            )
            again = False
            for shipment, answer in zip(shipments, answers, strict=True):
                tried.update((expert, shipment.peer_id) for expert in set(shipment.rows.expert_index_P.tolist()))
                if isinstance(answer, CallError):
                    left_s = deadline_s - self._clock_s()
                    move = after_forward(answer.failure, attempt=attempt, left_s=left_s, policy=self._policy)
                    again |= move is Move.ELSEWHERE
                    continue
                ran_P = answered_pairs(shipment, answer[1].failed_experts)
                again |= not bool(ran_P.all())
                add_rows(result.y_TD, shipment.token_R, answer[1].y_RD)
                done_P = shipment.pair_P[ran_P]
                result.answered_TK.view(-1)[done_P] = True
                pending_TK.view(-1)[done_P] = False
                if train:
                    result.answered.append(
                        Answered(
                            call=answer[0], peer=view.peers[shipment.peer_id], shipment=shipment,
                            ran_P=ran_P, versions=answer[1].versions,
                        )
                    )  # fmt: skip
            if not again:
                break
        self.stats.dropped_pairs += int(pending_TK.sum())
        return result

    def _choose(self, view: View, layer: int, wanted: Counter[int], tried: set[tuple[int, str]]) -> dict[int, str]:
        # One expert's replicas that failed these very rows are not asked again for them.
        failed = {peer for expert, peer in tried if expert in wanted}
        return select(view.without(failed) if failed else view, layer, wanted, salt=self._salt)

    async def _forward_one(
        self, layer: int, peer: PeerInfo, shipment: Shipment, step: int, train: bool, deadline_s: float
    ) -> tuple[ForwardCall, ForwardAnswer] | CallError:
        call = ForwardCall(
            call_id=secrets.token_bytes(16), trainer=self.trainer, step=step, layer=layer, rows=shipment.rows,
            train=train, encoding=self._encoding, reply_encoding=self._encoding,
        )  # fmt: skip
        self.stats.calls += 1
        self.stats.rows += shipment.token_R.numel()
        started_s = self._clock_s()
        try:
            answer = await self._transport.forward(peer, call, timeout_s=max(0.001, deadline_s - started_s))
        except CallError as error:
            self._failed("forward_failed", peer, layer, error, shipment.pair_P.numel(), started_s, "elsewhere")
            return error
        self._note(CallSucceeded(peer_id=peer.peer_id))
        return call, answer

    # Backward ---------------------------------------------------------------------------------------------

    async def backward(self, answered: list[Answered], grad_TD: Tensor, n_pairs: int) -> tuple[Tensor, Tensor]:
        """Gradients of x [T, D] and of the gates [n_pairs, flattened T*K] from the servers that ran forward.

        DivergedError when `grad_TD` is not finite.
        """
        _require_finite(grad_TD, "gradients behind the experts")
        deadline_s = self._clock_s() + self._policy.backward_timeout_s
        dx_TD = torch.zeros_like(grad_TD)
        dgate = torch.zeros(n_pairs, dtype=torch.float32)
        parts = await asyncio.gather(*(self._backward_one(a, grad_TD, deadline_s) for a in answered))
        for one, part in zip(answered, parts, strict=True):
            if part is None:
                self.stats.lost_gradient_pairs += int(one.ran_P.sum())
                continue
            add_rows(dx_TD, one.shipment.token_R, part.dx_RD)
            dgate[one.shipment.pair_P] = torch.where(one.ran_P, part.gate_grad_P, 0.0)
            for expert, version in part.versions.items():
                behind = version - one.versions.get(expert, version)
                self.stats.staleness_sum += behind
                self.stats.staleness_max = max(self.stats.staleness_max, behind)
                self.stats.staleness_count += 1
        return dx_TD, dgate

    async def _backward_one(self, one: Answered, grad_TD: Tensor, deadline_s: float) -> BackwardAnswer | None:
        token_R = one.shipment.token_R
        call = BackwardCall(
            call_id=one.call.call_id, trainer=self.trainer, step=one.call.step, layer=one.call.layer,
            grad_RD=grad_TD if token_R.numel() == grad_TD.shape[0] else grad_TD[token_R],
            encoding=self._encoding, reply_encoding=self._encoding,
        )  # fmt: skip
        for attempt in range(1, self._policy.attempts + 1):
            self.stats.calls += 1
            self.stats.retries += attempt > 1
            started_s = self._clock_s()
            # A late answer must leave time for another attempt of the same call: it cannot count twice.
            share_s = (deadline_s - started_s) / (self._policy.attempts + 1 - attempt)
            try:
                answer = await self._transport.backward(one.peer, call, timeout_s=max(0.001, share_s))
            except CallError as error:
                left_s = deadline_s - self._clock_s()
                move = after_backward(error.failure, attempt=attempt, left_s=left_s, policy=self._policy)
                if error.failure is not CallFailure.INPUTS_GONE:
                    pairs = int(one.ran_P.sum())
                    self._failed("backward_failed", one.peer, call.layer, error, pairs, started_s, move.value)
                if move is Move.GIVE_UP:
                    return None
                if move is Move.RESEND:
                    call = replace(call, rows=one.call.rows)
                else:
                    await asyncio.sleep(pause_s(attempt=attempt, left_s=left_s, policy=self._policy))
                continue
            self._note(CallSucceeded(peer_id=one.peer.peer_id))
            if answer.gate_grad_P.shape != one.ran_P.shape:
                detail = f"{answer.gate_grad_P.numel()} gate gradients for {one.ran_P.numel()} pairs"
                error = CallError(CallFailure.REFUSED, one.peer.peer_id, detail)
                self._failed("backward_failed", one.peer, call.layer, error, 0, started_s, "give_up")
                return None
            return answer
        return None

    # Commit and fetch -------------------------------------------------------------------------------------

    async def commit(self, step: int, tokens: int) -> None:
        """Tell every peer that this step's gradients are complete. Returns when all have answered or given up.

        Commits reach a peer in order: one that it missed is said again before the next, so that its experts
        never divide a step's gradients by another step's tokens.
        """
        peers = self._view().peers
        # A peer that is not in the view any more owes and is owed nothing.
        self._owed = {peer_id: self._owed.get(peer_id, []) for peer_id in peers}
        for owed in self._owed.values():
            owed.append(CommitCall(trainer=self.trainer, step=step, tokens=tokens))
        await asyncio.gather(*(self._commit_one(peer) for peer in peers.values() if self._usable(peer.peer_id)))

    async def _commit_one(self, peer: PeerInfo) -> None:
        deadline_s = self._clock_s() + self._policy.commit_timeout_s
        owed = self._owed[peer.peer_id]
        attempt = 0
        while owed:
            attempt += 1
            self.stats.calls += 1
            self.stats.retries += attempt > 1
            started_s = self._clock_s()
            share_s = (deadline_s - started_s) / max(1, self._policy.attempts + 1 - attempt)
            try:
                await self._transport.commit(peer, owed[0], timeout_s=max(0.001, share_s))
            except CallError as error:
                left_s = deadline_s - self._clock_s()
                move = after_commit(error.failure, attempt=attempt, left_s=left_s, policy=self._policy)
                self._failed("commit_failed", peer, -1, error, 0, started_s, move.value)
                if error.failure is CallFailure.REFUSED:
                    owed.pop(0)  # It would be refused again for ever.
                if move is Move.GIVE_UP:
                    return
                await asyncio.sleep(pause_s(attempt=attempt, left_s=left_s, policy=self._policy))
                continue
            self._note(CallSucceeded(peer_id=peer.peer_id))
            owed.pop(0)
            attempt = 0

    async def fetch_experts(self, experts: tuple[ExpertId, ...], *, timeout_s: float) -> dict[str, Tensor]:
        """State of the given experts from their replicas; those that nobody answers for are left out."""
        state: dict[str, Tensor] = {}
        for layer in sorted({expert.layer for expert in experts}):
            view = self.view()
            wanted = Counter(expert.index for expert in experts if expert.layer == layer)
            by_peer: dict[str, list[int]] = {}
            for index, peer_id in select(view, layer, wanted, salt=self._salt).items():
                by_peer.setdefault(peer_id, []).append(index)
            for peer_id, indices in sorted(by_peer.items()):
                started_s = self._clock_s()
                try:
                    peer = view.peers[peer_id]
                    state |= await self._transport.fetch(peer, layer, sorted(indices), timeout_s=timeout_s)
                except CallError as error:
                    self._failed("fetch_failed", view.peers[peer_id], layer, error, 0, started_s, "left_out")
        return state

    def _failed(
        self, what: str, peer: PeerInfo, layer: int, error: CallError, pairs: int, started_s: float, action: str
    ) -> None:
        cost_s = self._clock_s() - started_s
        self._on_event(
            FaultEvent(
                what=what, peer=peer.peer_id, layer=layer, action=action, cost_s=cost_s, pairs=pairs,
                detail=error.detail,
            )
        )  # fmt: skip
        before = self._usable(peer.peer_id)
        self._note(CallFailed(peer_id=peer.peer_id, failure=error.failure.value))
        if before and not self._usable(peer.peer_id):
            detail = f"its {len(peer.experts)} experts are masked for a while"
            self._on_event(FaultEvent(what="peer_suspended", peer=peer.peer_id, action="masked", detail=detail))
