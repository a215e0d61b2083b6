# pyright: basic
"""What a contestant of dispatch.py is given, and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_net.types import Activation

Step = Callable[[], tuple[torch.Tensor | None, ...]]


@dataclass(slots=True)
class Task:
    """One shape with fresh random data; weights as the kernels want them (see `ExpertWeights`)."""

    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    gates_TK: torch.Tensor
    dy_TD: torch.Tensor
    w_in_EDH: torch.Tensor
    w_out_EFD: torch.Tensor
    activation: Activation

    @property
    def gated(self) -> bool:
        return self.activation is Activation.SWIGLU

    def sent(self, values_TK: torch.Tensor) -> torch.Tensor:
        """Where a server has a call's ids and gates: on the host, from where a GPU reads them."""
        values_TK = values_TK if values_TK.is_floating_point() else values_TK.int()
        return values_TK.cpu().pin_memory() if values_TK.is_cuda else values_TK

    def leaves(self) -> list[torch.Tensor]:
        values = (self.x_TD, self.gates_TK, self.w_in_EDH, self.w_out_EFD)
        return [value.detach().requires_grad_() for value in values]
