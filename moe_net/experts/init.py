"""Expert weights from a counter-based generator: any peer can be any expert.

D model width, F expert width, H columns of the first projection (2F for SwiGLU: gate then up; F for GELU).
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from torch import Tensor

from moe_net.types import ExpertId, ExpertShape


def _normal(shape: tuple[int, int], std: float, *key: str | int) -> Tensor:
    """fp32 N(0, std^2) of `shape`; a function of `key` alone."""
    # JSON keeps ("a", "bc") and ("ab", "c") apart.
    digest = hashlib.sha256(json.dumps(["moe-net expert 1", *key]).encode()).digest()
    # Philox4x64 (Salmon et al., 2011) takes 128 bits of key. Drawn in fp64 and rounded once: the last bit of a
    # platform's log1p (the ziggurat's tail, 1 value in 3000) then has no way into the fp32 weights.
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    values = generator.standard_normal(shape)
    values *= std
    return torch.from_numpy(values.astype(np.float32))


def init_expert(expert: ExpertId, shape: ExpertShape, *, run: str, seed: int, init_std: float) -> tuple[Tensor, Tensor]:
    """(w_in [D, H], w_out [F, D]), fp32: normal with standard deviation `init_std`, both.

    Depends on (run, seed, layer, index) and on nothing else: not on the other experts of the peer, their order,
    torch's generator or its version.
    """
    key = (run, seed, expert.layer, expert.index)
    w_in_DH = _normal((shape.d_model, shape.d_hidden), init_std, *key, "w_in")
    w_out_FD = _normal((shape.d_ff, shape.d_model), init_std, *key, "w_out")
    return w_in_DH, w_out_FD
