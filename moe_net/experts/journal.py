"""Which gradients stand in the experts' sums, so that one can be taken out again.

A trainer that could not learn whether a peer had added a gradient sends it to another replica, and its Commit asks the
first peer to void it. Taking it out must leave the sums as if it had never come, bit for bit. Floating-point addition
cannot be undone, so the sums are made anew: from zero, from the calls written down here, in their order, without it.
That needs every call since the layer's last step, at the weights of that time; weights change in a step (which empties
the sums) and when replicas average. When it is done, voiding.py says.

Pure bookkeeping like callbook.py: `InputsT` and `GradT` are whatever the host wants kept; it says how many bytes.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Generic, TypeVar

from moe_net.experts.callbook import ENTRY_OVERHEAD_BYTES, CallFacts

InputsT = TypeVar("InputsT")
GradT = TypeVar("GradT")
_Key = tuple[str, int, bytes]
"""Trainer, step and call id: an id may come again once its step is committed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry(Generic[InputsT, GradT]):
    """One call whose gradient was added."""

    facts: CallFacts
    inputs: InputsT
    grad: GradT
    n_bytes: int
    dispatch: int
    """Calls of one number were added together: rows of one matrix product."""
    n_steps: int
    """That the layer had closed before."""


@dataclass(slots=True)
class Undo(Generic[InputsT, GradT]):
    """What to do with the sums of one layer: `replay` first, then `subtract` and `make_up`."""

    replay: bool = False
    """Empty the sums, then add again what `Journal.replay` says; at once, or after more was added or voided, but before
    `trim` lets go of calls of the layer and before its weights change."""
    subtract: list[Entry[InputsT, GradT]] = field(default_factory=list["Entry[InputsT, GradT]"])
    """Add the backward of the negated gradient. Equal to never having come up to rounding, if the weights are still
    those it was added at; otherwise up to what the weights have moved since."""
    make_up: list[Entry[InputsT, GradT]] = field(default_factory=list["Entry[InputsT, GradT]"])
    """As `subtract`, of calls that stood in the sums of a step which is over: their rows are not among those of now."""


class Journal(Generic[InputsT, GradT]):
    """See the module's text. Not thread-safe: the device's thread owns it."""

    def __init__(self, *, limit_bytes: int) -> None:
        """`limit_bytes` bounds everything kept here; the oldest calls go first."""
        self._limit_bytes = limit_bytes
        self._fresh: OrderedDict[_Key, Entry[InputsT, GradT]] = OrderedDict()
        """Added at the weights of now, in the order of adding."""
        self._past: OrderedDict[_Key, Entry[InputsT, GradT]] = OrderedDict()
        """Added at other weights; the trainer has not committed them, so it may still void them."""
        self._huge: list[_Key] = []
        """Which would not fit alone, until the next `trim`."""
        self._incomplete: set[int] = set()
        """Layers whose sums hold more (or less) than `_fresh` says, until their next step."""
        self._n_steps: defaultdict[int, int] = defaultdict(int)
        """That each layer has closed."""
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._fresh) + len(self._past)

    def add(
        self, call_id: bytes, facts: CallFacts, inputs: InputsT, grad: GradT, n_bytes: int, *, dispatch: int
    ) -> None:
        """Write down a call whose gradient was added, or is before anybody looks at the sums. All of a dispatch, then
        `trim`."""
        entry = Entry(
            facts=facts, inputs=inputs, grad=grad, n_bytes=n_bytes + ENTRY_OVERHEAD_BYTES, dispatch=dispatch,
            n_steps=self._n_steps[facts.layer],
        )  # fmt: skip
        key = (facts.trainer, facts.step, call_id)
        self._fresh[key] = entry
        self.n_bytes += entry.n_bytes
        if entry.n_bytes > self._limit_bytes:
            self._huge.append(key)

    def overfull(self) -> set[int]:
        """Layers that can be replayed no more after the next `trim`."""
        return {self._fresh[key].facts.layer for key in self._leaving() if key in self._fresh}

    def trim(self) -> None:
        """Let go of what is over the limit."""
        for key in self._leaving():
            if key in self._fresh:
                self._incomplete.add(self._fresh[key].facts.layer)
            self._pop(key)
        self._huge.clear()

    def _leaving(self) -> list[_Key]:
        if self.n_bytes <= self._limit_bytes:
            return []
        # Of what does not fit alone: nobody else has to go for it.
        leaving = [key for key in self._huge if key in self._fresh]
        over_bytes = self.n_bytes - self._limit_bytes - sum(self._fresh[key].n_bytes for key in leaving)
        # What was added at other weights cannot be replayed anyway.
        for key, entry in chain(self._past.items(), self._fresh.items()):
            if over_bytes <= 0:
                break
            if key not in self._huge:
                leaving.append(key)
                over_bytes -= entry.n_bytes
        return leaving

    def replay(self, layer: int) -> list[list[Entry[InputsT, GradT]]]:
        """What the layer's sums consist of, dispatch by dispatch."""
        left = (entry for entry in self._fresh.values() if entry.facts.layer == layer)
        return [list(together) for _, together in groupby(left, lambda entry: entry.dispatch)]

    def void(self, calls: Iterable[tuple[bytes, CallFacts]]) -> tuple[dict[int, Undo[InputsT, GradT]], int]:
        """(what to do, by layer; how many of `calls` are not here any more). The calls leave the journal."""
        undo: dict[int, Undo[InputsT, GradT]] = {}
        n_gone = 0
        for call_id, facts in calls:
            key = (facts.trainer, facts.step, call_id)
            fresh = key in self._fresh
            entry = self._pop(key)
            if entry is None:
                n_gone += 1
                continue
            layer = undo.setdefault(facts.layer, Undo())
            if entry.n_steps < self._n_steps[facts.layer]:
                layer.make_up.append(entry)
            elif fresh and facts.layer not in self._incomplete:
                layer.replay = True
            else:
                layer.subtract.append(entry)
        for number, layer in undo.items():
            if layer.subtract or layer.make_up:
                # No entry stands for what is subtracted: a later replay would bring it back.
                self._incomplete.add(number)
        return undo, n_gone

    def committed(self, trainer: str, step: int) -> None:
        """The trainer can void nothing up to `step` any more."""
        for key in [k for k in self._past if k[0] == trainer and k[1] <= step]:
            self._pop(key)

    def stepped(self, layer: int, last_committed_step: Callable[[str], int]) -> None:
        """The layer's sums are empty and its weights are others."""
        self.weights_changed(layer, last_committed_step)
        self._incomplete.discard(layer)
        self._n_steps[layer] += 1

    def weights_changed(self, layer: int, last_committed_step: Callable[[str], int]) -> None:
        """The layer's sums are what they were, but its weights are others: no replay before the next step."""
        # At most limit_bytes / 1 KiB entries, as in CallBook.commit.
        moved = [k for k, entry in self._fresh.items() if entry.facts.layer == layer]
        for key in moved:
            entry = self._fresh.pop(key)
            if entry.facts.step > last_committed_step(entry.facts.trainer):
                self._past[key] = entry
            else:
                self.n_bytes -= entry.n_bytes
        if moved:  # of empty sums nothing can be missing
            self._incomplete.add(layer)

    def forget(self, layer: int) -> None:
        """The layer's experts are others, and some of their sums are empty: none of this is in them."""
        for key in [k for kept in (self._fresh, self._past) for k, e in kept.items() if e.facts.layer == layer]:
            self._pop(key)
        self._incomplete.add(layer)

    def _pop(self, key: _Key) -> Entry[InputsT, GradT] | None:
        entry = self._fresh.pop(key, None) or self._past.pop(key, None)
        if entry is not None:
            self.n_bytes -= entry.n_bytes
        return entry
