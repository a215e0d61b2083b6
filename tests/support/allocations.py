"""The most memory that tensors hold while something runs, on a GPU or counted as a GPU's allocator would."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_GRAIN_BYTES = 512


class _Allocations(TorchDispatchMode):
    """Looks, after each operator, at what the storages that it and those before it made take while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        storages = {leaf.untyped_storage()._cdata for leaf in given}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # What was given, even if it has another storage now, and views of it are no allocations.
            if isinstance(leaf, Tensor) and not any(leaf is tensor for tensor in given):
                storage = leaf.untyped_storage()
                if storage._cdata not in storages:
                    self._storages[storage._cdata] = weakref.ref(storage)
        if self._held_bytes() > self.peak:
            gc.collect()  # Triton's interpreter leaves cycles.
            self.peak = max(self.peak, self._held_bytes())
        return result

    def _held_bytes(self) -> int:
        alive = {key: storage for key, ref in self._storages.items() if (storage := ref()) is not None}
        self._storages = {key: self._storages[key] for key in alive}
        return sum(-(-storage.nbytes() // _GRAIN_BYTES) * _GRAIN_BYTES for storage in alive.values())


def peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes of what `step` allocates that are held at once, what it returns included.

    On a GPU it runs twice: kernels load first.
    """
    if not torch.cuda.is_available():
        with _Allocations() as allocations:
            held = step()
        del held
        return allocations.peak
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = step()
    taken = torch.cuda.max_memory_allocated() - before
    del held
    return taken
