"""Structured events: every fault that somebody notices is one, with what was done about it and what it cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultEvent:
    """Something that went wrong and was dealt with."""

    what: str
    """`forward_failed`, `backward_failed`, `commit_failed`, `fetch_failed`, `peer_suspended`,
    `no_live_experts`, `experts_carried_over`, `checkpoint_damaged`, `checkpoint_incomplete`,
    `experts_differ`, `stale_gradient`."""
    peer: str = ""
    """Peer id, when one peer is concerned."""
    layer: int = -1
    """MoE layer, when one is concerned."""
    action: str = ""
    """What was done: `elsewhere`, `again`, `resend`, `give_up`, `masked`, ..."""
    cost_s: float = 0.0
    """Time lost to it."""
    pairs: int = 0
    """(token, expert) pairs concerned."""
    detail: str = ""
    """In words."""


EventSink = Callable[[FaultEvent], None]


def ignore(event: FaultEvent) -> None:
    """An EventSink that forgets."""
