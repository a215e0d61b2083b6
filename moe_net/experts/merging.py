"""Calls that run together: their rows one after another, their (row, expert) pairs as slots and gates of each row.

R rows, D model width, K most experts of any row, P (row, expert) pairs; merged calls have the sums of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_net.experts.checks import most_experts, pairs_bytes
from moe_net.experts.staging import CallFacts
from moe_net.types import ExpertShape
from moe_net.wire.messages import RoutedRows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """One call of a merged dispatch."""

    position: int
    """In the list of calls, and of answers."""
    facts: CallFacts
    rows: RoutedRows
    slot_P: Tensor
    """int32; -1: not hosted here."""
    missing: tuple[int, ...]
    """Experts not hosted here."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merged:
    x_RD: Tensor
    slot_RK: Tensor
    gate_RK: Tensor
    filled_RK: Tensor | None
    """Where the pairs stand; None: everywhere."""


def pad_pairs(count_R: Tensor, slot_P: Tensor, gate_P: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(slots [R, K], gates [R, K], where the pairs stand) with K the largest count; the rest is -1 and 0.

    Rows with equally many experts, as top-k routing to one server gives, are only viewed: the third is None then.
    """
    n_rows = count_R.numel()
    most = int(count_R.max()) if n_rows else 1
    if n_rows * most == slot_P.numel():
        return slot_P.view(n_rows, most), gate_P.view(n_rows, most), None
    filled_RK = torch.arange(most) < count_R.unsqueeze(1)
    slot_RK = torch.full((n_rows, most), -1, dtype=slot_P.dtype).masked_scatter_(filled_RK, slot_P)
    gate_RK = torch.zeros(n_rows, most, dtype=gate_P.dtype).masked_scatter_(filled_RK, gate_P)
    return slot_RK, gate_RK, filled_RK


def fitting(parts: Sequence[Part], shape: ExpertShape, limit_bytes: int) -> Iterator[list[Part]]:
    """The parts, in their order, by what may run together: one row of very many experts widens all that run with it.
    What is over the limit alone runs alone."""
    together: list[Part] = []
    n_rows, most = 0, 1
    for part in parts:
        own_rows, own_most = part.facts.n_rows, most_experts(part.rows)
        if together and pairs_bytes(n_rows + own_rows, max(most, own_most), shape) > limit_bytes:
            yield together
            together, n_rows, most = [], 0, 1
        n_rows, most = n_rows + own_rows, max(most, own_most)
        together.append(part)
    if together:
        yield together


def merge(parts: Sequence[Part]) -> Merged:
    """The rows of all parts, one after another; a single part is not copied."""
    rows = parts[0].rows
    x_RD, count_R, gate_P, slot_P = rows.x_RD, rows.experts_per_row_R, rows.gate_P, parts[0].slot_P
    if len(parts) > 1:
        x_RD = torch.cat([part.rows.x_RD for part in parts])
        count_R = torch.cat([part.rows.experts_per_row_R for part in parts])
        gate_P = torch.cat([part.rows.gate_P for part in parts])
        slot_P = torch.cat([part.slot_P for part in parts])
    slot_RK, gate_RK, filled_RK = pad_pairs(count_R, slot_P, gate_P)
    return Merged(x_RD=x_RD, slot_RK=slot_RK, gate_RK=gate_RK, filled_RK=filled_RK)


def split(value: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return (value,) if len(sizes) == 1 else value.split(sizes)
