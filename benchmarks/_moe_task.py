# pyright: basic
"""The work every contestant of vs_hivemind.py does: one MoE layer, same weights, same rows, same routing.

T tokens, D model width, F = 4 D inner width of an expert, E experts, K = 2 experts per token.
Router: linear without bias, top-2 of the logits, softmax over the two. Expert: D -> F -> D, GELU (exact), no bias.
A step is forward, then backward with a fixed dLoss/dy; the gradient of the input is computed by everybody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from _processes import time_calls
from torch import Tensor

N_EXPERTS = 8
EXPERTS_PER_TOKEN = 2
LEARNING_RATE = 1e-4


def expert_weights(index: int, d_model: int) -> tuple[Tensor, Tensor]:
    """(w_in [D, F], w_out [F, D]) of one expert, the same in every process."""
    generator = torch.Generator().manual_seed(1000 + index)
    w_in_DF = torch.randn(d_model, 4 * d_model, generator=generator) * d_model**-0.5
    w_out_FD = torch.randn(4 * d_model, d_model, generator=generator) * (4 * d_model) ** -0.5
    return w_in_DF, w_out_FD


def gate_weight(d_model: int) -> Tensor:
    """[E, D]."""
    return torch.randn(N_EXPERTS, d_model, generator=torch.Generator().manual_seed(7)) * d_model**-0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    x_TD: Tensor
    dy_TD: Tensor

    @staticmethod
    def make(tokens: int, d_model: int) -> Batch:
        generator = torch.Generator().manual_seed(tokens)
        x_TD = torch.randn(tokens, d_model, generator=generator)
        return Batch(x_TD=x_TD, dy_TD=torch.randn(tokens, d_model, generator=generator) / tokens)


def route(x_TD: Tensor, gate_ED: Tensor) -> tuple[Tensor, Tensor]:
    """(expert_ids [T, K], gates [T, K]), differentiable in x and the gate weight."""
    top = (x_TD @ gate_ED.T).topk(EXPERTS_PER_TOKEN, dim=-1)
    return top.indices, top.values.softmax(-1)


def by_expert(x_TD: Tensor, gate_ED: Tensor, run_expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Group rows by expert, run each expert once, sum what it gives: y [T, D]."""
    ids_TK, gates_TK = route(x_TD, gate_ED)
    y_TD = torch.zeros_like(x_TD)
    for expert in range(N_EXPERTS):
        token_R, slot_R = (ids_TK == expert).nonzero(as_tuple=True)
        if len(token_R):
            y_RD = run_expert(expert, x_TD[token_R])
            y_TD = y_TD.index_add(0, token_R, y_RD * gates_TK[token_R, slot_R, None])
    return y_TD


Layer = Callable[[Tensor], Tensor]


def step(layer: Layer, batch: Batch, after_backward: Callable[[], object] | None = None) -> None:
    """One forward and backward of `layer`; AssertionError when no finite input gradient came."""
    x_TD = batch.x_TD.clone().requires_grad_()
    layer(x_TD).backward(batch.dy_TD)
    assert x_TD.grad is not None
    assert bool(x_TD.grad.isfinite().all())
    if after_backward is not None:
        after_backward()


def first_rows(layer: Layer, d_model: int) -> list[list[float]]:
    """Output for 16 tokens, 8 columns each, before any training step: to compare contestants."""
    with torch.no_grad():
        return layer(Batch.make(16, d_model).x_TD.clone())[:, :8].tolist()


def timed_steps(
    layer: Layer,
    tokens: int,
    d_model: int,
    at_least_s: float,
    warm_up: bool,
    after_backward: Callable[[], object] | None = None,
) -> dict[str, object]:
    """Seconds of each step, after one that is not counted if `warm_up`."""
    batch = Batch.make(tokens, d_model)
    if warm_up:
        step(layer, batch, after_backward)
    return {"seconds": time_calls(lambda: step(layer, batch, after_backward), at_least_s)}
