# pyright: basic, reportCallIssue=false
"""The wire's int8 rows on the device: out of and into the bytes of `wire.compress`, one pass each.

R rows, D columns; scales are per row and block of 64 columns: first all values, then all scales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_net.kernels.device.sizes import ceil_div, power_of_2

BLOCK = 64
# As in `wire.compress`: 127 times the largest is finite; below the smallest normal number a block becomes 0.
_LARGEST_SCALE, _SMALLEST_SCALE = 2.679388389e36, torch.finfo(torch.float32).tiny


@triton.jit(do_not_specialize=["n_rows"])
def _dequantise(q_ptr, scale_ptr, out_ptr, n_rows, width, n_blocks, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block_B = tl.arange(0, BLOCKS)
    column_BS = block_B[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside_BS = column_BS < width
    scale_B = tl.load(scale_ptr + row * n_blocks + block_B, mask=block_B < n_blocks, other=0.0)
    q_BS = tl.load(q_ptr + row * width + column_BS, mask=inside_BS, other=0).to(tl.float32)
    tl.store(out_ptr + row * width + column_BS, q_BS * scale_B[:, None], mask=inside_BS)


@triton.jit(do_not_specialize=["n_rows"])
def _quantise(
    x_ptr, q_ptr, scale_ptr, n_rows, width, n_blocks, LARGEST, TINY, BLOCKS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block_B = tl.arange(0, BLOCKS)
    column_BS = block_B[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside_BS = column_BS < width
    x_BS = tl.load(x_ptr + row * width + column_BS, mask=inside_BS, other=0.0).to(tl.float32)
    # NaN is not below anything.
    finite_B = tl.sum(tl.where(tl.abs(x_BS) < float("inf"), 0, 1), 1) == 0
    scale_B = tl.minimum(tl.max(tl.abs(x_BS), 1) / 127.0, LARGEST)
    usable_B = finite_B & (scale_B >= TINY)
    scaled_BS = tl.where(usable_B[:, None], x_BS / tl.where(usable_B, scale_B, 1.0)[:, None], 0.0)
    q_BS = tl.where(scaled_BS >= 0, scaled_BS + 0.5, scaled_BS - 0.5).to(tl.int32)
    q_BS = tl.minimum(tl.maximum(q_BS, -127), 127)
    scale_B = tl.where(finite_B, tl.where(usable_B, scale_B, 0.0), float("nan"))
    tl.store(q_ptr + row * width + column_BS, q_BS.to(tl.int8), mask=inside_BS)
    tl.store(scale_ptr + row * n_blocks + block_B, scale_B, mask=block_B < n_blocks)


def payload_parts(data_N: Tensor, n_rows: int, width: int) -> tuple[Tensor, Tensor]:
    """(int8 values [R * D], fp32 scales [R * blocks]) of a uint8 payload; views. R * D must be a multiple of 4."""
    n_values = n_rows * width
    return data_N[:n_values].view(torch.int8), data_N[n_values:].view(torch.float32)


def payload_bytes(n_rows: int, width: int) -> int:
    return n_rows * width + 4 * n_rows * ceil_div(width, BLOCK)


def dequantise(data_N: Tensor, n_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """[R, D] from a payload on the device."""
    q, scale = payload_parts(data_N, n_rows, width)
    out_RD = torch.empty((n_rows, width), dtype=dtype, device=data_N.device)
    blocks = ceil_div(width, BLOCK)
    _dequantise[(n_rows,)](q, scale, out_RD, n_rows, width, blocks, power_of_2(blocks), BLOCK, num_warps=4)
    return out_RD


def quantise(x_RD: Tensor, data_N: Tensor) -> None:
    """Write `x` as a payload into `data_N` (uint8); error at most 0.5001 * absmax / 127 of a value's block.

    A block with a value that is not finite gets NaN for its scale, and the receiver finds it there.
    """
    n_rows, width = x_RD.shape
    q, scale = payload_parts(data_N, n_rows, width)
    blocks = ceil_div(width, BLOCK)
    _quantise[(n_rows,)](
        x_RD, q, scale, n_rows, width, blocks, _LARGEST_SCALE, _SMALLEST_SCALE, power_of_2(blocks), BLOCK, num_warps=4
    )
