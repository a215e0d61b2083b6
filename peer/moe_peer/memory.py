"""What a graph holds, and what there is room for."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_net.config import RunConfig
from moe_net.experts.bank import memory_bytes
from moe_net.kernels.memory import Rows, dispatch_bytes, weight_grads_bytes
from moe_net.machine import available_memory_bytes
from moe_peer.device import first_line

log = logging.getLogger(__name__)

GPU_FAILURES = (RuntimeError, AssertionError)
"""What torch raises for a device that it cannot use: the second where it was built without CUDA."""


def find_device(asked: str | None) -> str:
    """The device asked for, or the first CUDA device if that computes, or the CPU. ValueError when the one asked for is
    not here, or does not compute."""
    n_devices = torch.cuda.device_count()
    if asked is None:
        if not n_devices:
            return "cpu"
        try:
            check_device("cuda")
        except GPU_FAILURES as error:
            log.warning("the CUDA device cannot be used, so experts run on the CPU: %s", first_line(error))
            return "cpu"
        return "cuda"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ValueError(f"device={asked!r}: {first_line(error)}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= n_devices):
        raise ValueError(f"device={asked!r}: there are {n_devices} CUDA devices here, and the CPU")
    if device.type == "cuda":
        try:
            check_device(asked)
        except GPU_FAILURES as error:
            raise ValueError(f"device={asked!r} cannot be used: {first_line(error)}") from error
    return asked


def check_device(device: str) -> None:
    """One tiny product; raises one of `GPU_FAILURES` when the device does not compute, or not right."""
    ones = torch.ones((16, 16), device=device)
    if float((ones @ ones)[0, 0]) != 16:
        raise RuntimeError("a product of ones came out wrong")


def memory_of_experts(device: str, run: RunConfig, *, max_batch_rows: int) -> tuple[int, int]:
    """(bytes available where the experts shall be, bytes of one). On a GPU what the largest call takes is taken off:
    its dispatch, or its part in the weights' gradients."""
    shape, model = run.model.expert_shape, run.model
    if torch.device(device).type == "cpu":
        return available_memory_bytes(), memory_bytes(1, shape)
    free, _ = torch.cuda.mem_get_info(device)
    rows = Rows(max_batch_rows, model.router.experts_per_token, model.n_experts, shape, item_bytes=2, backend="grouped")
    largest = max(dispatch_bytes(rows), weight_grads_bytes(rows, merged=True))
    return max(0, free - largest), memory_bytes(1, shape, compute_bytes=2)


@dataclass(slots=True)
class Saved:
    """Memory that autograd keeps for a backward."""

    of_storage: dict[int, int] = field(default_factory=dict[int, int])
    """Address of a storage -> its bytes."""

    @property
    def n_bytes(self) -> int:
        return sum(self.of_storage.values())


@contextmanager
def noting_saved(*, but: Sequence[Tensor]) -> Generator[Saved]:
    """The storages that graphs made inside keep alive, apart from those of `but` (the parameters)."""
    saved = Saved()
    known = {tensor.untyped_storage().data_ptr() for tensor in but}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved.of_storage[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved
