"""The calls of a server whose experts are on a GPU: their rows go there before, or of a call alone as the experts take
them in, and the answers' come back after."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import Tensor

from moe_net.errors import ExpertCallError, WireError
from moe_net.experts.host import ExpertHost
from moe_net.types import Encoding
from moe_net.wire.matrices import Arrival, Matrices
from moe_net.wire.messages import BackwardAnswer, BackwardCall, ForwardAnswer, ForwardCall
from moe_peer.device import Later

Answers = list[ForwardAnswer | ExpertCallError | WireError] | list[BackwardAnswer | ExpertCallError | WireError]


class _OnTheirWay(Later[Answers]):
    """Answers that a GPU has been asked for, and the calls whose memory it may still read."""

    def __init__(self, calls: Sequence[ForwardCall | BackwardCall], answers: Answers, arrival: Arrival) -> None:
        self._calls, self._answers, self._arrival = calls, answers, arrival

    def ready(self) -> bool:
        return self._arrival.query()

    def result(self) -> Answers:
        self._arrival.synchronize()
        return self._answers


class LandedCalls:
    """`forward_many` and `backward_many` of a host, for what `Matrices.read` has read.

    They return before the GPU is done. When they raise nothing is on its way any more: the messages' memory goes to
    others then.
    """

    def __init__(self, host: ExpertHost, matrices: Matrices) -> None:
        self._host = host
        self._matrices = matrices

    def forward_many(self, calls: Sequence[ForwardCall]) -> Later[Answers]:
        """As `ExpertHost.forward_many`."""
        with self._waiting_if_it_fails():
            alone = len(calls) == 1
            answers = self._host.forward_many([self._landed_forward(call, alone=alone) for call in calls])
            shipped = [self._shipped_forward(a) if isinstance(a, ForwardAnswer) else a for a in answers]
            return _OnTheirWay(calls, shipped, self._matrices.arrival())

    def backward_many(self, calls: Sequence[BackwardCall]) -> Later[Answers]:
        """As `ExpertHost.backward_many`."""
        with self._waiting_if_it_fails():
            alone = len(calls) == 1
            answers = self._host.backward_many([self._landed_backward(call, alone=alone) for call in calls])
            shipped = [self._shipped_backward(a) if isinstance(a, BackwardAnswer) else a for a in answers]
            return _OnTheirWay(calls, shipped, self._matrices.arrival())

    @contextmanager
    def _waiting_if_it_fails(self) -> Generator[None]:
        with ExitStack() as stack:
            stack.callback(lambda: self._matrices.arrival().synchronize())
            yield
            stack.pop_all()

    def _landed_forward(self, call: ForwardCall, *, alone: bool) -> ForwardCall:
        x_RD = self._landed(call.rows.x_RD, call.reply_encoding, alone=alone)
        return replace(call, rows=replace(call.rows, x_RD=x_RD))

    def _landed_backward(self, call: BackwardCall, *, alone: bool) -> BackwardCall:
        rows = None if call.rows is None else replace(call.rows, x_RD=self._matrices.land(call.rows.x_RD))
        return replace(call, grad_RD=self._landed(call.grad_RD, call.reply_encoding, alone=alone), rows=rows)

    def _landed(self, x_RD: Tensor, reply: Encoding, *, alone: bool) -> Tensor:
        return self._matrices.land_later(x_RD, reply) if alone else self._matrices.land(x_RD)

    def _shipped_forward(self, answer: ForwardAnswer) -> ForwardAnswer:
        return replace(answer, y_RD=self._matrices.ship(answer.y_RD, answer.encoding))

    def _shipped_backward(self, answer: BackwardAnswer) -> BackwardAnswer:
        return replace(answer, dx_RD=self._matrices.ship(answer.dx_RD, answer.encoding))
