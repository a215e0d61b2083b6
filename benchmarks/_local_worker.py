# pyright: basic
"""The same layer inside one process: no network, torch autograd, rows grouped by expert. Argument 1: width."""

from __future__ import annotations

import sys
from typing import Any

import torch
from _moe_task import (
    LEARNING_RATE,
    N_EXPERTS,
    by_expert,
    expert_weights,
    first_rows,
    gate_weight,
    timed_steps,
)
from _processes import die_with_parent, serve_requests
from torch import Tensor, nn


def main() -> None:
    die_with_parent()
    torch.set_num_threads(1)
    d_model = int(sys.argv[1])
    gate_ED = nn.Parameter(gate_weight(d_model))
    # One parameter per matrix: the gradient of a slice of a stacked one would be as large as the whole stack.
    experts = [[nn.Parameter(matrix) for matrix in expert_weights(index, d_model)] for index in range(N_EXPERTS)]
    # The weights' update of ours: AdamW after each step. The router is not trained by anybody here.
    optimizer = torch.optim.AdamW([matrix for pair in experts for matrix in pair], lr=LEARNING_RATE, fused=True)

    def run_expert(index: int, x_RD: Tensor) -> Tensor:
        w_in_DF, w_out_FD = experts[index]
        return nn.functional.gelu(x_RD @ w_in_DF) @ w_out_FD

    def layer(x_TD: Tensor) -> Tensor:
        return by_expert(x_TD, gate_ED, run_expert)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def steps(contestant: str, tokens: int, at_least_s: float, warm_up: bool) -> dict[str, Any]:
        del contestant
        return timed_steps(layer, tokens, d_model, at_least_s, warm_up, update)

    serve_requests({"steps": steps, "rows": lambda contestant: {"rows": first_rows(layer, d_model)}})


if __name__ == "__main__":
    main()
