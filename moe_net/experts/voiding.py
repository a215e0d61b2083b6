"""Voided gradients out of the sums of a host's banks, by its journal.

Sums are made anew when they are looked at next, and not at each void: whoever added one row and voided it, again and
again, had all trainers' gradients of the step added anew each time, ten seconds for two tiny calls. Until then the sums
of such a layer are stale: they hold what was voided. What is added meanwhile goes into them for nothing, and into the
journal, whose order makes the same sums to the bit whenever it is replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moe_net.experts.bank import ExpertBank
from moe_net.experts.callbook import CallFacts
from moe_net.experts.journal import Entry, Journal
from moe_net.experts.merging import Part, merge
from moe_net.wire.messages import RoutedRows

log = logging.getLogger(__name__)

READING_S, READING_SHARE = 5.0, 0.1
"""Of replays for those who only want to read the sums: as many seconds at first, and a tenth of the time after that.
Whoever adds one row, voids it and fetches, again and again, had 60 calls of 1024 rows added anew each time: 8 s."""


class MakePart(Protocol):
    """`ExpertHost._part`."""

    def __call__(self, position: int, facts: CallFacts, rows: RoutedRows) -> Part: ...


class Voiding:
    """Owned by one host, and used by its thread."""

    def __init__(
        self,
        banks: Mapping[int, ExpertBank],
        journal: Journal[RoutedRows, Tensor],
        part: MakePart,
        clock_s: Callable[[], float],
    ) -> None:
        self._banks = banks
        self._journal = journal
        self._part = part
        self._clock_s = clock_s
        self._reading_s = READING_S
        self._read_s = clock_s()
        self.stale: set[int] = set()
        """Layers whose sums still hold what was voided."""

    def take_out(self, void: Sequence[tuple[bytes, CallFacts]]) -> int:
        """Make the gradient sums what they would be without these calls; how many could not be taken out."""
        undo, n_gone = self._journal.void(void)
        for layer, plan in undo.items():
            bank = self._banks[layer]
            if plan.replay:  # once, when they are looked at
                self.stale.add(layer)
            if plan.subtract or plan.make_up:
                self.renew((layer,))
            for entry in plan.subtract:
                bank.subtract(*self._merged([entry]))
            for entry in plan.make_up:
                bank.make_up(*self._merged([entry]))
        if void:
            log.info(
                "took %d calls of %r out again, which went to other replicas; %d more are gone",
                len(void) - n_gone, void[0][1].trainer, n_gone,
            )  # fmt: skip
        return n_gone

    def trim(self) -> None:
        """After calls were added: the journal lets go of what is too much, once no replay needs it."""
        self.renew(self._journal.overfull())
        self._journal.trim()

    def renew(self, layers: Collection[int] | None = None) -> None:
        """The stale sums of these layers, or of all, are what they would be without what was voided. To be called
        before anybody looks at them, and before the layer's weights change."""
        for layer in sorted(self.stale if layers is None else self.stale.intersection(layers)):
            bank = self._banks[layer]
            bank.clear_grads()
            for together in self._journal.replay(layer):
                bank.backward(*self._merged(together), None)
            self.stale.discard(layer)

    def renew_to_read(self, layer: int) -> None:
        """As `renew`, for somebody who fetches the sums; if there has been too much of that, they stay as they are,
        with what was voided in them."""
        if layer not in self.stale:
            return
        began_s = self._clock_s()
        self._reading_s = min(READING_S, self._reading_s + READING_SHARE * (began_s - self._read_s))
        self._read_s = began_s
        if self._reading_s <= 0:
            log.info("layer %d was fetched with what was voided since its sums were made", layer)
            return
        self.renew((layer,))
        self._banks[layer].settle()
        self._banks[layer].finish()
        self._reading_s -= self._clock_s() - began_s

    def _merged(self, entries: Sequence[Entry[RoutedRows, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(grad, x, slots, gates) as in the dispatch that added them."""
        merged = merge([self._part(i, entry.facts, entry.inputs) for i, entry in enumerate(entries)])
        grads = [entry.grad for entry in entries]
        grad_RD = grads[0] if len(grads) == 1 else torch.cat(grads)
        return grad_RD, merged.x_RD, merged.slot_RK, merged.gate_RK
