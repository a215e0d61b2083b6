"""One call to one peer, measured: counters, latency, health. What forward, backward and commit have in common."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from moe_net.errors import WireError
from moe_net.rpc.base import CallError, CallFailure, ExpertTransport, Failed
from moe_net.rpc.outlook import CallKind, Outlook
from moe_net.types import Encoding, PeerInfo
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitAnswer, CommitCall, ForwardAnswer, ForwardCall
from moe_net.wire.validate import check_plausible

AnswerT = TypeVar("AnswerT")


@dataclass(slots=True)
class SwarmStats:
    """Counters since the start; a trainer reports differences."""

    calls: int = 0
    """Forward, Backward and Commit calls that were sent, probes not counted."""
    retries: int = 0
    """Of those, not the first for their rows."""
    hedges: int = 0
    """Of those, sent only because another replica was late."""
    hedges_won: int = 0
    """Times that the hedge answered first."""
    failovers: int = 0
    """Shipments that another replica took over, forward or backward."""
    rows: int = 0
    """Rows sent forward."""
    routed_pairs: int = 0
    """(token, expert) pairs the router asked for."""
    dropped_pairs: int = 0
    """Pairs without an answer in forward."""
    lost_gradient_pairs: int = 0
    """Pairs that ran forward but whose gradient could not be delivered, or did not count."""
    staleness_sum: int = 0
    """Steps an expert made between a call's forward and its backward, summed over calls and experts."""
    staleness_max: int = 0
    staleness_count: int = 0


class Caller:
    """Owned by one swarm, used on its loop."""

    def __init__(self, *, trainer: str, transport: ExpertTransport, outlook: Outlook, encoding: Encoding) -> None:
        self.trainer = trainer
        self.outlook = outlook
        self.encoding = encoding
        self.stats = SwarmStats()
        self._transport = transport

    def now_s(self) -> float:
        return self.outlook.clock_s()

    async def forward(
        self, peer: PeerInfo, call: ForwardCall, *, timeout_s: float, hedge: bool = False
    ) -> ForwardAnswer | Failed:
        rows = call.rows.x_RD.shape[0]
        self.stats.rows += rows
        started_s = self._begin(hedge)
        answer = await self._ask(self._transport.forward(peer, call, timeout_s=timeout_s), started_s)
        if isinstance(answer, Failed):
            return answer
        useless = _nothing_ran(peer, call, answer) or _implausible(peer, call.rows.x_RD, y=answer.y_RD)
        if useless:
            return Failed(error=useless, waited_s=self.now_s() - started_s)
        self._answered(peer, CallKind.FORWARD, rows, started_s, answer)
        return answer

    async def backward(
        self, peer: PeerInfo, call: BackwardCall, *, timeout_s: float, hedge: bool = False
    ) -> BackwardAnswer | Failed:
        started_s = self._begin(hedge)
        answer = await self._ask(self._transport.backward(peer, call, timeout_s=timeout_s), started_s)
        if isinstance(answer, Failed):
            if call.rows is not None and answer.error.failure is CallFailure.INPUTS_GONE:
                # Held against nobody, and asked again at once: whoever says it to inputs would lose us all gradients.
                error = CallError(CallFailure.REFUSED, peer.peer_id, "asked for the inputs that came with the call")
                return Failed(error=error, waited_s=answer.waited_s)
            return answer
        useless = _implausible(peer, call.grad_RD, dx=answer.dx_RD, gate_grad=answer.gate_grad_P)
        if useless:
            return Failed(error=useless, waited_s=self.now_s() - started_s)
        self._answered(peer, CallKind.BACKWARD, call.grad_RD.shape[0], started_s, answer)
        return answer

    async def commit(self, peer: PeerInfo, call: CommitCall, *, timeout_s: float) -> CommitAnswer | Failed:
        started_s = self._begin(hedge=False)
        answer = await self._ask(self._transport.commit(peer, call, timeout_s=timeout_s), started_s)
        if not isinstance(answer, Failed):
            self.outlook.answered(peer.peer_id, CallKind.COMMIT, 1, self.now_s() - started_s)
        return answer

    async def ping(self, peer: PeerInfo, *, timeout_s: float) -> bool:
        """Whether the peer answers at all; counts nowhere."""
        started_s = self.now_s()
        return not isinstance(await self._ask(self._transport.ping(peer, timeout_s=timeout_s), started_s), Failed)

    def _begin(self, hedge: bool) -> float:
        self.stats.calls += 1
        if hedge:
            self.stats.hedges += 1
        else:
            self.outlook.called()
        return self.now_s()

    async def _ask(self, answering: Awaitable[AnswerT], started_s: float) -> AnswerT | Failed:
        try:
            return await answering
        except CallError as error:
            return Failed(error=error, waited_s=self.now_s() - started_s)

    def _answered(
        self, peer: PeerInfo, kind: CallKind, rows: int, started_s: float, answer: ForwardAnswer | BackwardAnswer
    ) -> None:
        self.outlook.answered(
            peer.peer_id, kind, rows, self.now_s() - started_s, queue_us=answer.queue_us, compute_us=answer.compute_us
        )


def _nothing_ran(peer: PeerInfo, call: ForwardCall, answer: ForwardAnswer) -> CallError | None:
    """The error that an answer without any of the experts is."""
    if answer.failed_experts and set(call.rows.expert_index_P.tolist()) <= set(answer.failed_experts):
        return CallError(CallFailure.REFUSED, peer.peer_id, "could run none of the experts")
    return None


def _implausible(peer: PeerInfo, sent: Tensor, **values: Tensor) -> CallError | None:
    """What is wrong with an answer of absurd values: they would end the training as if it had diverged by itself."""
    try:
        for name, value in values.items():
            check_plausible(value, name, sent=sent)
    except WireError as error:
        return CallError(CallFailure.REFUSED, peer.peer_id, f"implausible answer: {error}")
    return None
