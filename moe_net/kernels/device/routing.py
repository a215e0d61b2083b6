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

# Elements of the one-hot matrix of a program, [pairs, experts]: 64 registers a thread at 16 warps.
_ONE_HOT = 32768
# And so many at most in a program that does all of it: a program's time grows with them, 5 us for these and 39 for the
# above, while three launches of many small programs take 8.
_AT_ONCE = 8192
# Programs of which the second launch sums up the counts in one step (of up to 128 experts).
_FEW_BLOCKS = 128


@triton.jit
def _one_hot(ids_ptr, pair_B, n_pairs, n_experts, expert_E):
    id_B = tl.load(ids_ptr + pair_B, mask=pair_B < n_pairs, other=-1)
    hit_BE = (id_B[:, None] == expert_E[None, :]) & (expert_E < n_experts)[None, :]
    return hit_BE.to(tl.int32)


@triton.jit
def _place(hit_BE, first_E, pair_B, n_pairs, n_choices, pair_ptr, row_ptr, place_ptr):
    rank_BE = tl.cumsum(hit_BE, 0) - hit_BE
    place_B = tl.sum(hit_BE * (first_E[None, :] + rank_BE), 1)
    known_B = tl.sum(hit_BE, 1) > 0
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
    _place(hit_BE, end_E - count_E, pair_B, n_pairs, n_choices, pair_ptr, row_ptr, place_ptr)


@triton.jit(do_not_specialize=["n_pairs"])
def _count(ids_ptr, count_ptr, n_pairs, n_experts, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    pair_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert_E = tl.arange(0, EXPERTS)
    count_E = tl.sum(_one_hot(ids_ptr, pair_B, n_pairs, n_experts, expert_E), 0)
    tl.store(count_ptr + tl.program_id(0) * n_experts + expert_E, count_E, mask=expert_E < n_experts)


@triton.jit(do_not_specialize=["n_blocks"])
def _sum_up(count_ptr, end_ptr, bound_ptr, n_blocks, n_experts, STEP: tl.constexpr, EXPERTS: tl.constexpr):
    """Counts [blocks, E] become the first place of each block's pairs of each expert."""
    expert_E = tl.arange(0, EXPERTS)
    total_E = tl.zeros([EXPERTS], tl.int32)
    for block in range(0, n_blocks, STEP):
        block_S = block + tl.arange(0, STEP)
        inside_SE = (block_S < n_blocks)[:, None] & (expert_E < n_experts)[None, :]
        at_SE = block_S[:, None] * n_experts + expert_E[None, :]
        total_E += tl.sum(tl.load(count_ptr + at_SE, mask=inside_SE, other=0), 0)
    end_E = tl.cumsum(total_E, 0)
    _store_ends(end_E, expert_E, n_experts, end_ptr, bound_ptr)
    first_E = end_E - total_E
    for block in range(0, n_blocks, STEP):
        block_S = block + tl.arange(0, STEP)
        inside_SE = (block_S < n_blocks)[:, None] & (expert_E < n_experts)[None, :]
        at_SE = block_S[:, None] * n_experts + expert_E[None, :]
        count_SE = tl.load(count_ptr + at_SE, mask=inside_SE, other=0)
        tl.store(count_ptr + at_SE, first_E[None, :] + tl.cumsum(count_SE, 0) - count_SE, mask=inside_SE)
        first_E += tl.sum(count_SE, 0)


@triton.jit(do_not_specialize=["n_pairs"])
def _put(
    ids_ptr, first_ptr, pair_ptr, row_ptr, place_ptr, n_pairs, n_experts, n_choices,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    pair_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert_E = tl.arange(0, EXPERTS)
    hit_BE = _one_hot(ids_ptr, pair_B, n_pairs, n_experts, expert_E)
    first_E = tl.load(first_ptr + tl.program_id(0) * n_experts + expert_E, mask=expert_E < n_experts, other=0)
    _place(hit_BE, first_E, pair_B, n_pairs, n_choices, pair_ptr, row_ptr, place_ptr)


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
    block = max(16, min(_ONE_HOT // experts, power_of_2(ceil_div(n_pairs, _FEW_BLOCKS))))
    warps = 16 if block * experts > _AT_ONCE else 4
    n_blocks = ceil_div(n_pairs, block)
    count = torch.empty((n_blocks, n_experts), dtype=torch.int32, device=ids_P.device)
    _count[(n_blocks,)](ids_P, count, n_pairs, n_experts, block, experts, num_warps=warps)
    step = max(1, min(_FEW_BLOCKS, 16384 // experts))
    _sum_up[(1,)](count, end_E, bound_B, n_blocks, n_experts, step, experts, num_warps=16)
    _put[(n_blocks,)](
        ids_P, count, pair_P, row_P, place_P, n_pairs, n_experts, n_choices, block, experts, num_warps=warps
    )
    return Routing(pair_P, row_P, place_P, end_E, bound_B)
