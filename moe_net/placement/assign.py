"""Which experts a joining peer should host. Pure and deterministic."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from moe_net.placement.view import View
from moe_net.types import ExpertId


def assign(all_experts: Iterable[ExpertId], view: View, capacity: int, peer_id: str) -> tuple[ExpertId, ...]:
    """The `capacity` experts with the fewest replicas among the other peers of `view`, ascending.

    Ties are broken by rendezvous hashing (Thaler and Ravishankar, 1998) of peer and expert: peers that join at the
    same moment and see the same view choose differently, and a peer that restarts chooses alike. ValueError for a
    negative capacity.
    """
    if capacity < 0:
        raise ValueError(f"capacity={capacity} must not be negative")
    others = view.without([peer_id])
    wanted = sorted(set(all_experts), key=lambda e: (len(others.replicas(e)), _mix(peer_id, e), e))
    return tuple(sorted(wanted[:capacity]))


def _mix(peer_id: str, expert: ExpertId) -> bytes:
    return hashlib.blake2b(f"{peer_id}/{expert}".encode(), digest_size=8).digest()
