"""Two replicas of an expert become one again: the arithmetic of their meeting. Pure: no clock, no I/O.

A state is that of `ExpertBank.state`: tensors on the CPU by name (see `wire.state`), here of one layer's experts.
The weight of a side is the number of rows that it has learned, itself or through others, and the other side has not: so
a state that has seen all that another has simply takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_net.experts.lineage import Lineage
from moe_net.wire.state import LINEAGE_FIELD, STATE_FIELDS, split_name, tensor_name

State = Mapping[str, Tensor]

WEIGHTS, SECOND_MOMENTS = ("w_in", "w_out"), ("v_in", "v_out")


def lineage_of(state: State, expert: str, *, own: int = 0) -> Lineage:
    """Of `expert`, a name like `3.17`, in the state of the replica whose origin is `own`."""
    return Lineage.from_tensor(state.get(tensor_name(expert, LINEAGE_FIELD)), own=own)


def share_of_other(mine: Lineage, theirs: Lineage, my_version: int, their_version: int) -> float:
    """How much of the mean is theirs, 0 to 1. When both have learned the same: half at equal versions, otherwise all of
    whoever has made more steps (the other one was away)."""
    my_rows, their_rows = mine.unseen_by(theirs), theirs.unseen_by(mine)
    if my_rows + their_rows > 0:
        return their_rows / (my_rows + their_rows)
    if my_version == their_version:
        return 0.5
    return float(their_version > my_version)


def average(mine: State, theirs: State, *, own: int = 0) -> dict[str, Tensor]:
    """The weighted mean of weights and both moments, the larger version, and what both have seen. Both states are of
    the same experts; `own` is our origin.

    A side with the whole weight is taken over bit for bit. A mean of second moments is never negative.
    """
    mean: dict[str, Tensor] = {}
    for expert in experts_of(mine):
        lineages = lineage_of(mine, expert, own=own), lineage_of(theirs, expert)
        version = tensor_name(expert, "version")
        versions = int(mine[version]), int(theirs[version])
        share = share_of_other(*lineages, *versions)
        for field in STATE_FIELDS[:-1]:
            name = tensor_name(expert, field)
            # lerp is exact at 0 and 1 by the formula it takes on either side of a half.
            mean[name] = torch.lerp(mine[name], theirs[name], share)
        mean[version] = torch.tensor(max(versions))
        _put_lineage(mean, expert, lineages[0].merged(lineages[1]))
    return mean


def experts_of(state: State) -> list[str]:
    """The names, like `3.17`, of the experts in `state`."""
    return [expert for expert, field in map(split_name, state) if field == "version"]


def _put_lineage(state: dict[str, Tensor], expert: str, lineage: Lineage) -> None:
    if lineage.seen:
        state[tensor_name(expert, LINEAGE_FIELD)] = lineage.to_tensor()


def rebase(mean: State, now: State, sent: State, *, own: int = 0) -> dict[str, Tensor]:
    """`mean` and what happened to us meanwhile: mean + (now - sent), field by field; the larger version, and what both
    have seen. When the mean has seen all of it (the other side made the same steps, with our rows), just the mean; and
    just our own state where the mean is what we sent.

    Second moments stay above their decay of the same time: the difference alone could take one to 0 where the other
    side's was small, and the next step would divide by that.
    """
    moved: dict[str, Tensor] = {}
    for expert in experts_of(mean):
        theirs, ours = lineage_of(mean, expert), lineage_of(now, expert, own=own)
        version = tensor_name(expert, "version")
        contained = ours.unseen_by(theirs) == 0 and int(now[version]) <= int(mean[version])
        for field in STATE_FIELDS[:-1]:
            name = tensor_name(expert, field)
            if contained:
                moved[name] = mean[name]
            elif torch.equal(mean[name], sent[name]):
                moved[name] = now[name]
            else:
                moved[name] = mean[name] + (now[name] - sent[name])
                if field in SECOND_MOMENTS:
                    decay = torch.where(sent[name] > 0, now[name] / sent[name], 1.0).clamp_(max=1.0)
                    moved[name] = torch.maximum(moved[name], mean[name] * decay)
        # Not a sum either: what we have stepped meanwhile, the other side may have as well.
        moved[version] = torch.maximum(mean[version], now[version])
        _put_lineage(moved, expert, ours.merged(theirs))
    return moved


def divergence(mine: State, theirs: State) -> float:
    """Relative L2 distance of the weights, the largest of all experts: |a - b| / sqrt((|a|^2 + |b|^2) / 2)."""
    largest = 0.0
    for expert in experts_of(mine):
        apart, size = 0.0, 0.0
        for field in WEIGHTS:
            name = tensor_name(expert, field)
            a, b = mine[name].double(), theirs[name].double()
            apart += float((a - b).square().sum())
            size += float(a.square().sum() + b.square().sum()) / 2
        if apart > 0:
            largest = max(largest, math.sqrt(apart / size))
    return largest
