"""Which peers to avoid for a while. Pure: (state, event, now) -> state; times are of one monotonic clock.

A peer is *fine* until `failures_to_suspend` failures in a row, then *suspended* for a backoff, then on *probation*:
usable again, but one more failure suspends it at once for a longer time. A success makes it fine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """How long a failing peer is left alone."""

    failures_to_suspend: int = 1
    """Failures in a row before a peer that was fine is suspended."""
    backoff_s: float = 1.0
    """Length of the first suspension."""
    backoff_factor: float = 2.0
    """Each further suspension without a success in between is longer by this."""
    max_backoff_s: float = 60.0
    """Longest suspension."""
    probation_s: float = 120.0
    """A peer that had no failure for so long after its suspension ended is fine without a success."""
    harmless: frozenset[str] = frozenset({"busy", "inputs_gone", "stale_step"})
    """Failures that say nothing against the peer: it answered, and would answer other calls."""

    def __post_init__(self) -> None:
        if self.failures_to_suspend < 1:
            raise ValueError("failures_to_suspend must be at least 1")
        if not (0 < self.backoff_s <= self.max_backoff_s and self.backoff_factor >= 1 and self.probation_s >= 0):
            raise ValueError("needs 0 < backoff_s <= max_backoff_s, backoff_factor >= 1 and probation_s >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSucceeded:
    """A peer answered a call."""

    peer_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFailed:
    """A call to a peer brought no answer."""

    peer_id: str
    failure: str = ""
    """A `CallFailure` value; see `HealthConfig.harmless`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerGone:
    """The directory knows the peer no more: forget it."""

    peer_id: str


HealthEvent = CallSucceeded | CallFailed | PeerGone


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerHealth:
    """Of a peer that has failed since its last success."""

    failures: int
    """In a row, before the first suspension."""
    suspensions: int = 0
    """Without a success in between."""
    suspended_until_s: float = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthState:
    """Health of every peer that is not simply fine."""

    peers: Mapping[str, PeerHealth] = field(default_factory=lambda: MappingProxyType[str, PeerHealth]({}))


def after_event(state: HealthState, event: HealthEvent, now_s: float, config: HealthConfig) -> HealthState:
    """The state after `event`; the same object when nothing changes."""
    known = state.peers.get(event.peer_id)
    match event:
        case CallSucceeded() | PeerGone():
            return state if known is None else _with(state, event.peer_id, None)
        case CallFailed() if event.failure in config.harmless:
            return state
        case CallFailed():
            # Calls that were on their way when the first of them failed fail too, and are no further evidence.
            if known is not None and now_s < known.suspended_until_s:
                return state
            if known is not None and known.suspensions and now_s > known.suspended_until_s + config.probation_s:
                known = None
            return _with(state, event.peer_id, _failed_once_more(known, now_s, config))


def _failed_once_more(known: PeerHealth | None, now_s: float, config: HealthConfig) -> PeerHealth:
    failures = (known.failures if known else 0) + 1
    suspensions = known.suspensions if known else 0
    if suspensions == 0 and failures < config.failures_to_suspend:
        return PeerHealth(failures=failures)
    return PeerHealth(
        failures=failures,
        suspensions=suspensions + 1,
        suspended_until_s=now_s + backoff_s(suspensions, config),
    )


def backoff_s(suspensions_before: int, config: HealthConfig) -> float:
    """Length of the suspension that follows `suspensions_before` others."""
    length_s = config.backoff_s
    # Not a power: that overflows for a peer that has been failing for days.
    for _ in range(suspensions_before):
        if length_s >= config.max_backoff_s or config.backoff_factor == 1:
            break
        length_s *= config.backoff_factor
    return min(length_s, config.max_backoff_s)


def usable(state: HealthState, peer_id: str, now_s: float, config: HealthConfig) -> bool:
    """Whether to call the peer at `now_s`: it is not suspended."""
    known = state.peers.get(peer_id)
    return known is None or now_s >= known.suspended_until_s


def on_probation(state: HealthState, peer_id: str, now_s: float, config: HealthConfig) -> bool:
    """Whether the peer is usable, but one failure suspends it for longer than the last time."""
    known = state.peers.get(peer_id)
    if known is None or known.suspensions == 0:
        return False
    return known.suspended_until_s <= now_s <= known.suspended_until_s + config.probation_s


def _with(state: HealthState, peer_id: str, health: PeerHealth | None) -> HealthState:
    peers = {p: h for p, h in state.peers.items() if p != peer_id}
    if health is not None:
        peers[peer_id] = health
    return HealthState(peers=MappingProxyType(peers))
