"""Matrices as bytes, in the four layouts of tensor.proto; each states what it costs in accuracy.

R rows, D columns, B blocks of 64 columns per row (the last one may be shorter), N values.

What is finite before `encode` is finite after `decode`, and what is not is not: an overflow never becomes a number
that looks like any other, so that the receiver's check finds it. Error bounds below are for finite values. Memory is
little-endian on every machine torch runs on; nothing here swaps bytes.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_net.errors import WireError
from moe_net.types import Encoding

BLOCK = 64
FP32_TINY = torch.finfo(torch.float32).tiny
FP16_MAX = 65504.0
BF16_MAX = torch.finfo(torch.bfloat16).max
# Largest fp32 whose product with 127 is finite: FLT_MAX / 127, rounded down instead of to nearest.
INT8_MAX_SCALE = 2.679388389e36

_VALUE_BYTES = {Encoding.FP32: 4, Encoding.BF16: 2, Encoding.FP16: 2, Encoding.INT8: 1}


def payload_bytes(rows: int, cols: int, encoding: Encoding) -> int:
    """Exact length of an encoded [rows, cols] matrix."""
    scales = rows * -(-cols // BLOCK) if encoding is Encoding.INT8 else 0
    return rows * cols * _VALUE_BYTES[encoding] + 4 * scales


def encode(x_RD: Tensor, encoding: Encoding) -> memoryview:
    """The fp32 CPU matrix `x_RD` as bytes; for FP32 and contiguous rows a view of its memory, without a copy."""
    x_RD = x_RD.detach().contiguous()
    assert x_RD.dtype is torch.float32, x_RD.dtype
    assert x_RD.ndim == 2, x_RD.shape
    match encoding:
        case Encoding.FP32:
            return memory_of(x_RD)
        case Encoding.BF16:
            return memory_of(_to_bf16(x_RD))
        case Encoding.FP16:
            return memory_of(_to_fp16(x_RD))
        case Encoding.INT8:
            return _to_int8(x_RD)


def decode(data: memoryview, rows: int, cols: int, encoding: Encoding) -> Tensor:
    """fp32 [rows, cols] from what `encode` wrote; WireError when the length is not exactly right.

    FP32 is not copied where `data` starts at a multiple of 4: the tensor then looks at the sender's bytes, keeps them
    alive, and must not be written to (Python's bytes never change; nothing stops torch). Treat it as read-only always.
    """
    expected_bytes = payload_bytes(rows, cols, encoding)
    if data.nbytes != expected_bytes:
        raise WireError(
            f"{data.nbytes} bytes for {rows} rows of {cols} columns in {encoding.name.lower()}, "
            f"which take {expected_bytes}"
        )
    match encoding:
        case Encoding.FP32:
            return tensor_view(data, torch.float32, (rows, cols))
        case Encoding.BF16:
            return tensor_view(data, torch.bfloat16, (rows, cols)).to(torch.float32)
        case Encoding.FP16:
            return tensor_view(data, torch.float16, (rows, cols)).to(torch.float32)
        case Encoding.INT8:
            return _from_int8(data, rows, cols)


def memory_of(values: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor that needs no gradient, not copied."""
    if values.dtype is torch.bfloat16:  # numpy has none
        values = values.view(torch.int16)
    return array_memory(values.numpy())


def array_memory(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, not copied."""
    return array.data.cast("B") if array.size else memoryview(b"")


# torch warns, once in a process, that it cannot keep anybody from writing to memory that is read-only: see `decode`.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def tensor_view(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
    """The values of `data`, as [N] or in `shape`: a view, to be treated as read-only, or a copy where they are not
    aligned. `data` is as long as `shape` says.

    torch's kernels take unaligned memory on x86 (dot is 10 times slower, the rest as fast), but neither C++ nor other
    processors promise that. A copy of 16 MiB takes 1 ms; the codec pads, so that our own messages need none.
    """
    if not data.nbytes:
        return torch.empty(shape or (0,), dtype=dtype)
    if not np.frombuffer(data, f"u{dtype.itemsize}").flags.aligned:
        data = memoryview(bytearray(data))
    x = torch.frombuffer(data, dtype=dtype)
    return x if shape is None else x.view(shape)


def _clamped(x_RD: Tensor, largest: float) -> Tensor:
    """`x_RD`, finite values moved to at most `largest`; one pass and no copy when there is nothing to move."""
    if not x_RD.numel():
        return x_RD
    lowest, highest = torch.aminmax(x_RD)  # NaN if any value is: then the comparison fails, and all are looked at
    if -largest <= float(lowest) and float(highest) <= largest:
        return x_RD
    return torch.where(torch.isinf(x_RD), x_RD, x_RD.clamp(-largest, largest))


def _to_bf16(x_RD: Tensor) -> Tensor:
    """Round to nearest, ties to even. Error at most 2**-8 * |x| + 2**-134.

    Values beyond 3.3895e38, the largest bfloat16, become that number (rounding alone would make some infinite).
    """
    return _clamped(x_RD, BF16_MAX).to(torch.bfloat16)


def _to_fp16(x_RD: Tensor) -> Tensor:
    """Round to nearest, ties to even. Error at most 2**-11 * |x| + 2**-25 up to 65504.

    Beyond 65504, the largest half, finite values become +-65504: wrong by |x| - 65504, but of the right sign.
    Infinities stay.
    """
    return _clamped(x_RD, FP16_MAX).to(torch.float16)


def _to_int8(x_RD: Tensor) -> memoryview:
    """Per row and block of 64 columns: scale = absmax / 127, q = round(x / scale), first all q, then all scales.

    Error at most 0.5001 * scale + 2**-142, that is absmax of the block / 253.9 (Dettmers et al., 2022, "8-bit
    Optimizers via Block-wise Quantization", section 2.1, with a linear instead of a dynamic map). The second term
    is for blocks of denormals, whose scale has few bits, or none: all of such a block becomes 0. A block that holds
    an infinity or NaN gets a scale that is one, and decodes to nothing finite.
    """
    rows, cols = x_RD.shape
    if not x_RD.numel():
        return memoryview(b"")
    x_RBC = _in_blocks(x_RD)
    absmax_RB = torch.maximum(x_RBC.amax(-1), x_RBC.amin(-1).neg_())
    scale_RB = absmax_RB / 127
    lowest, highest = torch.aminmax(scale_RB)  # NaN if any is
    if float(lowest) >= FP32_TINY and float(highest) <= INT8_MAX_SCALE:
        q_RBC = (x_RBC / scale_RB.unsqueeze(-1)).round_()
    else:
        scale_RB = torch.where(torch.isfinite(absmax_RB), scale_RB.clamp(max=INT8_MAX_SCALE), absmax_RB)
        # 1 in place of scales of 0 (all values are 0 or tiny: q = 0) and of those not finite (the scale says it all).
        divisor_RB = torch.where((scale_RB > 0) & torch.isfinite(scale_RB), scale_RB, 1.0)
        q_RBC = (x_RBC / divisor_RB.unsqueeze(-1)).round_()
        # Denormal scales are so coarse that q can pass 127, and int8 conversion is not defined for infinity and NaN.
        # An infinite scale times q = 0 is NaN, times anything else infinite: the block stays not finite.
        q_RBC.nan_to_num_(nan=0.0).clamp_(-127, 127)
    out = torch.empty(payload_bytes(rows, cols, Encoding.INT8), dtype=torch.uint8)
    out[: rows * cols].view(torch.int8).view(rows, cols).copy_(q_RBC.view(rows, -1)[:, :cols])
    # Not a tensor of fp32 within `out`: that would have to start at a multiple of 4.
    out[rows * cols :].copy_(scale_RB.view(torch.uint8).view(-1))
    return memory_of(out)


def _from_int8(data: memoryview, rows: int, cols: int) -> Tensor:
    """value = scale * q; the only memory taken is that of the result and, for ragged rows, of its padding."""
    q_RD = tensor_view(data[: rows * cols], torch.int8, (rows, cols))
    scale_RB = tensor_view(data[rows * cols :], torch.float32, (rows, -(-cols // BLOCK)))
    x_RBC = _in_blocks(q_RD.to(torch.float32))
    return x_RBC.mul_(scale_RB.unsqueeze(-1)).view(rows, -1)[:, :cols].contiguous()


def _in_blocks(x_RD: Tensor) -> Tensor:
    """[rows, blocks, 64]; a view unless the last block is short and filled up with zeros."""
    missing = -x_RD.shape[1] % BLOCK
    if missing:
        x_RD = torch.nn.functional.pad(x_RD, (0, missing))
    return x_RD.view(x_RD.shape[0], -1, BLOCK)
