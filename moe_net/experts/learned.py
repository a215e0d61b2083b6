"""What the experts of one bank have learned and from whom, and the steps that they make with their replicas."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from moe_net.experts.calls import Batch
from moe_net.experts.lineage import Lineage
from moe_net.experts.update import StackedAdamW
from moe_net.kernels.types import WeightGrads
from moe_net.wire.share import ExpertShare


class Learned:
    """Owned by one bank."""

    def __init__(self, indices: Sequence[int], origin: int) -> None:
        self._indices = tuple(indices)
        self._slot_of = {index: slot for slot, index in enumerate(indices)}
        self._origin = origin
        self.lineages = [Lineage(own=origin)] * len(indices)
        self.clock = 0
        """Steps of the run that are known to be over."""
        # Pairs (row, expert) that were ever stepped on here.
        self._stepped_rows_E = torch.zeros(len(indices), dtype=torch.int64)

    def take_over(self, slot: int, lineage: Tensor | None) -> None:
        """The expert's weights are those of a state that has learned this."""
        said = Lineage.from_tensor(lineage, own=self._origin)
        if self._origin:
            said = said.capped(self._origin, int(self._stepped_rows_E[slot]))
        self.lineages[slot] = said

    def shares(self, batch: Batch, grads: WeightGrads, indices: Collection[int]) -> dict[int, ExpertShare]:
        """See `ExpertBank.shares`."""
        shares: dict[int, ExpertShare] = {}
        for slot, filled in enumerate(batch.filled_E):
            if not filled or self._indices[slot] not in indices:
                continue
            g_in, g_out = (
                torch.clone(grad[slot].float(), memory_format=torch.contiguous_format).cpu() for grad in grads
            )
            if bool(g_in.isfinite().all()) and bool(g_out.isfinite().all()):
                shares[self._indices[slot]] = ExpertShare(
                    rows=batch.rows_E[slot], rows_before=int(self._stepped_rows_E[slot]), g_in=g_in, g_out=g_out
                )
        return shares

    def step(
        self,
        optimizer: StackedAdamW,
        batch: Batch,
        grads: WeightGrads,
        shares: Mapping[int, Mapping[int, ExpertShare]],
        clock: int,
        *,
        broken: Collection[int],
    ) -> None:
        """See `ExpertBank.step`; not of `broken` experts."""
        self.clock = max(self.clock, min(clock, max(optimizer.versions) + 1))
        parts_of = {self._slot_of[index]: parts for index, parts in shares.items()}
        if parts_of:
            grads = WeightGrads(*(grad.float() for grad in grads))
        for slot, parts in parts_of.items():
            self._add_shares(grads, batch.filled_E[slot], slot, parts)
        # Those that a replica has brought to this step already have nothing to make up for.
        still = {
            slot
            for slot, version in enumerate(optimizer.versions)
            if (version >= self.clock and not batch.filled_E[slot] and not parts_of.get(slot))
            or self._indices[slot] in broken
        }
        # Not of an expert whose sum was not finite: it has learned nothing from those rows.
        for slot in optimizer.step(batch.tokens, grads, still=still, latest=self.clock):
            self._stepped_rows_E[slot] += batch.rows_E[slot]
            version, lineage = optimizer.versions[slot], self.lineages[slot]
            lineage = lineage.plus(self._origin, batch.rows_E[slot], version)
            for origin, share in parts_of.get(slot, {}).items():
                # A lineage says how many of an origin's rows, from its first: not so if we lack some before these.
                if lineage.rows_of(origin) == share.rows_before:
                    lineage = lineage.plus(origin, share.rows, version)
            self.lineages[slot] = lineage

    def _add_shares(self, grads: WeightGrads, filled: bool, slot: int, parts: Mapping[int, ExpertShare]) -> None:
        """In the order of origins, ours among them: addition of floats is not associative."""
        for which, own in enumerate(grads):
            terms = {origin: (share.g_in, share.g_out)[which] for origin, share in parts.items()}
            if filled:
                terms[self._origin] = own[slot].clone()
            own[slot].zero_()
            for _, term in sorted(terms.items(), key=lambda one: one[0]):
                own[slot].add_(term.to(own.device))
