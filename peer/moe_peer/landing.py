"""The calls of a server whose experts are on a GPU: their rows go there before, and the answers' come back after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_net.errors import ExpertCallError, WireError
from moe_net.experts.host import ExpertHost
from moe_net.wire.matrices import Matrices
from moe_net.wire.messages import BackwardAnswer, BackwardCall, ForwardAnswer, ForwardCall, RoutedRows


class LandedCalls:
    """`forward_many` and `backward_many` of a host, for what `Matrices.read` has read; what they return is there.

    Also when they raise nothing is on its way any more: the messages' memory goes to others then.
    """

    def __init__(self, host: ExpertHost, matrices: Matrices) -> None:
        self._host = host
        self._matrices = matrices

    def forward_many(self, calls: Sequence[ForwardCall]) -> list[ForwardAnswer | ExpertCallError | WireError]:
        """As `ExpertHost.forward_many`."""
        try:
            answers = self._host.forward_many([replace(call, rows=self._landed(call.rows)) for call in calls])
            return [self._shipped_forward(a) if isinstance(a, ForwardAnswer) else a for a in answers]
        finally:
            self._matrices.finish()

    def backward_many(self, calls: Sequence[BackwardCall]) -> list[BackwardAnswer | ExpertCallError | WireError]:
        """As `ExpertHost.backward_many`."""
        try:
            answers = self._host.backward_many([self._landed_backward(call) for call in calls])
            return [self._shipped_backward(a) if isinstance(a, BackwardAnswer) else a for a in answers]
        finally:
            self._matrices.finish()

    def _landed_backward(self, call: BackwardCall) -> BackwardCall:
        rows = None if call.rows is None else self._landed(call.rows)
        return replace(call, grad_RD=self._matrices.land(call.grad_RD), rows=rows)

    def _landed(self, rows: RoutedRows) -> RoutedRows:
        return replace(rows, x_RD=self._matrices.land(rows.x_RD))

    def _shipped_forward(self, answer: ForwardAnswer) -> ForwardAnswer:
        return replace(answer, y_RD=self._matrices.ship(answer.y_RD, answer.encoding))

    def _shipped_backward(self, answer: BackwardAnswer) -> BackwardAnswer:
        return replace(answer, dx_RD=self._matrices.ship(answer.dx_RD, answer.encoding))
