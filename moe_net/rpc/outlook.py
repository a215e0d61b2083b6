"""What one trainer knows of its peers: who may be called, how long to wait, whom to spare. State around pure functions.

The decisions are in `placement.health`, `placement.latency` and `rpc.policy`; here their states live, with the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from enum import StrEnum

from moe_net.placement.health import (
    CallFailed,
    CallSucceeded,
    HealthConfig,
    HealthEvent,
    HealthState,
    PeerGone,
    ProbeSucceeded,
    after_event,
    costs_a_deadline,
    probe_due_s,
    usable,
)
from moe_net.placement.latency import (
    LatencyConfig,
    LatencyState,
    Sample,
    Split,
    after_sample,
    late_after_s,
    overdue_after_s,
    slowness,
    split,
    without_peer,
)
from moe_net.placement.view import View
from moe_net.rpc.base import CallFailure, Failed
from moe_net.rpc.policy import CallPolicy, HedgeBudget
from moe_net.trace import EventSink, FaultEvent, ignore
from moe_net.types import PeerInfo


class CallKind(StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"
    COMMIT = "commit"


SLOW_FACTOR = 4.0
"""A peer with this many times the typical latency is spared where another replica can serve."""
CATCH_UP_S = 5.0
"""Replicas meet every 2 s (`moe-peer serve --exchange-every-s`): so long, and as long again after a longer absence."""
SILENCE_S = 120.0
"""A peer that the directory lists no more counts as there for so long after its last answer; commits ask every step."""
RECHECK_FACTOR = 64
"""It is tried again once its last sample is this many of its own latencies old: that costs at most 1/64 of the time."""


class Outlook:
    """Owned by one swarm, used on its loop."""

    def __init__(
        self,
        *,
        policy: CallPolicy,
        health: HealthConfig | None = None,
        latency: LatencyConfig | None = None,
        clock_s: Callable[[], float] = time.monotonic,
        on_event: EventSink = ignore,
        on_suspended: Callable[[str], None] = lambda peer_id: None,
    ) -> None:
        """`on_suspended`: called with a peer that is usable no more."""
        self.policy = policy
        self.clock_s = clock_s
        self.event = on_event
        self._health_config = health or HealthConfig()
        self._health = HealthState()
        self._latency_config = latency or LatencyConfig()
        self._latency = LatencyState()
        self._busy_until_s: dict[str, float] = {}
        self._answered_s: dict[str, float] = {}
        self._catching_up_until_s: dict[str, float] = {}
        self._filtered: tuple[View, frozenset[str], View] | None = None
        self._on_suspended = on_suspended
        self._budgets = {
            kind: HedgeBudget(fraction=policy.hedge_fraction, burst=policy.hedge_burst)
            for kind in (CallKind.FORWARD, CallKind.BACKWARD)
        }
        self.longest_deadline_s = 0.0
        """The longest that any call was given since somebody reset this."""

    # Who may be called ------------------------------------------------------------------------------------

    def usable(self, peer_id: str) -> bool:
        return usable(self._health, peer_id)

    def askable(self, peer_id: str) -> bool:
        """Whether a call there, if it must be there, would at least fail soon: it is not suspended for being late."""
        return not costs_a_deadline(self._health, peer_id)

    def alive(self, peer_id: str) -> bool:
        """Whether it answers our calls: usable, and its last answer is not long ago."""
        return self.usable(peer_id) and self.clock_s() < self._answered_s.get(peer_id, float("-inf")) + SILENCE_S

    def probe_due_s(self, peer_id: str) -> float | None:
        """When to ask a suspended peer whether it is back; None for one that is usable."""
        return probe_due_s(self._health, peer_id)

    def filtered(self, view: View, owing: Collection[str] = ()) -> View:
        """`view` without the peers that are suspended, and without `owing`."""
        gone = frozenset(p for p in view.peers if p in owing or not self.usable(p))
        known = self._filtered  # read once: other threads ask, too
        if known is None or known[0] is not view or known[1] != gone:
            # Every call of a trainer asks, and without a peer of a thousand experts a view takes 0.75 ms to make.
            known = self._filtered = (view, gone, view.without(gone))
        return known[2]

    def spared(self, view: View) -> frozenset[str]:
        """Peers that should get rows only where no other replica can serve: with a full queue, slow just now, or back
        after some time with experts that have missed what others learned."""
        now_s = self.clock_s()
        held_up = (*self._busy_until_s.items(), *self._catching_up_until_s.items())
        busy = {p for p, until_s in held_up if now_s < until_s}
        kind, slow = CallKind.FORWARD, set[str]()
        for peer_id, factor in slowness(self._latency, kind, self._latency_config).items():
            track = self._latency.track(peer_id, kind)
            if factor > SLOW_FACTOR and now_s < track.last_s + RECHECK_FACTOR * track.median_s:
                slow.add(peer_id)
        return frozenset((busy | slow) & view.peers.keys())

    def slowness(self) -> dict[str, float]:
        """Peer id -> its forward latency over the typical peer's, as far as known."""
        return slowness(self._latency, CallKind.FORWARD, self._latency_config)

    def split(self, peer_id: str, kind: CallKind = CallKind.FORWARD) -> Split:
        """Where the time of calls to this peer goes."""
        return split(self._latency.track(peer_id, kind))

    def forget(self, known: Collection[str]) -> None:
        """Forget the peers that are not `known` any more."""
        for peer_id in [p for p in self._health.peers if p not in known]:
            self.note(PeerGone(peer_id=peer_id))
        for peer_id in {p for p, _ in self._latency.tracks} - set(known):
            self._latency = without_peer(self._latency, peer_id)
        self._busy_until_s = {p: s for p, s in self._busy_until_s.items() if p in known}
        self._answered_s = {p: s for p, s in self._answered_s.items() if p in known}
        self._catching_up_until_s = {p: s for p, s in self._catching_up_until_s.items() if p in known}

    # How long to wait -------------------------------------------------------------------------------------

    def late_after_s(self, peer_id: str, kind: CallKind, rows: int) -> float:
        """The deadline of one call."""
        caps_s = {
            CallKind.FORWARD: self.policy.forward_timeout_s,
            CallKind.BACKWARD: self.policy.backward_timeout_s,
            CallKind.COMMIT: self.policy.commit_timeout_s,
        }
        deadline_s = late_after_s(
            self._latency, peer_id, kind, rows, self._latency_config,
            floor_s=self.policy.min_timeout_s, cap_s=caps_s[kind],
        )  # fmt: skip
        self.longest_deadline_s = max(self.longest_deadline_s, deadline_s)
        return deadline_s

    def overdue_after_s(self, peer_id: str, kind: CallKind, rows: int) -> float | None:
        """When not to wait any longer without asking another replica; None: never (too little is known, or the extra
        load is at its cap)."""
        budget = self._budgets.get(kind)
        if budget is not None and not budget.allows:
            return None
        return overdue_after_s(self._latency, peer_id, kind, rows, self._latency_config)

    def take_hedge(self, kind: CallKind, calls: int) -> bool:
        """Whether so many extra calls may be sent now; they are counted if so."""
        if not self._budgets[kind].allows:
            return False
        self._budgets[kind] = self._budgets[kind].after_hedge(calls)
        return True

    # What happened ----------------------------------------------------------------------------------------

    def note(self, event: HealthEvent) -> None:
        self._health = after_event(self._health, event, self.clock_s(), self._health_config)

    def called(self) -> None:
        """A call was sent that is no hedge."""
        self._budgets = {kind: budget.after_call() for kind, budget in self._budgets.items()}

    def answered(
        self, peer_id: str, kind: CallKind, rows: int, total_s: float, *, queue_us: int = 0, compute_us: int = 0
    ) -> None:
        """A call was answered after `total_s`."""
        self.note(CallSucceeded(peer_id=peer_id))
        self._busy_until_s.pop(peer_id, None)
        self._answered_s[peer_id] = self.clock_s()
        self._sample(
            peer_id, kind, Sample(total_s=total_s, rows=rows, queue_s=queue_us / 1e6, compute_s=compute_us / 1e6)
        )

    def back(self, peer_id: str, *, away_s: float) -> None:
        """A suspended peer answers again, after `away_s`. What its experts have missed, other replicas have learned:
        these go on being asked until it has had the time to take it over from them."""
        self.note(ProbeSucceeded(peer_id=peer_id))
        if away_s > self.policy.min_timeout_s:
            self._catching_up_until_s[peer_id] = self.clock_s() + min(away_s, CATCH_UP_S) + CATCH_UP_S

    def overtaken(self, peer_id: str, kind: CallKind, rows: int, waited_s: float) -> None:
        """A call was cancelled after `waited_s`, because another replica had answered it: that is no failure, but as
        slow as this the peer is at least."""
        self._sample(peer_id, kind, Sample(total_s=waited_s, rows=rows))

    def blame(self, peer: PeerInfo, kind: CallKind, rows: int, failed: Failed) -> None:
        """A call brought no answer: what follows for the peer. `report` it once it is known what was done about it."""
        error = failed.error
        if error.failure is CallFailure.LATE:
            self._sample(peer.peer_id, kind, Sample(total_s=failed.waited_s, rows=rows, answered=False))
        if error.failure is CallFailure.BUSY:
            pause_s = error.queue_s or self.policy.retry_pause_s
            self._busy_until_s[peer.peer_id] = self.clock_s() + pause_s
        before = self.usable(peer.peer_id)
        # When nobody else has answered meanwhile it may be our own connection that is to blame.
        began_s = self.clock_s() - failed.waited_s
        it_alone = any(s > began_s for p, s in self._answered_s.items() if p != peer.peer_id)
        waited_s = failed.waited_s if it_alone else 0.0
        self.note(CallFailed(peer_id=peer.peer_id, failure=error.failure.value, waited_s=waited_s))
        if before and not self.usable(peer.peer_id):
            detail = f"its {len(peer.experts)} experts are masked until it answers a probe"
            self.event(FaultEvent(what="peer_suspended", peer=peer.peer_id, action="masked", detail=detail))
            self._on_suspended(peer.peer_id)

    def report(
        self, peer: PeerInfo, kind: CallKind, failed: Failed, *, action: str, layer: int = -1, pairs: int = 0
    ) -> None:
        """Tell the event sink of a call that brought no answer, and what was done."""
        self.event(
            FaultEvent(
                what=f"{kind}_failed", peer=peer.peer_id, layer=layer, action=action, cost_s=failed.waited_s,
                pairs=pairs, detail=failed.error.detail,
            )
        )  # fmt: skip

    def _sample(self, peer_id: str, kind: CallKind, sample: Sample) -> None:
        self._latency = after_sample(self._latency, peer_id, kind, sample, self.clock_s(), self._latency_config)
