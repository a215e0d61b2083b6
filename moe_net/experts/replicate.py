"""Two replicas of an expert become one again: the arithmetic of their meeting (DESIGN D9). Pure: no clock, no I/O.

A state is that of `ExpertBank.state`: `{layer}.{index}.{field}` -> tensor on the CPU, here of one layer's experts.
The weight of a side is the number of rows whose gradients it has stepped on since these two last met.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Rows = Mapping[int, int]
"""Expert index -> rows."""

WEIGHTS, SECOND_MOMENTS = ("w_in", "w_out"), ("v_in", "v_out")


def share_of_other(my_rows: int, their_rows: int, my_version: int, their_version: int) -> float:
    """How much of the mean is theirs, 0 to 1. When neither has learned anything since: half at equal versions,
    otherwise all of whoever has made more steps (the other one was away)."""
    if my_rows + their_rows > 0:
        return their_rows / (my_rows + their_rows)
    if my_version == their_version:
        return 0.5
    return float(their_version > my_version)


def average(mine: State, theirs: State, my_rows: Rows, their_rows: Rows) -> dict[str, Tensor]:
    """The weighted mean of weights and both moments, and the larger version. Both states are of the same experts.

    A side with the whole weight is taken over bit for bit. A mean of second moments is never negative.
    """
    mean: dict[str, Tensor] = {}
    for name, value in mine.items():
        expert, _, field = name.rpartition(".")
        index = int(expert.partition(".")[2])
        other = theirs[name]
        if field == "version":
            mean[name] = torch.maximum(value, other)
            continue
        versions = int(mine[f"{expert}.version"]), int(theirs[f"{expert}.version"])
        share = share_of_other(my_rows[index], their_rows[index], *versions)
        # lerp is exact at 0 and 1 by the formula it takes on either side of a half.
        mean[name] = torch.lerp(value, other, share)
    return mean


def rebase(mean: State, now: State, sent: State) -> dict[str, Tensor]:
    """`mean` and what happened to us meanwhile: mean + (now - sent), field by field.

    Second moments stay above their decay of the same time: the difference alone could take one to 0 where the other
    side's was small, and the next step would divide by that.
    """
    moved: dict[str, Tensor] = {}
    for name, value in mean.items():
        moved[name] = value + (now[name] - sent[name])
        if name.rpartition(".")[2] in SECOND_MOMENTS:
            decay = torch.where(sent[name] > 0, now[name] / sent[name], 1.0).clamp_(max=1.0)
            moved[name] = torch.maximum(moved[name], value * decay)
    return moved


def divergence(mine: State, theirs: State) -> float:
    """Relative L2 distance of the weights, the largest of all experts: |a - b| / sqrt((|a|^2 + |b|^2) / 2)."""
    largest = 0.0
    for expert in {name.rpartition(".")[0] for name in mine}:
        apart, size = 0.0, 0.0
        for field in WEIGHTS:
            a, b = mine[f"{expert}.{field}"].double(), theirs[f"{expert}.{field}"].double()
            apart += float((a - b).square().sum())
            size += float(a.square().sum() + b.square().sum()) / 2
        if apart > 0:
            largest = max(largest, math.sqrt(apart / size))
    return largest


class Meetings:
    """How many rows this peer's experts had stepped on when it last met each partner. Bounded: the partner not met for
    longest is forgotten, and counts as never met."""

    def __init__(self, *, max_partners: int = 256) -> None:
        self._max_partners = max_partners
        self._at: OrderedDict[str, dict[int, dict[int, int]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._at)

    def rows_since(self, partner: str, layer: int, stepped: Rows) -> dict[int, int]:
        """Of the experts in `stepped`, which has the counts of now; all of them if the two never met."""
        then = self._at.get(partner, {}).get(layer, {})
        return {index: rows - then.get(index, 0) for index, rows in stepped.items()}

    def met(self, partner: str, layer: int, stepped: Rows) -> None:
        """They met when the counts were `stepped`."""
        self._at.setdefault(partner, {}).setdefault(layer, {}).update(stepped)
        self._at.move_to_end(partner)
        while len(self._at) > self._max_partners:
            self._at.popitem(last=False)
