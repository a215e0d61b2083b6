"""The router: which experts each token goes to, and with which weight.

B sequences, S positions of each, T = B * S tokens (row `b * S + s`), D model width, E experts, K experts per token,
N = T * K (token, choice) pairs.
"""

# pyright: basic
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_net.errors import NoLiveExpertsError
from moe_net.model import losses
from moe_net.model.config import RouterConfig
from moe_net.model.init import normal_

# Below this sum of gates a token counts as unanswered: fp32 holds 1 / 1e-20 and its product with a gradient, and an
# expert with such a gate was picked by the selection bias against the router's own opinion.
SMALLEST_GATE_SUM = 1e-20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """What the router decided for T tokens."""

    expert_ids_TK: Tensor
    """int64, best first; -1 where the pair was dropped by the capacity, or fewer than K experts live."""
    gates_TK: Tensor
    """Softmax probability of each chosen expert, differentiable, at least fp32; 0 where the id is -1."""
    logits_TE: Tensor
    """Router logits without the selection bias, of all experts, live or not."""
    probs_TE: Tensor
    """Softmax over the live experts; 0 at the others."""
    balance_loss: Tensor
    """Scalar, not yet weighted (`losses.balance_loss`)."""
    z_loss: Tensor
    """Scalar, not yet weighted (`losses.z_loss`)."""
    load_E: Tensor
    """int64: pairs chosen per expert, before the capacity limit."""
    overflow: Tensor
    """int64 scalar: pairs dropped by the capacity limit."""
    moved: Tensor
    """int64 scalar: pairs whose expert was chosen only because of `bias_E` (latency, reachability)."""


def combine_denominator(gates_TK: Tensor, answered_TK: Tensor, mode: str) -> Tensor:
    """Z of `y = sum_s P_s / Z` (P_s: the sum of server s), shape [T], differentiable in the gates.

    "normalized": the sum of the gates over the pairs that answered; pairs dropped by capacity did not. (GShard
    divides before it drops, so there a dropped second choice shrinks the token's output; here it does not.)
    "raw": 1 (Switch, eq. 2). A token with no answer gets Z = 1: its sum is 0, so it passes through the residual.

    Args:
        answered_TK: bool; pairs whose expert ran.
        mode: `RouterConfig.combine`; ValueError if it is neither.
    """
    if mode not in ("normalized", "raw"):
        raise ValueError(f'combine={mode!r} is neither "normalized" nor "raw"')
    if mode == "raw":
        return torch.ones_like(gates_TK[:, 0])
    total_T = gates_TK.masked_fill(~answered_TK, 0.0).sum(1)
    return torch.where(total_T > SMALLEST_GATE_SUM, total_T, torch.ones_like(total_T))


def expert_capacity(factor: float, *, n_tokens: int, experts_per_token: int, n_experts: int) -> int:
    """Pairs one expert takes: `ceil(factor * T * K / E)` (Switch, section 2.2, eq. 3, for K = 1).

    A multiple of the fair share of pairs, so GShard's capacity for top-2, 2T/E (algorithm 1), is the factor 1. E
    counts dead experts too: the limit is what an expert can carry, and that does not grow when others leave.
    """
    return math.ceil(factor * n_tokens * experts_per_token / n_experts)


def _first_of_each_expert(ids_N: Tensor, priority_N: Tensor, *, n_experts: int, capacity: int) -> Tensor:
    """bool [N]: the pair is among its expert's first `capacity` in the order of `priority_N` (a permutation)."""
    ids_N = torch.where(ids_N < 0, n_experts, ids_N)
    # A stable sort by expert keeps the priority order inside each expert: [N] numbers instead of an [N, E] cumsum.
    order_N = priority_N[ids_N[priority_N].argsort(stable=True)]
    count_E1 = ids_N.new_zeros(n_experts + 1).scatter_add_(0, ids_N, torch.ones_like(ids_N))
    first_E1 = count_E1.cumsum(0) - count_E1
    rank_N = torch.arange(len(ids_N), device=ids_N.device) - first_E1[ids_N[order_N]]
    return torch.empty_like(ids_N, dtype=torch.bool).scatter_(0, order_N, rank_N < capacity)


class Router(nn.Module):
    """Top-k softmax router (Shazeer et al., 2017; Switch, section 2.1), in fp32 whatever surrounds it.

    Selective precision (Switch, section 2.4): the weight stays fp32 under `.half()` and `.bfloat16()`, and the
    computation is fp32 under autocast. `.double()` is allowed, for numerical tests.
    """

    def __init__(
        self,
        config: RouterConfig,
        d_model: int,
        n_experts: int,
        *,
        layer: int = 0,
        seed: int = 0,
        init_std: float = 0.02,
    ) -> None:
        """`layer` names the layer in errors and keys the initial weights; ValueError if k exceeds `n_experts`."""
        super().__init__()
        if not 1 <= config.experts_per_token <= n_experts:
            raise ValueError(f"experts_per_token={config.experts_per_token} is not in 1..n_experts={n_experts}")
        self.config = config
        self.layer = layer
        self.weight = nn.Parameter(torch.empty(n_experts, d_model, dtype=torch.float32))
        # The part of the selection bias that balances the load; latency and reachability come in through `bias_E`.
        self.register_buffer("balance_bias_E", torch.zeros(n_experts, dtype=torch.float32))
        self.balance_bias_E: Tensor
        self.reset_parameters(seed=seed, std=init_std)

    def reset_parameters(self, *, seed: int, std: float) -> None:
        """Draw the weight anew; it depends on (seed, layer, std) alone."""
        normal_(self.weight, seed=seed, name=f"layers.{self.layer}.router.weight", std=std)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrower = moved.is_floating_point() and moved.element_size() < 4
            return tensor.to(moved.device) if narrower else moved

        return super()._apply(keep_precision, recurse)

    def update_balance_bias(self, load_E: Tensor, live_E: Tensor | None = None) -> None:
        """One step of loss-free balancing with the load of a training step (`losses.updated_bias`)."""
        if self.config.bias_update_rate > 0:
            with torch.no_grad():
                rate = self.config.bias_update_rate
                self.balance_bias_E.copy_(losses.updated_bias(self.balance_bias_E, load_E, rate, live_E=live_E))

    def forward(
        self,
        x_BSD: Tensor,
        *,
        live_E: Tensor | None = None,
        bias_E: Tensor | None = None,
        generator: torch.Generator | None = None,
        causal: bool = True,
    ) -> Routing:
        """Route the tokens of B sequences; the results are flat, token (b, s) in row `b * S + s`.

        Both the top-k and the softmax are over the live experts only: a dead expert takes no probability, so
        raw gates are those of a router that never had it. Top-k picks by `logit + balance_bias_E + bias_E`; the
        bias is in no gate and in no loss. If fewer than K experts live, the last choices are -1.

        Capacity: `capacity_factor` in training, `eval_capacity_factor` in evaluation, 0 for none. With
        overflow="position" pairs are served position by position; within a position first choices before second
        ones, then sequence by sequence. GShard (algorithm 1) serves all first choices of the batch before any
        second one: there a later token's first choice can push out an earlier token's second, which in a causal
        model leaks the future. Here a token depends on no later position, neither of its own sequence nor of others
        in the batch. "lowest_gate" (batch prioritised routing; Riquelme et al., 2021, section 4.1) keeps the highest
        gates instead, and is refused when `causal`.

        Args:
            x_BSD: any floating dtype.
            live_E: bool, experts with a live replica; None: all. On the CPU it costs no device synchronisation.
            bias_E: added to the logits for the selection.
            generator: of the jitter; needed in training if `jitter` > 0.
            causal: the tokens of a sequence are predicted from earlier ones.

        Raises:
            NoLiveExpertsError: no expert of this layer is live.
            ValueError: jitter without a generator, or overflow="lowest_gate" with `causal`.
        """
        config = self.config
        if causal and config.overflow == "lowest_gate":
            raise ValueError(
                'overflow="lowest_gate" leaks the future: in a causal model whether a token keeps its expert would '
                'depend on the gates of later tokens. Use overflow="position"'
            )
        n_experts = self.weight.shape[0]
        n_live = n_experts if live_E is None else int(live_E.sum())
        if not n_live:
            raise NoLiveExpertsError(
                f"no live expert in layer {self.layer} (of {n_experts}). Start a peer with --experts {self.layer}.*"
            )
        if n_live == n_experts:
            live_E = None  # as nearly always; without masks a router takes a third less
        with torch.autocast(device_type=x_BSD.device.type, enabled=False):
            x_TD = self._jittered(x_BSD.to(self.weight.dtype), generator).flatten(0, 1)
            logits_TE = x_TD @ self.weight.t()
            dead_E = None if live_E is None else ~live_E.to(x_TD.device)
            masked_TE = logits_TE if dead_E is None else logits_TE.masked_fill(dead_E, -torch.inf)
            probs_TE = masked_TE.softmax(1)
            score_TE = masked_TE.detach() + self.balance_bias_E
            k = config.experts_per_token
            moved = overflow = torch.zeros((), dtype=torch.int64, device=x_TD.device)
            if bias_E is None:
                ids_TK = score_TE.topk(k, dim=1).indices
            else:
                ids_TK = (score_TE + bias_E.to(score_TE)).topk(k, dim=1).indices
                moved = (ids_TK.unsqueeze(2) != score_TE.topk(k, dim=1).indices.unsqueeze(1)).all(2).sum()
            gates_TK = probs_TE.gather(1, ids_TK)  # 0 for a dead expert
            count_TK = torch.ones_like(ids_TK) if dead_E is None else (~dead_E[ids_TK]).to(ids_TK.dtype)
            load_E = ids_TK.new_zeros(n_experts).scatter_add_(0, ids_TK.flatten(), count_TK.flatten())
            if dead_E is not None:
                ids_TK = ids_TK.masked_fill(dead_E[ids_TK], -1)
            over_TK = self._beyond_capacity(ids_TK, gates_TK.detach(), seq_len=x_BSD.shape[1])
            if over_TK is not None:
                ids_TK, gates_TK = ids_TK.masked_fill(over_TK, -1), gates_TK.masked_fill(over_TK, 0.0)
                overflow = over_TK.sum()
            return Routing(
                expert_ids_TK=ids_TK,
                gates_TK=gates_TK,
                logits_TE=logits_TE,
                probs_TE=probs_TE,
                balance_loss=losses.balance_loss(probs_TE, load_E, live_E=live_E),
                z_loss=losses.z_loss(logits_TE, live_E=live_E),
                load_E=load_E,
                overflow=overflow,
                moved=moved,
            )

    def _jittered(self, x_BSD: Tensor, generator: torch.Generator | None) -> Tensor:
        """Multiply by uniform(1 - jitter, 1 + jitter), in training only (Switch, section 2.4)."""
        jitter = self.config.jitter
        if not self.training or jitter == 0.0:
            return x_BSD
        if generator is None:
            raise ValueError(f"router of layer {self.layer}: jitter={jitter} in training needs an explicit generator")
        noise_BSD = torch.rand(x_BSD.shape, generator=generator, device=generator.device, dtype=torch.float32)
        return x_BSD * (1.0 + jitter * (2.0 * noise_BSD.to(x_BSD) - 1.0))

    def _beyond_capacity(self, ids_TK: Tensor, gates_TK: Tensor, *, seq_len: int) -> Tensor | None:
        """bool [T, K]: the pair has an expert, and does not fit into its capacity; None: there is no limit."""
        config = self.config
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if factor == 0.0:
            return None
        n_tokens, k = ids_TK.shape
        n_experts = self.weight.shape[0]
        if config.overflow == "position":
            pair_BSK = torch.arange(n_tokens * k, device=ids_TK.device).view(n_tokens // max(1, seq_len), seq_len, k)
            priority_N = pair_BSK.permute(1, 2, 0).flatten()
        else:
            priority_N = gates_TK.flatten().argsort(descending=True, stable=True)
        capacity = expert_capacity(factor, n_tokens=n_tokens, experts_per_token=k, n_experts=n_experts)
        kept_N = _first_of_each_expert(ids_TK.flatten(), priority_N, n_experts=n_experts, capacity=capacity)
        return ~kept_N.view(n_tokens, k) & (ids_TK >= 0)
