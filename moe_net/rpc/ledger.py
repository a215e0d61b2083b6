"""What a trainer owes its peers: commits in order, and which calls are to be voided with them. No I/O, no clock.

Gradients must not reach a peer before the commits of earlier steps have: its experts would divide them by those steps'
tokens. So a peer that has missed a commit gets no rows until it has heard of it; nothing is lost by that.
"""

from __future__ import annotations

from collections.abc import Collection

from moe_net.types import PeerInfo
from moe_net.wire.messages import CommitCall

MAX_OWED = 64
"""Commits kept for one peer. Of more, those in the middle go: they came with no gradient, so nothing depends on them
but the number of the peer's steps."""
MAX_DEBTORS = 1024
"""Peers that have left and still are owed something; of more, the first go."""


class Ledger:
    """Owned by one swarm."""

    def __init__(self, trainer: str) -> None:
        self._trainer = trainer
        self._owed: dict[str, list[CommitCall]] = {}
        self._sent_to: dict[str, PeerInfo] = {}
        self._unused: dict[str, dict[bytes, None]] = {}

    @property
    def owing(self) -> Collection[str]:
        """Peers that have not heard of a commit yet."""
        return self._owed.keys()

    def sent(self, peer: PeerInfo, call_id: bytes) -> None:
        """A gradient of this step goes there; unless its answer is `used`, it must not count there."""
        self._sent_to[peer.peer_id] = peer
        self._unused.setdefault(peer.peer_id, {})[call_id] = None

    def used(self, peer_id: str, call_id: bytes) -> None:
        """The gradient was acknowledged, and the trainer goes on with that answer."""
        self._unused.get(peer_id, {}).pop(call_id, None)

    def close_step(self, step: int, tokens: int, peers: Collection[PeerInfo]) -> dict[str, PeerInfo]:
        """The step is complete: `peers`, and all that were sent a gradient, are owed the commit. Returns those."""
        concerned = {peer.peer_id: peer for peer in peers} | self._sent_to
        for peer_id in concerned:
            void = tuple(self._unused.pop(peer_id, ()))
            owed = self._owed.setdefault(peer_id, [])
            owed.append(CommitCall(trainer=self._trainer, step=step, tokens=tokens, void=void))
            if len(owed) > MAX_OWED:
                del owed[MAX_OWED // 2]
        self._sent_to.clear()
        self._unused.clear()
        for peer_id in list(self._owed)[: max(0, len(self._owed) - len(concerned) - MAX_DEBTORS)]:
            if peer_id not in concerned:
                del self._owed[peer_id]
        return concerned

    def next_commit(self, peer_id: str) -> CommitCall | None:
        """The first that the peer has not heard of; None when it knows all."""
        owed = self._owed.get(peer_id)
        return owed[0] if owed else None

    def heard(self, peer_id: str, commit: CommitCall) -> None:
        """The peer knows of `commit` (or will never take it)."""
        owed = self._owed.get(peer_id, [])
        if commit in owed:
            owed.remove(commit)
        if not owed:
            self._owed.pop(peer_id, None)
