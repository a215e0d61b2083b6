# pyright: basic
"""An MoE layer whose experts are somewhere else: route here, compute there, combine here.

B sequences, S positions, T = B*S tokens, D model width, L width that experts see, K experts per token, E experts.

    y_t = up(1/Z_t * sum over servers s of P_s(t)),   P_s(t) = sum over experts e of t on s of p_te * E_e(down(h_t))

The sum over servers is one autograd function. Dividing by Z is ordinary autograd, so that the gradient that
reaches the servers is already g/Z and the part of the gate gradient that goes through Z is never forgotten.
"""

from __future__ import annotations

from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from moe_net.model.config import ModelConfig
from moe_net.model.latent import LatentProjections
from moe_net.model.router import Router, Routing, combine_denominator
from moe_net.rpc.swarm import ExpertSwarm, LayerResult

ResultT = TypeVar("ResultT")


class Runner(Protocol):
    """Runs the swarm's coroutines for synchronous code: `rpc.portal.Portal` is one."""

    def run(self, work: Coroutine[Any, Any, ResultT], /) -> ResultT: ...

    def submit(self, work: Coroutine[Any, Any, ResultT], /) -> Future[ResultT]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmLink:
    """What every RemoteMoE of a model shares."""

    swarm: ExpertSwarm
    runner: Runner


class _RemoteSum(torch.autograd.Function):
    """(x_TL, gates_TK) -> sum over the servers' partial sums, and which pairs are in it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_TL: Tensor, gates_TK: Tensor, ids_TK: Tensor, link: SwarmLink, layer: int, step: int
    ) -> tuple[Tensor, Tensor]:
        # The swarm's values are fp32 whatever the trunk computes in.
        result: LayerResult = link.runner.run(
            link.swarm.forward(
                layer, x_TL.detach().float().contiguous(), ids_TK, gates_TK.detach().float(), step=step, train=True
            )
        )
        ctx.link, ctx.answered, ctx.gates_shape, ctx.dtypes = (  # type: ignore[attr-defined]
            link,
            result.answered,
            gates_TK.shape,
            (x_TL.dtype, gates_TK.dtype),
        )
        ctx.mark_non_differentiable(result.answered_TK)  # type: ignore[attr-defined]
        return result.y_TD.to(x_TL.dtype), result.answered_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TL: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx_TL, dgate = ctx.link.runner.run(
            ctx.link.swarm.backward(ctx.answered, grad_TL.float().contiguous(), ctx.gates_shape.numel())
        )
        x_dtype, gate_dtype = ctx.dtypes
        return dx_TL.to(x_dtype), dgate.view(ctx.gates_shape).to(gate_dtype), None, None, None, None


class RemoteMoE(nn.Module):
    """Router of one layer, its experts behind a swarm. Use it inside any PyTorch model.

    `step` names the optimizer step the rows belong to; the owner sets it before the step's first forward, and may give
    the layer another `link` between two steps. Nothing here changes during a step: any number of micro-batches may be
    in flight, each on a thread of its own.
    """

    def __init__(self, config: ModelConfig, layer: int, link: SwarmLink) -> None:
        super().__init__()
        self.layer = layer
        self.n_experts = config.n_experts
        self.combine = config.router.combine
        self.router = Router(config.router, config.d_model, config.n_experts, layer=layer)
        self.latent = LatentProjections(config, layer)
        self.step = 0
        self.link = link

    def forward(self, h_BSD: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Routing]:
        """(B, S, D) -> (B, S, D) and the routing, with its losses; experts that did not answer are not in y."""
        swarm, bound = self.link.swarm, self.router.config.latency_bias
        live_E = swarm.live(self.layer, self.n_experts)
        bias_E = swarm.latency_bias(self.layer, self.n_experts, bound=bound)
        routing = self.router(h_BSD, live_E=live_E, bias_E=bias_E, generator=generator)
        x_TL = self.latent.down(h_BSD)
        ids_TK, gates_TK = routing.expert_ids_TK, routing.gates_TK
        if torch.is_grad_enabled():
            sum_TL, answered_TK = _RemoteSum.apply(x_TL, gates_TK, ids_TK, self.link, self.layer, self.step)  # type: ignore[misc]
        else:
            result = self.link.runner.run(
                self.link.swarm.forward(
                    self.layer, x_TL.float().contiguous(), ids_TK, gates_TK.float(), step=self.step, train=False
                )
            )
            sum_TL, answered_TK = result.y_TD.to(x_TL.dtype), result.answered_TK
        z_T = combine_denominator(gates_TK, answered_TK, self.combine)
        return self.latent.up(sum_TL / z_T[:, None].to(sum_TL.dtype), h_BSD), routing
