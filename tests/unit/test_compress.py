"""Each encoding keeps the error bound that its docstring states, for every kind of finite value.

R rows, D columns.
"""

from __future__ import annotations

import math
import struct
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_net.errors import WireError
from moe_net.types import Encoding
from moe_net.wire.compress import BLOCK, FP16_MAX, decode, encode, payload_bytes, tensor_view

FLT_MAX = torch.finfo(torch.float32).max
SPECIAL = [
    0.0, -0.0, 2.0**-149, -(2.0**-149), 63 * 2.0**-149, 189 * 2.0**-149, 2.0**-126, -(2.0**-130), 1.0, -1.0,
    65504.0, -65504.0, 65519.0, 65520.0, 1e30, FLT_MAX, -FLT_MAX, 3.3895e38, 3.3961775e38, 2.0**-25, 1e-7,
]  # fmt: skip
COLUMNS = [1, 7, 63, 64, 65, 100, 128, 200]
HARMLESS = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Random values of a scale per row, from denormal to huge, with special values strewn in."""
    rows, cols = draw(st.integers(1, 4)), draw(st.sampled_from(COLUMNS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    exponent_R1 = torch.tensor([[draw(st.integers(-149, 125))] for _ in range(rows)])
    x_RD = torch.ldexp(torch.randn(rows, cols, generator=generator).clamp(-3.9, 3.9), exponent_R1)
    for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=6)):
        x_RD[draw(st.integers(0, rows - 1)), draw(st.integers(0, cols - 1))] = value
    return x_RD


def there_and_back(x_RD: Tensor, encoding: Encoding) -> Tensor:
    data = encode(x_RD, encoding)
    rows, cols = x_RD.shape
    assert data.nbytes == payload_bytes(rows, cols, encoding)
    out_RD = decode(memoryview(bytes(data)), rows, cols, encoding)
    assert out_RD.shape == x_RD.shape
    assert out_RD.dtype is torch.float32
    assert out_RD.is_contiguous()
    return out_RD


def error_of(out_RD: Tensor, x_RD: Tensor) -> Tensor:
    """Absolute error in double precision, in which every bound below is exact enough."""
    assert bool(torch.isfinite(out_RD).all())
    return (out_RD.double() - x_RD.double()).abs()


@HARMLESS
@given(matrices())
def test_fp32_keeps_every_bit(x_RD: Tensor) -> None:
    assert torch.equal(there_and_back(x_RD, Encoding.FP32).view(torch.int32), x_RD.view(torch.int32))


@HARMLESS
@given(matrices())
def test_bf16_is_within_its_bound_even_where_rounding_would_overflow(x_RD: Tensor) -> None:
    bound_RD = x_RD.double().abs() * 2.0**-8 + 2.0**-134
    assert bool((error_of(there_and_back(x_RD, Encoding.BF16), x_RD) <= bound_RD).all())


@HARMLESS
@given(matrices())
def test_fp16_is_within_its_bound_up_to_65504_and_stops_there(x_RD: Tensor) -> None:
    out_RD = there_and_back(x_RD, Encoding.FP16)
    reachable_RD = x_RD.double().clamp(-FP16_MAX, FP16_MAX)
    assert bool((error_of(out_RD, reachable_RD) <= reachable_RD.abs() * 2.0**-11 + 2.0**-25).all())
    assert bool((out_RD[x_RD >= FP16_MAX] == FP16_MAX).all())
    assert bool((out_RD[x_RD <= -FP16_MAX] == -FP16_MAX).all())


@HARMLESS
@given(matrices())
def test_int8_is_within_its_bound_block_by_block(x_RD: Tensor) -> None:
    rows, cols = x_RD.shape
    error_RBC = torch.nn.functional.pad(error_of(there_and_back(x_RD, Encoding.INT8), x_RD), (0, -cols % BLOCK))
    absmax_RBC = torch.nn.functional.pad(x_RD.double().abs(), (0, -cols % BLOCK)).view(rows, -1, BLOCK)
    scale_RB1 = absmax_RBC.amax(-1, keepdim=True) / 127
    assert bool((error_RBC.view(rows, -1, BLOCK) <= 0.5001 * scale_RB1 + 2.0**-142).all())


def test_int8_lies_as_the_proto_says() -> None:
    x_RD = torch.zeros(2, 65)
    x_RD[0, 3], x_RD[0, 64], x_RD[1, 0], x_RD[1, 1] = 127.0, -2.0, 63.5, -127.0
    data = bytes(encode(x_RD, Encoding.INT8))
    q = struct.unpack("130b", data[:130])
    scales = struct.unpack("<4f", data[130:])
    assert (q[3], q[64], q[65], q[66]) == (127, -127, 64, -127)
    assert scales == pytest.approx([1.0, 2 / 127, 1.0, 0.0])
    assert sum(abs(value) for value in q) == 127 + 127 + 64 + 127


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("cols", [64, 70])
def test_what_is_not_finite_stays_so_and_spoils_no_other_block(encoding: Encoding, value: float, cols: int) -> None:
    x_RD = torch.ones(2, cols)
    x_RD[0, 5] = value
    out_RD = there_and_back(x_RD, encoding)
    assert not math.isfinite(float(out_RD[0, 5]))
    assert out_RD[1].tolist() == pytest.approx([1.0] * cols)


@pytest.mark.parametrize("encoding", Encoding)
def test_a_transposed_matrix_that_needs_gradients_is_encoded_as_what_it_says(encoding: Encoding) -> None:
    x_DR = torch.randn(70, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert bytes(encode(x_DR.t(), encoding)) == bytes(encode(x_DR.detach().t().clone(), encoding))


@pytest.mark.parametrize("encoding", Encoding)
def test_one_byte_too_few_or_too_many_is_refused(encoding: Encoding) -> None:
    data = bytes(encode(torch.ones(3, 5), encoding))
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(WireError, match=f"{len(wrong)} bytes for 3 rows of 5 columns"):
            decode(memoryview(wrong), 3, 5, encoding)


def test_fp32_is_not_copied_either_way() -> None:
    x_RD = torch.ones(4, 8)
    view = encode(x_RD, Encoding.FP32)
    x_RD[0, 0] = 7.0
    assert struct.unpack("<f", view[:4]) == (7.0,)
    data = bytes(view)
    references = sys.getrefcount(data)
    out_RD = decode(memoryview(data), 4, 8, Encoding.FP32)
    assert out_RD.data_ptr() == np.frombuffer(data, np.uint8).ctypes.data
    assert sys.getrefcount(data) > references, "the tensor must keep the bytes alive"
    del out_RD
    assert sys.getrefcount(data) == references, "and let them go with itself"


@pytest.mark.parametrize("offset", range(9))
def test_a_view_is_aligned_whatever_the_offset(offset: int) -> None:
    data = bytes(offset) + struct.pack("<3f", 1.0, -2.0, 3.5)
    values = tensor_view(memoryview(data)[offset:], torch.float32)
    assert values.data_ptr() % 4 == 0
    assert values.tolist() == [1.0, -2.0, 3.5]


def test_the_bound_of_int8_is_not_met_by_a_block_twice_as_long() -> None:
    """The bound says something: one large value costs its own 64 columns their accuracy, and not their neighbours."""
    x_RD = torch.full((1, 128), 1e-3)
    x_RD[0, 0] = 1000.0
    out_RD = there_and_back(x_RD, Encoding.INT8)
    assert float(out_RD[0, 1]) == 0.0
    assert float(out_RD[0, 64]) == pytest.approx(1e-3)
