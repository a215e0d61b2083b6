"""A message's matrices on the device: read and written as the CPU's codec does it, and found wrong as there."""

from __future__ import annotations

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
    got = on_device(dtype).read(message, n_rows, width, encoding, "x")
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
    written = on_device(dtype).write(x_RD.to(DEVICE), encoding)
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
def test_what_is_not_finite_is_refused_and_the_next_message_is_not(encoding: Encoding, value: float) -> None:
    x_RD = torch.ones((3, 128))
    sound = memoryview(bytes(compress.encode(x_RD, encoding)))
    x_RD[2, 70] = value
    matrices = on_device()
    for rows in (compress.encode(x_RD, encoding), matrices.write(x_RD.to(DEVICE), encoding)):
        with pytest.raises(WireError, match="grad: holds an infinity, NaN"):
            matrices.read(rows, 3, 128, encoding, "grad")
        assert bool((matrices.read(sound, 3, 128, encoding, "grad").cpu() - 1 < 0.01).all())


# Of numpy, which the interpreter casts with.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_a_value_that_the_experts_dtype_has_no_number_for_is_refused() -> None:
    data = compress.encode(torch.full((1, 64), 1e5), Encoding.FP32)
    with pytest.raises(WireError, match=r"x: .* beyond what torch.float16 has"):
        on_device(torch.float16).read(data, 1, 64, Encoding.FP32, "x")
    assert on_device(torch.bfloat16).read(data, 1, 64, Encoding.FP32, "x").isfinite().all()


@pytest.mark.parametrize("encoding", [Encoding.BF16, Encoding.FP16, Encoding.INT8])
def test_the_largest_numbers_survive_and_the_smallest_become_zero(encoding: Encoding) -> None:
    largest = torch.finfo(torch.float32).max
    x_RD = torch.zeros((1, 128))
    x_RD[0, 0], x_RD[0, 64] = largest, 1e-41
    got = compress.decode(on_device().write(x_RD.to(DEVICE), encoding), 1, 128, encoding)
    assert float(got[0, 0]) == pytest.approx(65504.0 if encoding is Encoding.FP16 else largest, rel=0.01)
    assert bool((got[0, 1:].abs() < 1e-38).all())


def test_the_cpu_reads_for_experts_on_the_cpu() -> None:
    assert matrices_on(torch.device("cpu"), torch.float32) is ON_CPU


@pytest.mark.parametrize("dtype", [torch.bfloat16] if DEVICE == "cuda" else [])
def test_a_gpu_reads_for_experts_on_the_gpu(dtype: torch.dtype) -> None:
    assert isinstance(matrices_on(torch.device("cuda"), dtype), OnDevice)
