"""All experts of a layer in this process: the model without a swarm, and the oracle of "remote = local".

B sequences, S positions, T = B * S tokens, D model width, L width that experts see (D too, in the names of their
weights), E experts, K experts per token, F their inner width, H columns of the first projection (2F for SwiGLU: gate
then up; F for GELU).
"""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_net.experts.init import init_expert
from moe_net.kernels.dispatch import ExpertWeights, moe_ffn
from moe_net.model.config import ModelConfig
from moe_net.model.latent import LatentProjections
from moe_net.model.router import Router, Routing, combine_denominator
from moe_net.types import Activation, ExpertId


class LocalMoE(nn.Module):
    """Router and stacked experts of one layer; the weights are those that peers of the same run start with."""

    def __init__(
        self, config: ModelConfig, layer: int, *, run: str = "demo", seed: int = 0, backend: str | None = None
    ) -> None:
        """`run`, `seed` and `config.init_std` must be the run's; `backend` as in `kernels.dispatch`."""
        super().__init__()
        shape = config.expert_shape
        self.combine = config.router.combine
        self.activation: Activation = shape.activation
        self.backend = backend
        self.router = Router(
            config.router, config.d_model, config.n_experts, layer=layer, seed=seed, init_std=config.init_std
        )
        self.latent = LatentProjections(config, layer, seed=seed)
        self.w_in_EDH = nn.Parameter(torch.empty(config.n_experts, shape.d_model, shape.d_hidden))
        self.w_out_EFD = nn.Parameter(torch.empty(config.n_experts, shape.d_ff, shape.d_model))
        if not self.w_in_EDH.is_meta:
            with torch.no_grad():
                for index in range(config.n_experts):
                    w_in_DH, w_out_FD = init_expert(
                        ExpertId(layer, index), shape, run=run, seed=seed, init_std=config.init_std
                    )
                    self.w_in_EDH[index].copy_(w_in_DH)
                    self.w_out_EFD[index].copy_(w_out_FD)

    def forward(
        self,
        h_BSD: Tensor,
        *,
        live_E: Tensor | None = None,
        bias_E: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Routing]:
        """`y = up(sum_k gate_k E_k(down(h)) / Z)` in h's shape and dtype, and how it was routed.

        A token none of whose pairs ran gets 0, so it passes through the block's residual.
        The keywords are those of `Router.forward`.
        """
        routing = self.router(h_BSD, live_E=live_E, bias_E=bias_E, generator=generator)
        weights = ExpertWeights(self.w_in_EDH, self.w_out_EFD, self.activation)
        x_TL = self.latent.down(h_BSD).to(self.w_in_EDH.dtype)
        y_TL = moe_ffn(x_TL, routing.expert_ids_TK, routing.gates_TK, weights, backend=self.backend)
        z_T = combine_denominator(routing.gates_TK, routing.expert_ids_TK >= 0, self.combine)
        return self.latent.up(y_TL / z_T[:, None], h_BSD), routing
