"""Which replica runs which expert's rows. Pure and deterministic.

Every server that a layer uses costs one call, and every token's row is sent once to each server that hosts any of
its experts: so few servers that cover all experts. That is set cover; the greedy choice is within a factor
1 + ln(E) of the fewest (Chvatal, 1979). It goes by experts and not by rows: these change with every batch, and replicas
that take turns learn apart (two of four servers with half the experts each: 0.8 % more loss).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from moe_net.placement.view import View
from moe_net.types import ExpertId


def select(
    view: View,
    layer: int,
    expert_counts: Mapping[int, int],
    *,
    salt: str = "",
    max_rows: int | None = None,
    spared: Collection[str] = (),
    tried: Collection[tuple[int, str]] = (),
    turn: int = 0,
) -> dict[int, str]:
    """Expert index -> peer id, for every wanted expert of `layer` that has a replica in `view`.

    `expert_counts` has the rows of each wanted expert (those with none are left out). Server by server, the one
    that can take the most experts is chosen; `salt` (say, the trainer's name) decides between equals, so that
    trainers spread over equal replicas and one trainer keeps to its own. With `max_rows`, a server that has got so
    many rows takes another expert only if that has no other replica. Peers in `spared` (slow, or with a full queue)
    get only those experts that nobody else in `view` hosts; an expert in `tried` is not given to that peer again.
    `turn` 1, 2, ... takes the next of several equals, for callers that share their rows out among them.
    """
    open_replicas: dict[int, set[str]] = {}
    for index, rows in expert_counts.items():
        replicas = {p for p in view.replicas(ExpertId(layer, index)) if (index, p) not in tried} if rows > 0 else None
        if replicas:
            open_replicas[index] = replicas.difference(spared) or replicas
    hosted: dict[str, set[int]] = {}
    for index, replicas in open_replicas.items():
        for peer_id in replicas:
            hosted.setdefault(peer_id, set()).add(index)
    spread = {peer_id: _mix(salt, peer_id) for peer_id in hosted}
    chosen: dict[int, str] = {}
    while open_replicas:
        most = max(len(indices) for indices in hosted.values())
        equals = sorted((spread[p], p) for p, indices in hosted.items() if len(indices) == most)
        best = equals[turn % len(equals)][1]
        taken = _fill(hosted[best], open_replicas, expert_counts, max_rows)
        for index in taken:
            chosen[index] = best
            for peer_id in open_replicas.pop(index):
                hosted[peer_id].discard(index)
        # What it leaves goes to others.
        for index in hosted.pop(best):
            open_replicas[index].discard(best)
    return dict(sorted(chosen.items()))


def _fill(
    offered: set[int], open_replicas: Mapping[int, set[str]], expert_counts: Mapping[int, int], max_rows: int | None
) -> list[int]:
    if max_rows is None:
        return sorted(offered)
    taken: list[int] = []
    rows = 0
    # First what only this server can run, then the largest.
    for index in sorted(offered, key=lambda i: (len(open_replicas[i]) > 1, -expert_counts[i], i)):
        if len(open_replicas[index]) == 1 or not taken or rows + expert_counts[index] <= max_rows:
            taken.append(index)
            rows += expert_counts[index]
    return taken


def _mix(salt: str, peer_id: str) -> bytes:
    return hashlib.blake2b(peer_id.encode(), key=hashlib.sha256(salt.encode()).digest(), digest_size=8).digest()
