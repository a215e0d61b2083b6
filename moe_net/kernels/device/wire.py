# pyright: basic, reportCallIssue=false
"""The wire's matrices on the device: out of and into the bytes of `wire.compress`, one pass each.

R rows, D columns, N values; int8 scales are per row and block of 64 columns. What is finite stays finite: values beyond
the largest number of the dtype that they become are that number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_net.kernels.device.sizes import ceil_div, power_of_2
from moe_net.types import Encoding

BLOCK = 64
_VALUES = 4096
"""Of a program that casts."""
DTYPES = {Encoding.FP32: torch.float32, Encoding.BF16: torch.bfloat16, Encoding.FP16: torch.float16}
"""What rows are in, where these are the bytes themselves."""
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.bfloat16, torch.float16)}
# As in `wire.compress`: 127 times the largest is finite; below the smallest normal number a block becomes 0.
_LARGEST_SCALE, _SMALLEST_SCALE = 2.679388389e36, torch.finfo(torch.float32).tiny


@triton.jit(do_not_specialize=["n_rows"])
def _dequantise(
    there_ptr, out_ptr, n_rows, width, n_blocks, LARGEST, BLOCKS: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block_B = tl.arange(0, BLOCKS)
    column_BS = block_B[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside_BS = column_BS < width
    first = n_rows.to(tl.int64) * width + row * n_blocks * 4
    if WORDS:
        scale_ptr = (there_ptr + first).to(tl.pointer_type(tl.float32), bitcast=True)
        scale_B = tl.load(scale_ptr + block_B, mask=block_B < n_blocks, other=0.0)
    else:
        bits_B = tl.zeros((BLOCKS,), tl.uint32)
        for byte in tl.static_range(4):
            at_B = there_ptr + first + block_B * 4 + byte
            bits_B |= tl.load(at_B, mask=block_B < n_blocks, other=0).to(tl.uint32) << (8 * byte)
        scale_B = bits_B.to(tl.float32, bitcast=True)
    q_BS = (
        tl.load(there_ptr + row * width + column_BS, mask=inside_BS, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    )
    x_BS = tl.minimum(tl.maximum(q_BS * scale_B[:, None], -LARGEST), LARGEST)
    tl.store(out_ptr + row * width + column_BS, x_BS, mask=inside_BS)


# Of a number of values that it knows to be a multiple of 16 it makes accesses of 16 bytes: written one by one into the
# host's memory, 4 MiB took 3.5 ms.
@triton.jit
def _cast(x_ptr, out_ptr, n_values, LARGEST, SIZE: tl.constexpr):
    at_S = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside_S = at_S < n_values
    x_S = tl.load(x_ptr + at_S, mask=inside_S, other=0.0).to(tl.float32)
    # An infinity stays one, so that the receiver finds it, as it does a NaN.
    clamped_S = tl.minimum(tl.maximum(x_S, -LARGEST), LARGEST)
    tl.store(out_ptr + at_S, tl.where(tl.abs(x_S) < float("inf"), clamped_S, x_S), mask=inside_S)


@triton.jit(do_not_specialize=["n_rows"])
def _quantise(
    x_ptr, there_ptr, n_rows, width, n_blocks, LARGEST, TINY,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr,
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
    tl.store(there_ptr + row * width + column_BS, q_BS.to(tl.int8).to(tl.uint8, bitcast=True), mask=inside_BS)
    first = n_rows.to(tl.int64) * width + row * n_blocks * 4
    if WORDS:
        scale_ptr = (there_ptr + first).to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(scale_ptr + block_B, scale_B, mask=block_B < n_blocks)
    else:
        bits_B = scale_B.to(tl.uint32, bitcast=True)
        for byte in tl.static_range(4):
            value_B = ((bits_B >> (8 * byte)) & 0xFF).to(tl.uint8)
            tl.store(there_ptr + first + block_B * 4 + byte, value_B, mask=block_B < n_blocks)


def dequantise(there_N: Tensor, out_RD: Tensor) -> None:
    """`out` = q * scale, rounded to out's dtype; `there` uint8 as `wire.compress` writes int8, scales finite."""
    n_rows, width = out_RD.shape
    blocks = ceil_div(width, BLOCK)
    _dequantise[(n_rows,)](
        there_N, out_RD, n_rows, width, blocks, _LARGEST[out_RD.dtype], power_of_2(blocks), BLOCK,
        n_rows * width % 4 == 0, num_warps=4,
    )  # fmt: skip


def quantise(x_RD: Tensor, there_N: Tensor) -> None:
    """Write `x` as q and scale, as `dequantise` reads them; error at most 0.5001 * absmax / 127 of a value's block.

    A block with a value that is not finite gets NaN for its scale, and the receiver finds it there.
    """
    n_rows, width = x_RD.shape
    blocks = ceil_div(width, BLOCK)
    _quantise[(n_rows,)](
        x_RD, there_N, n_rows, width, blocks, _LARGEST_SCALE, _SMALLEST_SCALE, power_of_2(blocks), BLOCK,
        n_rows * width % 4 == 0, num_warps=4,
    )  # fmt: skip


def cast(x_N: Tensor, out_N: Tensor) -> None:
    """`out` = x, rounded to out's dtype; both contiguous."""
    n_values = x_N.numel()
    _cast[(ceil_div(n_values, _VALUES),)](x_N, out_N, n_values, _LARGEST[out_N.dtype], _VALUES, num_warps=8)


def decode(there_N: Tensor, encoding: Encoding, out_RD: Tensor) -> None:
    """`out`: the rows that `there` says."""
    if encoding is Encoding.INT8:
        dequantise(there_N, out_RD)
    else:
        cast(there_N.view(DTYPES[encoding]), out_RD)


def encode(y_RD: Tensor, encoding: Encoding, there_N: Tensor) -> None:
    """`there`: the bytes of `y`, which is contiguous."""
    if encoding is Encoding.INT8:
        quantise(y_RD, there_N)
    else:
        cast(y_RD, there_N.view(DTYPES[encoding]))
