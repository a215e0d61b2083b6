"""Which peers to leave alone. Pure: (state, event, now) -> state; times are of one monotonic clock.

A circuit breaker for each peer. It is *fine* until it fails too often in a row (a call that was late counts at once:
it has cost a whole deadline), then *suspended*: no rows go there, and a probe is due. Only a probe that is answered
makes the peer usable again: no step ever waits to find out whether somebody is back. The first probe is due at once:
who only lost a few calls is back after one round trip. Then the peer is *on probation*: usable, but suspended for
longer each time, until it answers a call after as long as the next suspension would be.

Nor may it be late again soon, however well it behaves in between: what its failures cost is a small share of the time
that it is left alone, or watched, for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """How long a failing peer is left alone."""

    failures_to_suspend: int = 4
    """Failures in a row before a peer is suspended: as many as a call has attempts."""
    backoff_s: float = 0.5
    """From a suspension's failed first probe, or from a second suspension, to the next probe."""
    backoff_factor: float = 2.0
    """Each further wait is longer by this, until the peer has stood its probation."""
    max_backoff_s: float = 30.0
    """Longest of these waits."""
    cost_factor: float = 5.0
    """So many times as long as callers waited for a failing peer its probation lasts at least, and each suspension but
    the first. Without that one who stalled for a deadline of 2 s, and answered for 1.1 s, took 64 % of a run's time."""
    at_once: frozenset[str] = frozenset({"late"})
    """Failures that suspend without a second one."""
    harmless: frozenset[str] = frozenset({"busy", "inputs_gone", "stale_step"})
    """Failures that say nothing against the peer: it answered, and would answer other calls."""

    def __post_init__(self) -> None:
        if self.failures_to_suspend < 1:
            raise ValueError("failures_to_suspend must be at least 1")
        if self.cost_factor < 0:
            raise ValueError("cost_factor must be at least 0")
        if not (0 < self.backoff_s <= self.max_backoff_s and self.backoff_factor >= 1):
            raise ValueError("needs 0 < backoff_s <= max_backoff_s and backoff_factor >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSucceeded:
    """A peer answered a call with rows, or a commit."""

    peer_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFailed:
    """A call to a peer brought no answer."""

    peer_id: str
    failure: str = ""
    """A `CallFailure` value; see `HealthConfig`."""
    waited_s: float = 0.0
    """By its caller, for nothing; 0 when it may be the caller's own fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSucceeded:
    """A suspended peer answered a probe."""

    peer_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeFailed:
    """A suspended peer did not answer a probe."""

    peer_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerGone:
    """The directory knows the peer no more: forget it."""

    peer_id: str


HealthEvent = CallSucceeded | CallFailed | ProbeSucceeded | ProbeFailed | PeerGone


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerHealth:
    """Of a peer that is not simply fine."""

    failures: int = 0
    """In a row."""
    cost_s: float = 0.0
    """What those made callers wait; of a suspended one, those that led to it."""
    suspensions: int = 0
    """Since it was last fine."""
    suspended: bool = False
    late: bool = False
    """It was suspended because a call was late: asking it costs a deadline. Others that fail do so at once."""
    probe_due_s: float = float("-inf")
    """While suspended: when to ask it again."""
    fine_at_s: float = float("inf")
    """On probation: the first call it answers after this ends that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthState:
    """Health of every peer that is not simply fine."""

    peers: Mapping[str, PeerHealth] = field(default_factory=lambda: MappingProxyType[str, PeerHealth]({}))


def after_event(state: HealthState, event: HealthEvent, now_s: float, config: HealthConfig) -> HealthState:
    """The state after `event`; the same object when nothing changes."""
    known = state.peers.get(event.peer_id)
    match event:
        case PeerGone():
            return state if known is None else _with(state, event.peer_id, None)
        case CallFailed():
            # Calls that were on their way when the first of them failed fail too, and are no further evidence.
            if event.failure in config.harmless or (known is not None and known.suspended):
                return state
            return _with(state, event.peer_id, _failed(known or PeerHealth(), event, now_s, config))
        case CallSucceeded():
            # An answer that was on its way when the peer was suspended is older than the reason for that.
            if known is None or known.suspended:
                return state
            fine = known.suspensions == 0 or now_s >= known.fine_at_s
            return _with(state, event.peer_id, None if fine else replace(known, failures=0, cost_s=0.0))
        case ProbeSucceeded():
            if known is None or not known.suspended:
                return state
            watched_s = max(backoff_s(known.suspensions, config), config.cost_factor * known.cost_s)
            on_probation = replace(known, failures=0, cost_s=0.0, suspended=False, fine_at_s=now_s + watched_s)
            return _with(state, event.peer_id, on_probation)
        case ProbeFailed():
            if known is None or not known.suspended:
                return state
            # It costs nobody anything to wait for a probe.
            return _with(state, event.peer_id, _suspended(known, now_s, config, late=known.late, least_s=0.0))


def _failed(known: PeerHealth, failed: CallFailed, now_s: float, config: HealthConfig) -> PeerHealth:
    known = replace(known, failures=known.failures + 1, cost_s=known.cost_s + failed.waited_s)
    late = failed.failure in config.at_once
    if late or known.failures >= config.failures_to_suspend:
        least_s = config.cost_factor * known.cost_s if known.suspensions else 0.0
        return _suspended(known, now_s, config, late=late, least_s=least_s)
    return known


def _suspended(known: PeerHealth, now_s: float, config: HealthConfig, *, late: bool, least_s: float) -> PeerHealth:
    return PeerHealth(
        failures=known.failures,
        cost_s=known.cost_s,
        late=late,
        suspensions=known.suspensions + 1,
        suspended=True,
        probe_due_s=now_s + max(backoff_s(known.suspensions, config), least_s),
    )


def backoff_s(suspensions_before: int, config: HealthConfig) -> float:
    """From the suspension (or failed probe) that follows `suspensions_before` others to the probe; 0 for the first."""
    if suspensions_before < 1:
        return 0.0
    length_s = config.backoff_s
    # Not a power: that overflows for a peer that has been failing for days.
    for _ in range(suspensions_before - 1):
        if length_s >= config.max_backoff_s or config.backoff_factor == 1:
            break
        length_s *= config.backoff_factor
    return min(length_s, config.max_backoff_s)


def usable(state: HealthState, peer_id: str) -> bool:
    """Whether rows may go to the peer."""
    known = state.peers.get(peer_id)
    return known is None or not known.suspended


def costs_a_deadline(state: HealthState, peer_id: str) -> bool:
    """Whether the peer is suspended for being late: a call there would most likely wait in vain."""
    known = state.peers.get(peer_id)
    return known is not None and known.suspended and known.late


def probe_due_s(state: HealthState, peer_id: str) -> float | None:
    """When a suspended peer may be asked whether it is back; None for one that is usable."""
    known = state.peers.get(peer_id)
    return known.probe_due_s if known is not None and known.suspended else None


def _with(state: HealthState, peer_id: str, health: PeerHealth | None) -> HealthState:
    peers = {p: h for p, h in state.peers.items() if p != peer_id}
    if health is not None:
        peers[peer_id] = health
    return HealthState(peers=MappingProxyType(peers))
