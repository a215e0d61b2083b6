"""Structured events: every fault that somebody notices is one, with what was done about it and what it cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultEvent:
    """Something that went wrong and was dealt with."""

    what: str
    """`forward_failed`, `backward_failed`, `commit_failed`, `fetch_failed`: a call brought no answer;
    `forward_overdue`, `backward_overdue`: it was late, and another replica, asked as well, was faster (no fault);
    `peer_suspended`, `peer_back`, `peer_unlisted` (the directory has lost it, and it still answers);
    `no_live_experts`, `stale_gradient`, `experts_differ`, `experts_carried_over`, `checkpoint_damaged`,
    `checkpoint_incomplete`, `checkpoint_failed`."""
    peer: str = ""
    """Peer id, when one peer is concerned."""
    layer: int = -1
    """MoE layer, when one is concerned."""
    action: str = ""
    """What was done: `elsewhere`, `again`, `resend`, `give_up`, `hedge_won`, `masked`, ..."""
    cost_s: float = 0.0
    """Time lost to it."""
    pairs: int = 0
    """(token, expert) pairs concerned."""
    detail: str = ""
    """In words."""


EventSink = Callable[[FaultEvent], None]


def ignore(event: FaultEvent) -> None:
    """An EventSink that forgets."""
