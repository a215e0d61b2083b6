"""Backward of one layer: to the peers that ran forward, or, with the inputs, to other replicas.

A gradient counts once, whatever happens on the way: the step's commit names the calls whose answers were used, and no
other counts (late, lost, overtaken, sent twice).

T tokens, D model width, R rows of one call, P pairs of one call.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_net.placement.select import select
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure, Failed
from moe_net.rpc.caller import Caller
from moe_net.rpc.forward import Answered, Tried
from moe_net.rpc.hedge import race
from moe_net.rpc.ledger import Ledger, Used
from moe_net.rpc.outlook import CallKind
from moe_net.rpc.patience import Patience
from moe_net.rpc.plan import Shipment, add_rows, ship
from moe_net.rpc.policy import Move, after_backward, pause_s
from moe_net.trace import FaultEvent
from moe_net.types import ExpertId
from moe_net.wire.messages import BackwardAnswer, BackwardCall


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Reply:
    of: Answered
    answer: BackwardAnswer


class BackwardPass:
    """The backward of one layer's rows. Make one, `run` it."""

    def __init__(self, caller: Caller, view: Callable[[], View], ledger: Ledger, *, salt: str, grad_TD: Tensor) -> None:
        """`view`: the peers that may be called just now."""
        self._caller = caller
        self._view = view
        self._ledger = ledger
        self._salt = salt
        self._grad_TD = grad_TD
        self._deadline_s = caller.now_s() + caller.outlook.policy.backward_timeout_s
        self._patience = Patience(caller.outlook, CallKind.BACKWARD)

    async def run(self, answered: Sequence[Answered], n_pairs: int) -> tuple[Tensor, Tensor]:
        """Gradients of x [T, D] and of the gates [n_pairs, flattened T*K]; zero where nobody answered."""
        dx_TD = torch.zeros_like(self._grad_TD)
        dgate = torch.zeros(n_pairs, dtype=torch.float32)
        stats = self._caller.stats
        parts = await asyncio.gather(*(self._deliver(one, 1, frozenset(), resend=False) for one in answered))
        for one, part in zip(answered, parts, strict=True):
            stats.lost_gradient_pairs += int(one.ran_P.sum()) - sum(int(reply.of.ran_P.sum()) for reply in part)
            for reply in part:
                first = int(reply.of.shipment.token_R[0]) if reply.of.shipment.token_R.numel() else 0
                used = Used(order=(reply.of.serial, first), pairs=int(reply.of.ran_P.sum()))
                self._ledger.used(reply.of.peer, reply.of.call.call_id, used)
                add_rows(dx_TD, reply.of.shipment.token_R, reply.answer.dx_RD)
                dgate[reply.of.shipment.pair_P] = torch.where(reply.of.ran_P, reply.answer.gate_grad_P, 0.0)
                for expert, version in reply.answer.versions.items():
                    behind = version - reply.of.versions.get(expert, version)
                    stats.staleness_sum += behind
                    stats.staleness_max = max(stats.staleness_max, behind)
                    stats.staleness_count += 1
        return dx_TD, dgate

    async def _deliver(self, one: Answered, attempt: int, tried: Tried, *, resend: bool) -> list[_Reply]:
        """The gradients of one call, from whomever; none for the pairs that nobody answers for."""
        outlook, rows = self._caller.outlook, one.shipment.token_R.numel()
        if not outlook.usable(one.peer.peer_id) and (
            not outlook.askable(one.peer.peer_id) or self._others(one, tried | _at(one))
        ):
            # It failed meanwhile: what it costs to find that out was paid once.
            error = CallError(CallFailure.UNREACHABLE, one.peer.peer_id, "suspended since its forward")
            return await self._after_failure(one, Failed(error=error, waited_s=0.0), attempt, tried, blame=False)
        view = self._view()
        others = all(len(view.replicas(ExpertId(one.call.layer, e))) > 1 for e in one.shipment.experts)
        overdue_s = outlook.overdue_after_s(one.peer.peer_id, CallKind.BACKWARD, rows) if others else None
        started_s = self._caller.now_s()
        outcome = await race(self._one(one, resend=resend), overdue_s, lambda: self._hedge(one, tried))
        waited_s = self._caller.now_s() - started_s
        if outcome.hedged:
            self._note_hedge(one, waited_s, outcome.hedge_won)
        if outcome.first_unfinished:
            outlook.overtaken(one.peer.peer_id, CallKind.BACKWARD, rows, waited_s)
        if isinstance(outcome.answer, Failed):
            return await self._after_failure(one, outcome.answer, attempt, tried, blame=True)
        replies: list[_Reply] = outcome.answer
        return replies

    async def _one(self, one: Answered, *, resend: bool, hedge: bool = False) -> list[_Reply] | Failed:
        """Ask one peer."""
        token_R = one.shipment.token_R
        rows, encoding = token_R.numel(), self._caller.encoding
        call = BackwardCall(
            call_id=one.call.call_id, trainer=self._caller.trainer, step=one.call.step, layer=one.call.layer,
            grad_RD=self._grad_TD if rows == self._grad_TD.shape[0] else self._grad_TD[token_R],
            rows=one.call.rows if resend else None, encoding=encoding, reply_encoding=encoding,
        )  # fmt: skip
        timeout_s = self._caller.outlook.late_after_s(one.peer.peer_id, CallKind.BACKWARD, rows)
        timeout_s = max(0.001, min(timeout_s, self._deadline_s - self._caller.now_s()))
        answer = await self._caller.backward(one.peer, call, timeout_s=timeout_s, hedge=hedge)
        if isinstance(answer, Failed):
            return answer
        if answer.gate_grad_P.shape != one.ran_P.shape:
            detail = f"{answer.gate_grad_P.numel()} gate gradients for {one.ran_P.numel()} pairs"
            return Failed(error=CallError(CallFailure.REFUSED, one.peer.peer_id, detail), waited_s=0.0)
        return [_Reply(of=one, answer=answer)]

    def _others(self, one: Answered, tried: Tried) -> list[Answered]:
        """The pairs of a call that ran, as calls to other replicas; empty unless those have all of them."""
        view = self._view()
        rows = one.call.rows
        pair_P = one.shipment.pair_P[one.ran_P]
        wanted = Counter(rows.expert_index_P[one.ran_P].tolist())
        server_of = select(
            view.without([one.peer.peer_id]), one.call.layer, wanted, salt=self._salt,
            spared=self._caller.outlook.spared(view), tried=tried,
        )  # fmt: skip
        if server_of.keys() != wanted.keys():
            return []
        # The rows of the call as a little routing of their own: as many columns as any row has pairs.
        count_R = rows.experts_per_row_R
        row_P = torch.repeat_interleave(torch.arange(count_R.numel()), count_R)
        first_R = count_R.cumsum(0) - count_R
        column_P = torch.arange(row_P.numel()) - first_R[row_P]
        shape_RK = (count_R.numel(), int(count_R.max()))
        ids_RK, gates_RK = torch.full(shape_RK, -1, dtype=torch.int64), torch.zeros(shape_RK)
        place_RK = torch.full(shape_RK, -1, dtype=torch.int64)
        ids_RK[row_P[one.ran_P], column_P[one.ran_P]] = rows.expert_index_P[one.ran_P].to(torch.int64)
        gates_RK[row_P, column_P] = rows.gate_P
        place_RK[row_P[one.ran_P], column_P[one.ran_P]] = pair_P
        policy = self._caller.outlook.policy
        shipments = ship(
            rows.x_RD, ids_RK, gates_RK, ids_RK >= 0, server_of, encoding=self._caller.encoding,
            max_tensor_bytes=policy.max_tensor_bytes, max_rows=policy.max_rows,
        )  # fmt: skip
        return [self._moved(one, view, shipment, place_RK) for shipment in shipments]

    def _moved(self, one: Answered, view: View, shipment: Shipment, place_RK: Tensor) -> Answered:
        shipment = replace(
            shipment,
            token_R=one.shipment.token_R[shipment.token_R],
            pair_P=place_RK.view(-1)[shipment.pair_P],
        )
        call = replace(one.call, call_id=secrets.token_bytes(16), rows=shipment.rows)
        ran_P = torch.ones(shipment.pair_P.shape, dtype=torch.bool)
        return Answered(
            call=call,
            peer=view.peers[shipment.peer_id],
            shipment=shipment,
            ran_P=ran_P,
            versions={},
            serial=one.serial,
        )

    def _hedge(self, one: Answered, tried: Tried) -> Coroutine[Any, Any, list[_Reply] | Failed] | None:
        others = self._others(one, tried)
        if not others or not self._caller.outlook.take_hedge(CallKind.BACKWARD, len(others)):
            return None
        return self._whole(others)

    async def _whole(self, others: Sequence[Answered]) -> list[_Reply] | Failed:
        """All of these or a failure: the first server's answer is one sum, half of it cannot be replaced."""
        parts = await asyncio.gather(*(self._one(other, resend=True, hedge=True) for other in others))
        failures = [part for part in parts if isinstance(part, Failed)]
        if not failures:
            return [reply for part in parts if not isinstance(part, Failed) for reply in part]
        for other, part in zip(others, parts, strict=True):
            if isinstance(part, Failed):
                self._caller.outlook.blame(other.peer, CallKind.BACKWARD, other.shipment.token_R.numel(), part)
                self._report(other, part, "hedge_failed")
        return failures[0]

    async def _after_failure(
        self, one: Answered, failed: Failed, attempt: int, tried: Tried, *, blame: bool
    ) -> list[_Reply]:
        outlook, rows, again_s = self._caller.outlook, one.shipment.token_R.numel(), float("inf")
        if blame:
            again_s, failed = self._patience.after(one.peer.peer_id, rows, failed, attempt=attempt)
        failure = failed.error.failure
        gone = failure is CallFailure.INPUTS_GONE
        if blame and not gone:
            outlook.blame(one.peer, CallKind.BACKWARD, rows, failed)
        tried |= _at(one)
        others = [] if gone else self._others(one, tried)
        left_s = self._deadline_s - self._caller.now_s()
        move = after_backward(
            failure, attempt=attempt, left_s=left_s, policy=outlook.policy, replica=bool(others),
            usable=outlook.askable(one.peer.peer_id),
        )  # fmt: skip
        if not gone:
            self._report(one, failed, move.value)
        match move:
            case Move.GIVE_UP:
                return []
            case Move.ELSEWHERE:
                self._caller.stats.failovers += 1
                self._caller.stats.retries += len(others)
                parts = await asyncio.gather(*(self._deliver(o, attempt + 1, tried, resend=True) for o in others))
                return [reply for part in parts for reply in part]
            case Move.RESEND | Move.AGAIN:
                self._caller.stats.retries += 1
                if move is Move.AGAIN:
                    await asyncio.sleep(
                        pause_s(
                            attempt=attempt, left_s=min(left_s, again_s), policy=outlook.policy,
                            queue_s=failed.error.queue_s,
                        )
                    )  # fmt: skip
                return await self._deliver(one, attempt + 1, tried - _at(one), resend=gone)

    def _report(self, one: Answered, failed: Failed, action: str) -> None:
        pairs = int(one.ran_P.sum())
        self._caller.outlook.report(
            one.peer, CallKind.BACKWARD, failed, action=action, layer=one.call.layer, pairs=pairs
        )

    def _note_hedge(self, one: Answered, waited_s: float, won: bool) -> None:
        if not won:  # the first answer came after all: nothing went wrong
            return
        self._caller.stats.hedges_won += 1
        self._caller.outlook.event(
            FaultEvent(
                what="backward_overdue", peer=one.peer.peer_id, layer=one.call.layer, cost_s=waited_s,
                pairs=int(one.ran_P.sum()), action="hedge_won",
            )
        )  # fmt: skip


def _at(one: Answered) -> Tried:
    """The call's experts at its peer."""
    return frozenset((e, one.peer.peer_id) for e in one.shipment.experts)
