"""A message's matrices on the device: read and written as the CPU's codec does it, and found wrong as there."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE
from torch import Tensor

from moe_net.errors import WireError
from moe_net.kernels.device.matrices import OnDevice
from moe_net.kernels.dispatch import matrices_on
from moe_net.types import Encoding
from moe_net.wire import compress
from moe_net.wire.matrices import ON_CPU

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOME = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
SIZES: dict[str, Any] = {
    "n_rows": st.integers(1, 5),
    "width": st.sampled_from([1, 4, 60, 63, 64, 65, 68, 200]),
    "encoding": st.sampled_from(Encoding),
    "seed": st.integers(0, 99),
}


def on_device(dtype: torch.dtype = torch.float32) -> OnDevice:
    return OnDevice(torch.device(DEVICE), dtype)


def landed(matrices: OnDevice, data: memoryview, n_rows: int, width: int, encoding: Encoding) -> Tensor:
    promised = matrices.read(data, n_rows, width, encoding, "x")
    assert promised.shape == (n_rows, width)
    assert promised.nbytes >= len(data) - 4 * n_rows, "what waits is counted by this"
    got = matrices.land(promised)
    matrices.arrival().synchronize()
    return got


def shipped(matrices: OnDevice, y_RD: Tensor, encoding: Encoding) -> memoryview:
    sent = matrices.ship(y_RD.to(DEVICE), encoding)
    matrices.arrival().synchronize()
    return matrices.write(sent, encoding)


def random_rows(n_rows: int, width: int, seed: int) -> Tensor:
    x_RD = torch.randn((n_rows, width), generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
    x_RD[0, : width // 2] = 0
    return x_RD


def assert_rounded(got: Tensor, right: Tensor) -> None:
    """The nearest number of its dtype; Triton's interpreter takes the next one towards zero instead, in bf16."""
    if DEVICE == "cpu" and got.dtype is torch.bfloat16:
        torch.testing.assert_close(got.float(), right.to(got.dtype).float(), rtol=2**-7, atol=0)
    else:
        assert torch.equal(got.cpu(), right.to(got.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(**SIZES)
@SOME
def test_rows_are_read_as_the_cpu_reads_them(
    dtype: torch.dtype, n_rows: int, width: int, encoding: Encoding, seed: int
) -> None:
    data = compress.encode(random_rows(n_rows, width, seed), encoding)
    # Wherever the message has it.
    message = memoryview(b"x" * (seed % 5) + bytes(data))[seed % 5 :]
    got = landed(on_device(dtype), message, n_rows, width, encoding)
    assert got.device.type == DEVICE
    assert got.dtype is dtype
    assert_rounded(got, ON_CPU.read(data, n_rows, width, encoding, "x"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(**SIZES)
@SOME
def test_rows_are_written_as_the_cpu_writes_them(
    dtype: torch.dtype, n_rows: int, width: int, encoding: Encoding, seed: int
) -> None:
    x_RD = random_rows(n_rows, width, seed).to(dtype)
    written = shipped(on_device(dtype), x_RD, encoding)
    assert len(written) == compress.payload_bytes(n_rows, width, encoding)
    got = compress.decode(written, n_rows, width, encoding)
    right = compress.decode(compress.encode(x_RD.float(), encoding), n_rows, width, encoding)
    if encoding is Encoding.INT8:  # halves are rounded away from zero here, to even there
        bound_R = x_RD.float().abs().amax(1, keepdim=True) / 253.9 + 2.0**-142
        assert bool(((got - x_RD.float()).abs() <= bound_R).all())
    elif encoding is Encoding.BF16:
        assert_rounded(got.to(torch.bfloat16), right)
    else:
        assert torch.equal(got, right)


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(encoding: Encoding, value: float) -> None:
    x_RD = torch.ones((3, 128))
    x_RD[2, 70] = value
    matrices = on_device()
    for data in (compress.encode(x_RD, encoding), shipped(matrices, x_RD, encoding)):
        with pytest.raises(WireError, match="grad: holds an infinity or NaN"):
            matrices.read(data, 3, 128, encoding, "grad")


# Of numpy, which the interpreter computes with.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_beyond_what_the_experts_compute_in_becomes_the_largest_of_that(dtype: torch.dtype) -> None:
    largest = torch.finfo(torch.float32).max
    matrices, most = on_device(dtype), min(largest, torch.finfo(dtype).max)
    for encoding in (Encoding.FP32, Encoding.INT8):
        data = compress.encode(torch.full((1, 64), -largest), encoding)
        got = landed(matrices, data, 1, 64, encoding).cpu().float()
        torch.testing.assert_close(got, torch.full((1, 64), -most), rtol=0.01, atol=0)
    # A hostile scale: finite, and its products are not.
    data = memoryview(bytes([127]) * 64 + torch.tensor([largest]).numpy().tobytes())
    assert landed(matrices, data, 1, 64, Encoding.INT8).isfinite().all()


@pytest.mark.parametrize("encoding", [Encoding.BF16, Encoding.FP16, Encoding.INT8])
def test_the_largest_numbers_survive_and_the_smallest_become_zero(encoding: Encoding) -> None:
    largest = torch.finfo(torch.float32).max
    x_RD = torch.zeros((1, 128))
    x_RD[0, 0], x_RD[0, 64] = largest, 1e-41
    got = compress.decode(shipped(on_device(), x_RD, encoding), 1, 128, encoding)
    assert float(got[0, 0]) == pytest.approx(65504.0 if encoding is Encoding.FP16 else largest, rel=0.01)
    assert bool((got[0, 1:].abs() < 1e-38).all())


@pytest.mark.parametrize("encoding", Encoding)
def test_what_was_shipped_in_one_encoding_can_be_written_in_another(encoding: Encoding) -> None:
    x_RD = random_rows(3, 64, 5)
    matrices = on_device()
    sent = matrices.ship(x_RD.to(DEVICE), Encoding.INT8)
    matrices.arrival().synchronize()
    if encoding is not Encoding.INT8:
        assert bytes(matrices.write(sent, encoding)) == bytes(compress.encode(x_RD, encoding))


def test_a_small_part_of_a_message_does_not_keep_the_whole() -> None:
    message = bytes(1000)
    held = sys.getrefcount(message)
    large, small = (on_device().read(memoryview(message)[:n], 1, n // 4, Encoding.FP32, "x") for n in (900, 100))
    # To a GPU no bytes go from where they are.
    assert sys.getrefcount(message) == held + (DEVICE == "cpu")
    assert (large.shape, small.shape) == ((1, 225), (1, 25))


@pytest.mark.parametrize("device", sorted({"cpu", DEVICE}))
def test_the_device_that_has_the_experts_reads_for_them(device: str) -> None:
    matrices = matrices_on(torch.device(device), torch.float32 if device == "cpu" else torch.bfloat16)
    assert matrices is ON_CPU if device == "cpu" else isinstance(matrices, OnDevice)
