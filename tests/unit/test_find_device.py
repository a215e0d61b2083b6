"""Where experts run: a GPU that does not compute is no place for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_peer import memory
from moe_peer.memory import find_device


def failing(error: Exception) -> Callable[[str], None]:
    def check(device: str) -> None:
        raise error

    return check


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nCompile with..."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
)
def test_a_gpu_that_does_not_compute_is_left_for_the_cpu_unless_asked_for(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(memory, "check_device", failing(error))
    why = str(error).splitlines()[0]
    assert find_device(None) == "cpu"
    assert caplog.messages == [f"the CUDA device cannot be used, so experts run on the CPU: {why}"]
    assert find_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="device='cuda:0' cannot be used") as refused:
        find_device("cuda:0")
    assert str(refused.value).endswith(why)


def test_the_check_is_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.check_device("cpu")
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(16, 16))
    with pytest.raises(RuntimeError, match="came out wrong"):
        memory.check_device("cpu")


def test_a_gpu_that_computes_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(memory, "check_device", lambda device: None)
    assert find_device(None) == "cuda"
    with pytest.raises(ValueError, match="there are 1 CUDA devices here"):
        find_device("cuda:1")
