"""Forward of one layer: rows out, answers in; hedged when late, elsewhere when it fails.

T tokens, D model width, K experts per token, R rows of one call, P pairs of one call.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_net.placement.select import select
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure, Failed
from moe_net.rpc.caller import Caller
from moe_net.rpc.hedge import race
from moe_net.rpc.outlook import CallKind
from moe_net.rpc.patience import Patience
from moe_net.rpc.plan import Shipment, add_rows, answered_pairs, ship
from moe_net.rpc.policy import Move, after_forward, pause_s
from moe_net.trace import FaultEvent
from moe_net.types import ExpertId, PeerInfo
from moe_net.wire.messages import ForwardAnswer, ForwardCall

Tried = frozenset[tuple[int, str]]
"""(expert index, peer id) that shall not meet again for these rows."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answered:
    """A call that a server answered, kept for its backward."""

    call: ForwardCall
    peer: PeerInfo
    shipment: Shipment
    ran_P: Tensor
    """bool: the pairs whose expert ran."""
    versions: dict[int, int]
    """Expert index -> optimizer steps it had made."""
    serial: int = 0
    """Of the forward pass that it belongs to, counted by its swarm."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerResult:
    """What came back for one layer."""

    y_TD: Tensor
    """Sum over servers of their partial sums, not divided by anything."""
    answered_TK: Tensor
    """bool: the pairs that are in the sum."""
    answered: list[Answered] = field(default_factory=list[Answered])
    """For the backward."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Reply:
    kept: Answered
    y_RD: Tensor


class ForwardPass:
    """The forward of one layer's rows. Make one, `run` it."""

    def __init__(
        self, caller: Caller, view: Callable[[], View], *, salt: str, layer: int, x_TD: Tensor, expert_ids_TK: Tensor,
        gates_TK: Tensor, step: int, train: bool, serial: int, turn: int | None = None,
    ) -> None:  # fmt: skip
        """`view`: the peers that may be called just now. `turn`: share the tokens out among equal replicas, beginning
        with the replica of that number; None: ask the favourites."""
        self._caller = caller
        self._view = view
        self._salt = salt
        self._layer = layer
        self._x_TD = x_TD
        self._ids_TK = expert_ids_TK
        self._gates_TK = gates_TK
        self._step = step
        self._train = train
        self._serial = serial
        self._turn = turn
        self._deadline_s = caller.now_s() + caller.outlook.policy.forward_timeout_s
        self._patience = Patience(caller.outlook, CallKind.FORWARD)

    async def run(self) -> LayerResult:
        """What no replica answers in time is simply not in the result."""
        pending_TK = self._ids_TK >= 0
        stats = self._caller.stats
        stats.routed_pairs += int(pending_TK.sum())
        replies = await self._all(self._ship(pending_TK, frozenset()), attempt=1, tried=frozenset())
        result = LayerResult(
            y_TD=torch.zeros_like(self._x_TD), answered_TK=torch.zeros_like(self._ids_TK, dtype=torch.bool)
        )
        for reply in replies:
            add_rows(result.y_TD, reply.kept.shipment.token_R, reply.y_RD)
            result.answered_TK.view(-1)[reply.kept.shipment.pair_P[reply.kept.ran_P]] = True
            if self._train:
                result.answered.append(reply.kept)
        stats.dropped_pairs += int((pending_TK & ~result.answered_TK).sum())
        return result

    def _ship(self, pending_TK: Tensor, tried: Tried, without: str | None = None) -> list[tuple[PeerInfo, Shipment]]:
        view = self._view()
        spared = self._caller.outlook.spared(view)
        if without is not None:
            view = view.without([without])
        shipments: list[Shipment] = []
        for turn, mine_TK in self._shares(pending_TK, view):
            wanted = Counter(self._ids_TK[mine_TK].tolist())
            server_of = select(view, self._layer, wanted, salt=self._salt, spared=spared, tried=tried, turn=turn)
            shipments += self._cut(mine_TK, server_of)
        return [(view.peers[s.peer_id], s) for s in shipments]

    def _shares(self, pending_TK: Tensor, view: View) -> Iterator[tuple[int, Tensor]]:
        """(turn, pairs): all of them, or as many parts of the tokens as experts have replicas."""
        if self._turn is None or not bool(pending_TK.any()):
            yield 0, pending_TK
            return
        experts = self._ids_TK[pending_TK].unique().tolist()
        parts = max(1, *(len(view.replicas(ExpertId(self._layer, e))) for e in experts))
        n_tokens = pending_TK.shape[0]
        for part in range(parts):
            mine_TK = torch.zeros_like(pending_TK)
            here = slice(part * n_tokens // parts, (part + 1) * n_tokens // parts)
            mine_TK[here] = pending_TK[here]
            if bool(mine_TK.any()):
                yield self._turn + part, mine_TK

    def _cut(self, pairs_TK: Tensor, server_of: Mapping[int, str]) -> list[Shipment]:
        policy = self._caller.outlook.policy
        return ship(
            self._x_TD, self._ids_TK, self._gates_TK, pairs_TK, server_of, encoding=self._caller.encoding,
            max_tensor_bytes=policy.max_tensor_bytes, max_rows=policy.max_rows,
        )  # fmt: skip

    async def _all(self, shipments: Sequence[tuple[PeerInfo, Shipment]], *, attempt: int, tried: Tried) -> list[_Reply]:
        if attempt > 1:
            self._caller.stats.retries += len(shipments)
        parts = await asyncio.gather(*(self._deliver(peer, s, attempt, tried) for peer, s in shipments))
        return [reply for part in parts for reply in part]

    async def _deliver(self, peer: PeerInfo, shipment: Shipment, attempt: int, tried: Tried) -> list[_Reply]:
        """What can be had for one shipment, from whomever; fewer pairs than asked for when nobody answers."""
        rows = shipment.token_R.numel()
        outlook = self._caller.outlook
        view = self._view()
        others = all(len(view.replicas(ExpertId(self._layer, e))) > 1 for e in shipment.experts)
        overdue_s = outlook.overdue_after_s(peer.peer_id, CallKind.FORWARD, rows) if others else None
        started_s = self._caller.now_s()
        outcome = await race(self._one(peer, shipment), overdue_s, lambda: self._hedge(peer, shipment, tried))
        waited_s = self._caller.now_s() - started_s
        if outcome.hedged:
            self._note_hedge(peer, shipment, waited_s, outcome.hedge_won)
        if outcome.first_unfinished:
            outlook.overtaken(peer.peer_id, CallKind.FORWARD, rows, waited_s)
        if isinstance(outcome.answer, Failed):
            return await self._elsewhere(peer, shipment, outcome.answer, attempt, tried)
        replies: list[_Reply] = outcome.answer
        missing_P = ~replies[0].kept.ran_P
        if outcome.hedge_won or not bool(missing_P.any()) or attempt >= outlook.policy.attempts:
            return replies
        # It says that it cannot run some experts (any more): others may.
        tried |= {(e, peer.peer_id) for e in set(shipment.rows.expert_index_P[missing_P].tolist())}
        left = self._ship(self._pairs(shipment.pair_P[missing_P]), tried)
        return replies + await self._all(left, attempt=attempt + 1, tried=tried)

    async def _one(self, peer: PeerInfo, shipment: Shipment, *, hedge: bool = False) -> list[_Reply] | Failed:
        rows = shipment.token_R.numel()
        encoding = self._caller.encoding
        call = ForwardCall(
            call_id=secrets.token_bytes(16), trainer=self._caller.trainer, step=self._step, layer=self._layer,
            rows=shipment.rows, train=self._train, encoding=encoding, reply_encoding=encoding,
        )  # fmt: skip
        timeout_s = self._caller.outlook.late_after_s(peer.peer_id, CallKind.FORWARD, rows)
        timeout_s = max(0.001, min(timeout_s, self._deadline_s - self._caller.now_s()))
        answer = await self._caller.forward(peer, call, timeout_s=timeout_s, hedge=hedge)
        if isinstance(answer, Failed):
            if hedge:
                outlook = self._caller.outlook
                outlook.blame(peer, CallKind.FORWARD, rows, answer)
                outlook.report(
                    peer, CallKind.FORWARD, answer, action="hedge_failed", layer=self._layer,
                    pairs=shipment.pair_P.numel(),
                )  # fmt: skip
            return answer
        return [self._reply(call, peer, shipment, answer)]

    def _reply(self, call: ForwardCall, peer: PeerInfo, shipment: Shipment, answer: ForwardAnswer) -> _Reply:
        ran_P = answered_pairs(shipment, answer.failed_experts)
        kept = Answered(
            call=call, peer=peer, shipment=shipment, ran_P=ran_P, versions=answer.versions, serial=self._serial
        )
        return _Reply(kept=kept, y_RD=answer.y_RD)

    def _hedge(
        self, peer: PeerInfo, shipment: Shipment, tried: Tried
    ) -> Coroutine[Any, Any, list[_Reply] | Failed] | None:
        """The same pairs from other replicas; None when they do not have all of them, or no more may be sent."""
        others = self._ship(self._pairs(shipment.pair_P), tried, without=peer.peer_id)
        covered = sum(other.pair_P.numel() for _, other in others) == shipment.pair_P.numel()
        if not covered or not self._caller.outlook.take_hedge(CallKind.FORWARD, len(others)):
            return None
        return self._whole(others)

    async def _whole(self, shipments: Sequence[tuple[PeerInfo, Shipment]]) -> list[_Reply] | Failed:
        """All of these or a failure: the first server's answer is one sum, half of it cannot be replaced."""
        parts = await asyncio.gather(*(self._one(peer, shipment, hedge=True) for peer, shipment in shipments))
        replies: list[_Reply] = []
        for part in parts:
            if isinstance(part, Failed):
                return part
            replies += part
        for reply in replies:
            if not bool(reply.kept.ran_P.all()):
                error = CallError(CallFailure.REFUSED, reply.kept.peer.peer_id, "could not run some of the experts")
                return Failed(error=error, waited_s=0.0)
        return replies

    async def _elsewhere(
        self, peer: PeerInfo, shipment: Shipment, failed: Failed, attempt: int, tried: Tried
    ) -> list[_Reply]:
        """The pairs of a call that failed: from other replicas where there are some, else from the same peer again."""
        outlook, rows = self._caller.outlook, shipment.token_R.numel()
        again_s, failed = self._patience.after(peer.peer_id, rows, failed, attempt=attempt)
        failure = failed.error.failure
        outlook.blame(peer, CallKind.FORWARD, rows, failed)
        view, left_s = self._view(), self._deadline_s - self._caller.now_s()
        index_P = shipment.rows.expert_index_P
        by_move: dict[Move, list[int]] = {}
        for e in shipment.experts:
            replicas = view.replicas(ExpertId(self._layer, e))
            move = after_forward(
                failure, attempt=attempt, left_s=left_s, policy=outlook.policy,
                replica=any(p != peer.peer_id and (e, p) not in tried for p in replicas),
                usable=outlook.askable(peer.peer_id),
            )  # fmt: skip
            by_move.setdefault(move, []).append(e)
        actions = "+".join(sorted(move.value for move in by_move))
        outlook.report(peer, CallKind.FORWARD, failed, action=actions, layer=self._layer, pairs=shipment.pair_P.numel())
        work: list[Coroutine[Any, Any, list[_Reply]]] = []
        for move, experts in by_move.items():
            if move is Move.GIVE_UP:
                continue
            here_P = torch.isin(index_P, torch.tensor(experts, dtype=index_P.dtype))
            pairs_TK = self._pairs(shipment.pair_P[here_P])
            if move is Move.ELSEWHERE:
                self._caller.stats.failovers += 1
                now_tried = tried | {(e, peer.peer_id) for e in experts}
                work.append(self._all(self._ship(pairs_TK, now_tried), attempt=attempt + 1, tried=now_tried))
            else:
                queue_s = failed.error.queue_s if failure is CallFailure.BUSY else 0.0
                wait_s = pause_s(attempt=attempt, left_s=min(left_s, again_s), policy=outlook.policy, queue_s=queue_s)
                same = dict.fromkeys(experts, peer.peer_id)
                work.append(self._again(peer, self._cut(pairs_TK, same), wait_s, attempt + 1, tried))
        return [reply for part in await asyncio.gather(*work) for reply in part]

    async def _again(
        self, peer: PeerInfo, shipments: Sequence[Shipment], wait_s: float, attempt: int, tried: Tried
    ) -> list[_Reply]:
        await asyncio.sleep(wait_s)
        return await self._all([(peer, shipment) for shipment in shipments], attempt=attempt, tried=tried)

    def _pairs(self, pair_P: Tensor) -> Tensor:
        pairs_TK = torch.zeros_like(self._ids_TK, dtype=torch.bool)
        pairs_TK.view(-1)[pair_P] = True
        return pairs_TK

    def _note_hedge(self, peer: PeerInfo, shipment: Shipment, waited_s: float, won: bool) -> None:
        if not won:  # the first answer came after all: nothing went wrong
            return
        self._caller.stats.hedges_won += 1
        self._caller.outlook.event(
            FaultEvent(
                what="forward_overdue", peer=peer.peer_id, layer=self._layer, cost_s=waited_s,
                pairs=shipment.pair_P.numel(), action="hedge_won",
            )
        )  # fmt: skip
