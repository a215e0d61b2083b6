"""How long a peer may hold up one layer's pass by other words than an answer."""

from __future__ import annotations

from moe_net.rpc.base import CallError, CallFailure, Failed
from moe_net.rpc.outlook import CallKind, Outlook

PASSING = (CallFailure.BUSY, CallFailure.UNREACHABLE)
"""Failures after which the same peer may be asked again."""


class Patience:
    """Of one pass. Whoever is busy for as long as one call may take, or at each attempt, has cost what one that says
    nothing costs, and is treated like that: four such answers held up a layer for 17 s, and again in each step.

    Only the time until a peer takes the call counts: what a full queue lets in then has the whole deadline of a call.
    """

    def __init__(self, outlook: Outlook, kind: CallKind) -> None:
        self._outlook = outlook
        self._kind = kind
        self._asked_s: dict[str, float] = {}

    def after(self, peer_id: str, rows: int, failed: Failed, *, attempt: int) -> tuple[float, Failed]:
        """(how long the peer may still be asked, the failure): `failed`, or LATE when that time is over, or it was busy
        at the last `attempt` as well."""
        if failed.error.failure not in PASSING:
            return float("inf"), failed
        now_s = self._outlook.clock_s()
        asked_before = peer_id in self._asked_s
        since_s = self._asked_s.setdefault(peer_id, now_s - failed.waited_s)
        left_s = since_s + self._outlook.late_after_s(peer_id, self._kind, rows) - now_s
        last = attempt >= self._outlook.policy.attempts and failed.error.failure is CallFailure.BUSY
        if left_s > 0 and not (last and asked_before):
            return left_s, failed
        waited_s = now_s - since_s
        detail = f"{failed.error.failure.value} for {waited_s:.1f} s: {failed.error.detail}"
        return 0.0, Failed(error=CallError(CallFailure.LATE, peer_id, detail), waited_s=waited_s)
