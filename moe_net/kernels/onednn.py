# pyright: basic
"""Matrix products of fp32 on a CPU, by the faster of the two libraries that torch brings.

`torch.mm` goes to MKL, which gives processors of other makers than its own AVX2 at most. oneDNN goes by what the
processor can do. One core of an EPYC (Zen 5), GFLOP/s, MKL and oneDNN: 102 and 224 for [1024, 1024, 1024], 98 and 210
for [64, 128, 2560] (experts of few rows), 51 and 88 for [7, 128, 2560]; 23 and 26 us for [64, 128, 128].

oneDNN makes code for every shape, in 0.3 ms, and keeps 1024 of them: rows come in ever new numbers, so they are filled
up with zeros to one of eight in an octave (`padded`), by 3 % in the mean. Without that a server of 1 to 1024 rows an
expert was 1.2 GiB larger after 6000 calls: what lives long lies between what is freed.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["has_fast", "padded", "product", "product_into"]

# Multiplications from which it pays: a call of oneDNN's takes 15 us, one of MKL's 1.
_MANY = 2**21
_FEWEST_ROWS = 4
_STEPS_PER_OCTAVE = 8


@cache
def _is_faster() -> bool:
    """Not without AVX-512, where both do the same, nor on Intel's processors, where MKL has that as well. (What torch
    calls the operator is no promise of torch's.)"""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "Intel" not in _processor()
    )


def _processor() -> str:
    """Its maker's name is in it."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:4096]
    except OSError:  # not Linux
        return platform.processor()


def has_fast(like: Tensor, rows: int, d_in: int, d_out: int) -> bool:
    """Whether products of [rows, d_in] and [d_in, d_out], in values like those given, are for `product`."""
    return (
        like.dtype is torch.float32
        and like.device.type == "cpu"
        and rows >= _FEWEST_ROWS
        and rows * d_in * d_out >= _MANY
        and _is_faster()
    )


def padded(rows: int) -> int:
    """The next number of rows, from `rows` up, that `product` shall see."""
    step = max(1, (1 << max(0, rows - 1).bit_length()) // (2 * _STEPS_PER_OCTAVE))
    return -(-rows // step) * step


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """`a @ b` in fp32 whatever autocast says, for what `has_fast` says yes to."""
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")


def product_into(out_nN: Tensor, a_MK: Tensor, b_KN: Tensor, *, fast: bool) -> None:
    """The first rows of `a @ b`, as many as `out` has, which may be of a wider dtype."""
    if fast:
        out_nN.copy_(product(a_MK, b_KN)[: out_nN.shape[0]])
    elif a_MK.dtype is out_nN.dtype:
        torch.mm(a_MK, b_KN, out=out_nN)
    else:
        out_nN.copy_(torch.mm(a_MK, b_KN))
