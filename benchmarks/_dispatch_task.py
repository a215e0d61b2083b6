# pyright: basic
"""What a contestant of dispatch.py is given, and gives; how long it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe_net.types import Activation

MIB = 2**20
Step = Callable[[], tuple[torch.Tensor | None, ...]]


class Shape(NamedTuple):
    tokens: int
    d_model: int
    d_ff: int
    experts: int
    choices: int
    activation: Activation = Activation.SWIGLU


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


def make_task(shape: Shape, routing: str, seed: int, device: str, dtype: torch.dtype) -> Task:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    t, d, f, e, k, activation = shape
    popularity_E = torch.ones(e, device=device)
    if routing == "zipf":
        popularity_E = 1 / torch.arange(1, e + 1, device=device)
    # Gumbel top-k: k different experts for every token, drawn by popularity.
    noise_TE = torch.rand((t, e), generator=generator, device=device).log_().neg_()
    ids_TK = (popularity_E / noise_TE).topk(k, dim=1).indices
    gates_TK = torch.rand((t, k), generator=generator, device=device)
    h = 2 * f if activation is Activation.SWIGLU else f
    # D contiguous, as the Hopper backend wants it.
    w_in_EDH = normal(e, h, d).mul_(d**-0.5).transpose(1, 2)
    return Task(normal(t, d), ids_TK, gates_TK, normal(t, d), w_in_EDH, normal(e, f, d).mul_(f**-0.5), activation)


def time_ms(step: Step, n_steps: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(n_steps):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / n_steps
