# pyright: basic
"""(token, expert) pairs sorted by expert, by torch; `device.routing` does the same in one to three launches.

T tokens, K experts per token, P = T * K pairs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_net.kernels.types import WeightCall


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The pairs of a call, sorted by expert. Padding has no place.

    There may be fewer places than T * K (`graphed`). Entries past the last pair are somebody's all the same: what
    gathers by all P stays inside.
    """

    pair_P: Tensor
    """Position t * K + k of each sorted pair."""
    row_P: Tensor
    """Its token t."""
    place_P: Tensor
    """Where pair t * K + k went; -1 for padding."""
    end_E: Tensor
    """int32, where each expert's pairs end."""
    bound_B: Tensor
    """int32 [E + 1], 0 and these ends."""

    def tensors(self) -> tuple[Tensor, ...]:
        return self.pair_P, self.row_P, self.place_P, self.end_E, self.bound_B


class Merged(NamedTuple):
    """Calls as if they had been one: rows one after another, what belongs to pairs sorted by expert, and within an
    expert by call."""

    dy_TD: Tensor
    x_TD: Tensor
    n_choices: int
    routing: Routing
    a_PF: Tensor
    dh_PH: Tensor


def merge(calls: Sequence[WeightCall], n_experts: int, sort: Callable[[Tensor, int], Routing]) -> Merged:
    """The calls, whose work has one block each; `sort` as `sort_pairs`."""
    if len(calls) == 1:
        dy_TD, x_TD, ids_TK, work = calls[0]
        return Merged(dy_TD, x_TD, ids_TK.shape[1], work.routing, work.a[0], work.dh[0])
    most = max(call.expert_ids_TK.shape[1] for call in calls)
    ids, places, first = [], [], 0
    for call in calls:
        lacking = most - call.expert_ids_TK.shape[1]
        place_TK = call.work.routing.place_P.view(call.expert_ids_TK.shape)
        place_TK = torch.where(place_TK < 0, place_TK, place_TK + first)
        ids.append(torch.nn.functional.pad(call.expert_ids_TK, (0, lacking), value=-1))
        places.append(torch.nn.functional.pad(place_TK, (0, lacking), value=-1))
        first += call.work.a[0].shape[0]
    routing = sort(torch.cat(ids), n_experts)
    # What lies past the last pair is anybody's.
    place_P = torch.cat(places).view(-1).index_select(0, routing.pair_P).clamp_(min=0)
    return Merged(
        dy_TD=torch.cat([call.dy_TD for call in calls]),
        x_TD=torch.cat([call.x_TD for call in calls]),
        n_choices=most,
        routing=routing,
        a_PF=torch.cat([call.work.a[0] for call in calls]).index_select(0, place_P),
        dh_PH=torch.cat([call.work.dh[0] for call in calls]).index_select(0, place_P),
    )


def sort_pairs(expert_ids_TK: Tensor, n_experts: int) -> Routing:
    """Stable sort by expert; ids outside 0..n_experts-1 are padding."""
    padding_P = ((expert_ids_TK < 0) | (expert_ids_TK >= n_experts)).view(-1)
    key_P, pair_P = torch.sort(expert_ids_TK.reshape(-1).masked_fill(padding_P, n_experts), stable=True)
    expert_E = torch.arange(n_experts, device=key_P.device, dtype=key_P.dtype)
    place_P = torch.empty_like(pair_P)
    place_P[pair_P] = torch.arange(pair_P.numel(), device=pair_P.device)
    end_E = torch.searchsorted(key_P, expert_E, right=True, out_int32=True)
    return Routing(
        pair_P=pair_P,
        row_P=pair_P // max(1, expert_ids_TK.shape[1]),
        place_P=place_P.masked_fill_(padding_P, -1),
        end_E=end_E,
        bound_B=torch.nn.functional.pad(end_E, (1, 0)),
    )
