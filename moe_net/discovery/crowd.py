"""Which of the directory's records a reader makes peers of, so that a look at it costs what the run can use.

A record of 137 bytes may claim thousands of experts, and a key for a new one costs nothing. So ranges stay ranges
until they have been cut down to the run's experts, and the peers of a view and what they claim together are limited.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from moe_net.discovery.record import Record
from moe_net.types import ExpertId, PeerInfo

MAX_PEERS = 4096
"""Peers of one view; four times the swarm that `benchmarks/discovery.py` measures."""
MAX_CLAIMS = 2**18
"""Pairs of a peer and an expert in one view: 64 replicas of each of 4096 experts. A view takes about 0.2 s then."""


class RunExperts:
    """The experts that a run has, to pick from them those that a record's ranges name."""

    def __init__(self, experts: Iterable[ExpertId]) -> None:
        layers: dict[int, list[ExpertId]] = {}
        for expert in sorted(set(experts)):
            layers.setdefault(expert.layer, []).append(expert)
        self._layers = {layer: ([e.index for e in ids], tuple(ids)) for layer, ids in layers.items()}

    def count(self, ranges: Iterable[tuple[int, int, int]]) -> int:
        """How many of the run's experts the ranges (layer, first index, count) name."""
        return sum(end - start for _, start, end in self._slices(ranges))

    def pick(self, ranges: Iterable[tuple[int, int, int]]) -> tuple[ExpertId, ...]:
        """Those of the run's experts that the ranges name, ascending as they are; always the same objects."""
        return tuple(e for ids, start, end in self._slices(ranges) for e in ids[start:end])

    def _slices(self, ranges: Iterable[tuple[int, int, int]]) -> Iterable[tuple[tuple[ExpertId, ...], int, int]]:
        for layer, first, count in ranges:
            indices, ids = self._layers.get(layer, ((), ()))
            yield ids, bisect_left(indices, first), bisect_left(indices, first + count)


class Crowd:
    """Makes peers of records for one reader."""

    def __init__(self) -> None:
        # Nobody can make a peer id that comes early at every reader, and at one reader the choice does not change.
        self._secret = os.urandom(16)

    def peers(self, records: Sequence[Record], experts: RunExperts | None) -> tuple[list[PeerInfo], int]:
        """Peers with those of `experts` that they claim, sorted by peer id, and how many were left out as too many.

        Who has none of them is no peer and not counted. None: the run's experts are not known yet, and whatever is
        claimed counts. When there are too many, those that claim little come first.
        """
        counts = [sum(n for _, _, n in r.ranges) if experts is None else experts.count(r.ranges) for r in records]
        useful = [(n, r) for n, r in zip(counts, records, strict=True) if n > 0 or experts is None]
        chosen = useful
        if len(useful) > MAX_PEERS or sum(n for n, _ in useful) > MAX_CLAIMS:
            chosen, room = [], MAX_CLAIMS
            for n, record in sorted(useful, key=lambda claim: (claim[0], self._place(claim[1].peer_id))):
                if len(chosen) == MAX_PEERS or n > room:
                    break
                chosen.append((n, record))
                room -= n
        peers = [r.peer_info(r.experts if experts is None else experts.pick(r.ranges)) for _, r in chosen]
        return sorted(peers, key=lambda peer: peer.peer_id), len(useful) - len(chosen)

    def _place(self, peer_id: str) -> bytes:
        return hashlib.blake2b(peer_id.encode(), key=self._secret, digest_size=8).digest()
