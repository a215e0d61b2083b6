# pyright: basic
"""Custom expert for hivemind's server (`--custom_module_path`): plain GELU FFN, so that arithmetic is equal to ours.

hivemind's own `ffn` adds biases, a residual and a LayerNorm behind the same two matrices.
"""

from __future__ import annotations

import itertools

import torch
from _moe_task import expert_weights
from hivemind.moe import register_expert_class
from torch import Tensor, nn

# The server builds its experts one after the other in the order of --expert_uids.
_next_index = itertools.count()


@register_expert_class("plain_gelu_ffn", lambda batch_size, hid_dim: torch.empty((batch_size, hid_dim)))
class PlainGeluFFN(nn.Module):
    def __init__(self, hid_dim: int) -> None:
        super().__init__()
        w_in_DF, w_out_FD = expert_weights(next(_next_index), hid_dim)
        self.w_in_DF = nn.Parameter(w_in_DF)
        self.w_out_FD = nn.Parameter(w_out_FD)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x @ self.w_in_DF) @ self.w_out_FD
