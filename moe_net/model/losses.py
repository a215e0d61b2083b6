"""Router losses and the loss-free balance rule, as pure functions of what the router computed.

T tokens, E experts. Experts that are not live count for nothing: the losses are those of the live experts alone.
"""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor

from moe_net.model.config import RouterConfig


def balance_loss(probs_TE: Tensor, load_E: Tensor, *, live_E: Tensor | None = None) -> Tensor:
    """Load-balance loss `E * sum_e f_e * P_e` (Switch Transformers, section 2.2, eq. 4-6).

    f_e is the share of the chosen (token, expert) pairs that went to expert e, P_e its mean router probability.
    For k > 1 (GShard, algorithm 1; GLaM, section 4) f still sums to 1 over the experts, so a uniform router has the
    loss 1 for every k; codes that divide the pairs by T alone (Mixtral's in `transformers`) get k times this.
    f is a count and has no gradient; the gradient flows through P.

    Args:
        probs_TE: softmax over the live experts; 0 at the others.
        load_E: pairs chosen per expert, before any capacity limit.
        live_E: bool; None: all live. E in the formula is the number of live experts.
    """
    f_E = load_E.to(probs_TE.dtype) / load_E.sum().clamp(min=1)
    p_E = probs_TE.sum(0) / max(1, probs_TE.shape[0])
    n_live = load_E.shape[0] if live_E is None else live_E.sum().to(p_E.device)
    return n_live * (f_E.to(p_E.device) * p_E).sum()


def z_loss(logits_TE: Tensor, *, live_E: Tensor | None = None) -> Tensor:
    """Router z-loss `mean_t (log sum_e exp x_te)^2` over the live experts (ST-MoE, section 3.3, eq. 5).

    Args:
        logits_TE: router logits without selection bias.
        live_E: bool, at least one true; None: all live.
    """
    if live_E is not None:
        logits_TE = logits_TE.masked_fill(~live_E.to(logits_TE.device), -torch.inf)
    return logits_TE.logsumexp(1).square().sum() / max(1, logits_TE.shape[0])


def updated_bias(bias_E: Tensor, load_E: Tensor, rate: float, *, live_E: Tensor | None = None) -> Tensor:
    """The selection bias after one step: `b_e + rate * sign(mean load - load_e)`.

    Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (2024), section 3, algorithm 1.
    The paper adds b to the sigmoid score; here it is added to the logit (the combine weights see neither). The mean
    is over the live experts, and the bias of the others stays: their load says nothing while nobody hosts them.
    """
    load_E = load_E.to(device=bias_E.device, dtype=bias_E.dtype)
    live_E = torch.ones_like(load_E, dtype=torch.bool) if live_E is None else live_E.to(bias_E.device)
    mean = (load_E * live_E).sum() / live_E.sum().clamp(min=1)
    return bias_E + rate * torch.sign(mean - load_E) * live_E


def auxiliary_loss(balance: Tensor, z: Tensor, config: RouterConfig) -> Tensor:
    """What one MoE layer adds to the training loss (Switch, eq. 4; ST-MoE, eq. 6); sum it over the layers."""
    return config.balance_loss * balance + config.z_loss * z
