# pyright: basic, reportCallIssue=false
"""Stable counting sort of (token, expert) pairs, on the device: nothing waits for it.

P = T * K pairs, E experts. Three launches, or one for few pairs. torch.sort of the same keys is a radix sort of 64-bit
keys with a dozen launches around it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_net.kernels.device.sizes import ceil_div, power_of_2
from moe_net.kernels.routing import Routing

# Elements of the one-hot matrix [pairs, experts] of a program that does all of it: its time grows with them, 5 us for
# these, while three launches of many programs take 8.
_AT_ONCE = 8192
# Pairs of one program of many: it compares each with each.
_BLOCK = 128
# Experts that a program looks at in one step.
_EXPERTS = 128
# Blocks whose counts are summed up in one step.
_STEP = 1024


@triton.jit
def _one_hot(ids_ptr, pair_B, n_pairs, n_experts, expert_E):
    id_B = tl.load(ids_ptr + pair_B, mask=pair_B < n_pairs, other=-1)
    hit_BE = (id_B[:, None] == expert_E[None, :]) & (expert_E < n_experts)[None, :]
    return hit_BE.to(tl.int32)


@triton.jit
def _store_places(place_B, known_B, pair_B, n_pairs, n_choices, pair_ptr, row_ptr, place_ptr):
    tl.store(pair_ptr + place_B, pair_B, mask=known_B)
    tl.store(row_ptr + place_B, pair_B // n_choices, mask=known_B)
    tl.store(place_ptr + pair_B, tl.where(known_B, place_B, -1), mask=pair_B < n_pairs)


@triton.jit
def _store_ends(end_E, expert_E, n_experts, end_ptr, bound_ptr):
    known_E = expert_E < n_experts
    tl.store(end_ptr + expert_E, end_E, mask=known_E)
    tl.store(bound_ptr + 1 + expert_E, end_E, mask=known_E)
    tl.store(bound_ptr + expert_E, 0, mask=expert_E == 0)


@triton.jit(do_not_specialize=["n_pairs"])
def _sort_at_once(
    ids_ptr, pair_ptr, row_ptr, place_ptr, end_ptr, bound_ptr, n_pairs, n_experts, n_choices,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    pair_B = tl.arange(0, BLOCK)
    expert_E = tl.arange(0, EXPERTS)
    hit_BE = _one_hot(ids_ptr, pair_B, n_pairs, n_experts, expert_E)
    count_E = tl.sum(hit_BE, 0)
    end_E = tl.cumsum(count_E, 0)
    _store_ends(end_E, expert_E, n_experts, end_ptr, bound_ptr)
    rank_BE = tl.cumsum(hit_BE, 0) - hit_BE
    place_B = tl.sum(hit_BE * ((end_E - count_E)[None, :] + rank_BE), 1)
    _store_places(place_B, tl.sum(hit_BE, 1) > 0, pair_B, n_pairs, n_choices, pair_ptr, row_ptr, place_ptr)


@triton.jit(do_not_specialize=["n_pairs", "n_blocks"])
def _count(ids_ptr, below_ptr, n_pairs, n_blocks, n_experts, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """Counts [E, blocks] of each block's pairs of each expert or one below it."""
    block = tl.program_id(0)
    pair_B = block * BLOCK + tl.arange(0, BLOCK)
    total = 0
    for first in range(0, n_experts, EXPERTS):
        expert_E = first + tl.arange(0, EXPERTS)
        count_E = tl.sum(_one_hot(ids_ptr, pair_B, n_pairs, n_experts, expert_E), 0)
        below_E = total + tl.cumsum(count_E, 0)
        tl.store(below_ptr + expert_E * n_blocks + block, below_E, mask=expert_E < n_experts)
        total += tl.sum(count_E, 0)


@triton.jit(do_not_specialize=["n_blocks"])
def _sum_up(below_ptr, first_ptr, end_ptr, bound_ptr, n_blocks, STEP: tl.constexpr):
    """The place [E, blocks] of an expert's first pair in each block, and where its pairs end.

    A sum over all blocks of pairs below an expert is where its own begin: no sum over experts is left to do.
    """
    expert = tl.program_id(0)
    start = 0
    end = 0
    for first in range(0, n_blocks, STEP):
        block_S = first + tl.arange(0, STEP)
        known_S = block_S < n_blocks
        start += tl.sum(tl.load(below_ptr + (expert - 1) * n_blocks + block_S, mask=known_S & (expert > 0), other=0), 0)
    for first in range(0, n_blocks, STEP):
        block_S = first + tl.arange(0, STEP)
        known_S = block_S < n_blocks
        at_S = expert * n_blocks + block_S
        count_S = tl.load(below_ptr + at_S, mask=known_S, other=0)
        count_S -= tl.load(below_ptr + at_S - n_blocks, mask=known_S & (expert > 0), other=0)
        tl.store(first_ptr + at_S, start + end + tl.cumsum(count_S, 0) - count_S, mask=known_S)
        end += tl.sum(count_S, 0)
    tl.store(end_ptr + expert, start + end)
    tl.store(bound_ptr + 1 + expert, start + end)
    if expert == 0:
        tl.store(bound_ptr, 0)


@triton.jit(do_not_specialize=["n_pairs", "n_blocks"])
def _put(
    ids_ptr, first_ptr, pair_ptr, row_ptr, place_ptr, n_pairs, n_blocks, n_experts, n_choices, BLOCK: tl.constexpr
):
    """A pair's place: that of its expert's first pair in its block, and those of its own before it there."""
    block = tl.program_id(0)
    at_B = tl.arange(0, BLOCK)
    pair_B = block * BLOCK + at_B
    id_B = tl.load(ids_ptr + pair_B, mask=pair_B < n_pairs, other=-1).to(tl.int32)
    known_B = (id_B >= 0) & (id_B < n_experts)
    same_BB = (id_B[:, None] == id_B[None, :]) & (at_B[None, :] < at_B[:, None])
    place_B = tl.load(first_ptr + id_B * n_blocks + block, mask=known_B, other=0) + tl.sum(same_BB.to(tl.int32), 1)
    _store_places(place_B, known_B, pair_B, n_pairs, n_choices, pair_ptr, row_ptr, place_ptr)


def sort_pairs(expert_ids_TK: Tensor, n_experts: int) -> Routing:
    """Stable sort by expert; ids (int32 or int64) outside 0..n_experts-1 are padding."""
    ids_P = expert_ids_TK.contiguous()
    n_pairs, n_choices = ids_P.numel(), max(1, expert_ids_TK.shape[1])
    # Zeros: whoever gathers by a tile or by all P reads entries past the last pair, too.
    # Each 16-byte aligned: QuACK takes no other indices.
    padded = ceil_div(n_pairs, 4) * 4
    pair_P, row_P, place_P = torch.zeros((3, padded), dtype=torch.int32, device=ids_P.device)[:, :n_pairs]
    end_E = torch.empty(n_experts, dtype=torch.int32, device=ids_P.device)
    bound_B = torch.empty(n_experts + 1, dtype=torch.int32, device=ids_P.device)
    experts = power_of_2(n_experts)
    at_once = max(16, power_of_2(n_pairs))
    if at_once * experts <= _AT_ONCE:
        _sort_at_once[(1,)](
            ids_P, pair_P, row_P, place_P, end_E, bound_B, n_pairs, n_experts, n_choices, at_once, experts,
            num_warps=8,
        )  # fmt: skip
        return Routing(pair_P, row_P, place_P, end_E, bound_B)
    n_blocks = ceil_div(n_pairs, _BLOCK)
    below, first = torch.empty((2, n_experts, n_blocks), dtype=torch.int32, device=ids_P.device)
    _count[(n_blocks,)](ids_P, below, n_pairs, n_blocks, n_experts, _BLOCK, min(_EXPERTS, experts), num_warps=4)
    _sum_up[(n_experts,)](below, first, end_E, bound_B, n_blocks, min(_STEP, power_of_2(n_blocks)), num_warps=4)
    _put[(n_blocks,)](
        ids_P, first, pair_P, row_P, place_P, n_pairs, n_blocks, n_experts, n_choices, _BLOCK, num_warps=1
    )
    return Routing(pair_P, row_P, place_P, end_E, bound_B)
