"""Initialisation of the trunk: every parameter has its own generator, keyed by (seed, name).

So a parameter's first value depends on nothing else: not on the global generator, not on the order of construction,
not on which modules were injected beside it.
"""

# pyright: basic
from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose state depends on `seed` and `name` alone."""
    digest = hashlib.sha256(f"trunk/{seed}/{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def normal_(tensor: Tensor, *, seed: int, name: str, std: float) -> None:
    """Fill `tensor` with normal(0, std) drawn on the CPU in fp32; a meta tensor has nothing to fill."""
    if not tensor.is_meta:
        values = torch.empty(tensor.shape, device="cpu", dtype=torch.float32)
        tensor.copy_(values.normal_(0.0, std, generator=generator_for(seed, name)))
