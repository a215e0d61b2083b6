"""What a forward keeps has the bits that computing it again has, of any widths."""

from __future__ import annotations

import pytest
import torch

from moe_net.kernels import loop
from moe_net.kernels.types import ExpertWeights
from moe_net.types import Activation


@pytest.mark.parametrize(("d_model", "d_ff"), [(33, 17), (129, 257)])
def test_kept_pre_activations_give_the_same_bits_as_those_computed_again(d_model: int, d_ff: int) -> None:
    draw = torch.Generator().manual_seed(0)
    w_in, w_out = torch.randn(4, d_model, 2 * d_ff, generator=draw), torch.randn(4, d_ff, d_model, generator=draw)
    weights = ExpertWeights(w_in, w_out, Activation.SWIGLU)
    for rows in (1, 3, 9) * 5:
        x, dy = torch.randn(2, rows, d_model, generator=draw).unbind()
        ids = torch.randint(0, 4, (rows, 2), generator=draw, dtype=torch.int32)
        gates = torch.rand(rows, 2, generator=draw)
        _, saved = loop.forward(x, ids, gates, weights, keep=True)
        (*_, kept), (*_, again) = (loop.backward_rows(dy, x, ids, gates, weights, one) for one in (saved, None))
        assert all(torch.equal(a, b) for a, b in zip((*kept.a, *kept.dh), (*again.a, *again.dh), strict=True))
