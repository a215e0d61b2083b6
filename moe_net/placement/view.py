"""An immutable snapshot of who hosts what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from moe_net.types import ExpertId, PeerInfo


class View:
    """Peers and, for each expert, its replicas. Never changes: `without` makes another one."""

    __slots__ = ("_peers", "_replicas")

    def __init__(self, peers: Iterable[PeerInfo] = ()) -> None:
        """Of two records of one peer the one with the larger sequence counts."""
        newest: dict[str, PeerInfo] = {}
        for peer in peers:
            known = newest.get(peer.peer_id)
            if known is None or known.sequence < peer.sequence:
                newest[peer.peer_id] = peer
        ordered = {peer_id: newest[peer_id] for peer_id in sorted(newest)}
        replicas: dict[ExpertId, list[str]] = {}
        for peer_id, peer in ordered.items():
            for expert in set(peer.experts):
                replicas.setdefault(expert, []).append(peer_id)
        self._peers = MappingProxyType(ordered)
        self._replicas = {expert: tuple(peer_ids) for expert, peer_ids in replicas.items()}

    @property
    def peers(self) -> Mapping[str, PeerInfo]:
        """Peer id -> what is known of it, ascending by peer id."""
        return self._peers

    @property
    def experts(self) -> frozenset[ExpertId]:
        """Every expert with at least one replica."""
        return frozenset(self._replicas)

    def replicas(self, expert: ExpertId) -> tuple[str, ...]:
        """Peer ids that host `expert`, ascending; empty when nobody does."""
        return self._replicas.get(expert, ())

    def live(self, layer: int, n_experts: int) -> tuple[bool, ...]:
        """For each of the layer's experts 0..n_experts-1, whether it has a replica."""
        return tuple(ExpertId(layer, index) in self._replicas for index in range(n_experts))

    def without(self, peer_ids: Iterable[str]) -> View:
        """The view as if these peers were not there; itself when it knows none of them."""
        gone = set(peer_ids) & self._peers.keys()
        if not gone:
            return self
        view = View.__new__(View)
        view._peers = MappingProxyType({p: peer for p, peer in self._peers.items() if p not in gone})
        # Only the experts of the peers that go: this runs for every call of a trainer that avoids a peer.
        replicas = dict(self._replicas)
        for peer_id in gone:
            for expert in set(self._peers[peer_id].experts):
                left = tuple(p for p in replicas[expert] if p != peer_id)
                if left:
                    replicas[expert] = left
                else:
                    del replicas[expert]
        view._replicas = replicas
        return view

    def __eq__(self, other: object) -> bool:
        return isinstance(other, View) and self._peers == other._peers

    def __hash__(self) -> int:
        return hash(tuple(self._peers.values()))

    def __repr__(self) -> str:
        return f"View({len(self._peers)} peers, {len(self._replicas)} experts)"
