"""Which learning is in a replica's weights: a version vector of rows (Parker et al., 1983). Pure.

Every life of a peer is an origin: a random number, new at each start, for who starts again has lost what nobody took
over. Of each origin a state says how many of its rows it has taken in, counted from the first; so two states compare:
one that has seen all the other has, and more, is simply newer, however many peers it passed through. Naive counts of
one's own rows cannot tell: a replica that has learned nothing itself may carry a third one's learning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_net.wire.state import MAX_COUNT, MAX_ORIGINS


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one origin."""

    rows: int
    """(row, expert) pairs whose gradients are in, the first so many."""
    version: int
    """Of the expert when the last of them came in."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """What one expert's state has seen. At most MAX_ORIGINS origins: those that learned last. Older ones have long been
    in every replica, and `unseen_by` does not ask for what has been forgotten."""

    seen: Mapping[int, Seen] = field(default_factory=dict[int, Seen])
    own: int = field(default=0, compare=False)
    """The origin of who keeps this, which is never forgotten, whoever claims to have learned later: its next rows would
    count as its first, which others have seen long ago. 0: it has none."""

    def plus(self, origin: int, rows: int, version: int) -> Lineage:
        """After `rows` more of `origin`, at the step that led to `version`."""
        if rows <= 0:
            return self
        now = Seen(min(MAX_COUNT, self.rows_of(origin) + rows), version)
        return Lineage(_newest([*self.seen.items(), (origin, now)], self.own), self.own)

    def rows_of(self, origin: int) -> int:
        """How many of its rows are in."""
        known = self.seen.get(origin)
        return 0 if known is None else known.rows

    def merged(self, other: Lineage) -> Lineage:
        """What a mean of both has seen."""
        return Lineage(_newest([*self.seen.items(), *other.seen.items()], self.own), self.own)

    def unseen_by(self, other: Lineage) -> int:
        """Rows that are in here and not there; of those that learned last, our own too only if we are one of them: an
        idle replica's rows would count for ever against all who have long seen and forgotten them."""
        asked = _newest([*self.seen.items(), *other.seen.items()], 0)
        return sum(max(0, self.rows_of(origin) - other.rows_of(origin)) for origin in asked)

    def capped(self, origin: int, rows: int) -> Lineage:
        """With no more than `rows` of `origin`: who is that origin knows better than any stranger."""
        said = self.seen.get(origin)
        if said is None or said.rows <= rows:
            return self
        others = {o: s for o, s in self.seen.items() if o != origin}
        return Lineage(others | {origin: Seen(rows, said.version)} if rows > 0 else others, self.own)

    def to_tensor(self) -> Tensor:
        """int64 [origins, 3]: origin, rows, version."""
        entries = [(origin, s.rows, s.version) for origin, s in sorted(self.seen.items())]
        return torch.tensor(entries, dtype=torch.int64).reshape(len(entries), 3)

    @classmethod
    def from_tensor(cls, value: Tensor | None, *, own: int = 0) -> Lineage:
        """Of one that `wire.state.check_state` has passed; None: nothing seen."""
        if value is None:
            return cls(own=own)
        return cls({origin: Seen(rows, version) for origin, rows, version in value.tolist()}, own)


def _newest(entries: Iterable[tuple[int, Seen]], own: int) -> dict[int, Seen]:
    """Each origin once, with the most that is said of it; `own`, and those that learned last: MAX_ORIGINS in all."""
    most: dict[int, Seen] = {}
    for origin, seen in entries:
        known = most.get(origin)
        if known is not None:
            seen = Seen(max(known.rows, seen.rows), max(known.version, seen.version))
        most[origin] = seen
    if len(most) > MAX_ORIGINS:
        most = dict(
            sorted(most.items(), key=lambda entry: (entry[0] == own > 0, entry[1].version, entry[0]))[-MAX_ORIGINS:]
        )
    return most
