"""What a trainer owes its peers: commits in order, which name the calls that count. No I/O, no clock.

Gradients must not reach a peer before the commits of earlier steps have: its experts would divide them by those steps'
tokens. So a peer that has missed a commit gets no rows until it has heard of it; nothing is lost by that.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from moe_net.types import PeerInfo
from moe_net.wire.messages import CommitAnswer, CommitCall

MAX_OWED = 64
"""Commits kept for one peer. Of more, those in the middle go: they came with no gradient, so nothing depends on them
but the number of the peer's steps."""
MAX_DEBTORS = 1024
"""Peers that have left and still are owed something; of more, the first go."""


@dataclass(frozen=True, slots=True)
class Used:
    """A call whose Backward's answer the trainer goes on with."""

    order: tuple[int, int]
    """Where it stands among the step's calls to its peer. Gradients are added in this order, so it must not depend on
    what came first."""
    pairs: int
    """(token, expert) pairs whose gradients are in it."""


@dataclass(frozen=True, slots=True, eq=False)
class Owed:
    """A commit that a peer has not heard of."""

    commit: CommitCall
    calls: dict[bytes, Used] = field(default_factory=dict[bytes, Used])

    def lost_pairs(self, answer: CommitAnswer) -> tuple[int, int]:
        """Pairs that did not count: whose calls were not there any more, whose gradients were left out."""
        missing, not_finite = (
            sum(self.calls[call_id].pairs for call_id in set(call_ids) if call_id in self.calls)
            for call_ids in (answer.missing, answer.not_finite)
        )
        return missing, not_finite


class Ledger:
    """Owned by one swarm."""

    def __init__(self, trainer: str) -> None:
        self._trainer = trainer
        self._owed: dict[str, list[Owed]] = {}
        self._asked: dict[str, PeerInfo] = {}
        self._used: dict[str, dict[bytes, Used]] = {}

    @property
    def owing(self) -> Collection[str]:
        """Peers that have not heard of a commit yet."""
        return self._owed.keys()

    def used(self, peer: PeerInfo, call_id: bytes, call: Used) -> None:
        """The call counts with this step's commit."""
        self._asked[peer.peer_id] = peer
        self._used.setdefault(peer.peer_id, {})[call_id] = call

    def close_step(self, step: int, tokens: int, peers: Collection[PeerInfo]) -> dict[str, PeerInfo]:
        """The step is complete: `peers`, and all that have calls of it, are owed the commit. Returns those."""
        concerned = {peer.peer_id: peer for peer in peers} | self._asked
        for peer_id in concerned:
            calls = dict(sorted(self._used.pop(peer_id, {}).items(), key=lambda item: (item[1].order, item[0])))
            owed = self._owed.setdefault(peer_id, [])
            commit = CommitCall(trainer=self._trainer, step=step, tokens=tokens, calls=tuple(calls))
            owed.append(Owed(commit, calls))
            if len(owed) > MAX_OWED:
                del owed[MAX_OWED // 2]
        self._asked.clear()
        self._used.clear()
        for peer_id in list(self._owed)[: max(0, len(self._owed) - len(concerned) - MAX_DEBTORS)]:
            if peer_id not in concerned:
                del self._owed[peer_id]
        return concerned

    def next_commit(self, peer_id: str) -> Owed | None:
        """The first that the peer has not heard of; None when it knows all."""
        owed = self._owed.get(peer_id)
        return owed[0] if owed else None

    def heard(self, peer_id: str, owed: Owed) -> None:
        """The peer knows of that commit (or will never take it)."""
        left = self._owed.get(peer_id, [])
        if owed in left:
            left.remove(owed)
        if not left:
            self._owed.pop(peer_id, None)
