"""What a graph holds, and what there is room for."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


def free_memory_bytes() -> int:
    """Of this machine's memory, what is free just now."""
    names = os.sysconf_names
    # macOS does not say what is free: count on a quarter of what is there.
    free = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in names else os.sysconf("SC_PHYS_PAGES") // 4
    return free * os.sysconf("SC_PAGE_SIZE")


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
