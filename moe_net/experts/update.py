"""Accumulate, then step: AdamW over the stacked experts of one bank.

E experts, D model width, F expert width, H columns of the first projection (2F for SwiGLU: gate then up; F for GELU).
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from moe_net.kernels.types import WeightGrads
from moe_net.optim import OptimizerConfig

logger = logging.getLogger(__name__)


class StackedAdamW:
    """AdamW (Loshchilov & Hutter, 2019) that gives every expert its own clipping, step counter and learning rate.

    Each expert gets, bit for bit, what it would get alone: which others share the stack has no influence.
    """

    def __init__(self, w_in_EDH: Tensor, w_out_EFD: Tensor, config: OptimizerConfig) -> None:
        self.config = config
        self.w = (w_in_EDH, w_out_EFD)
        self.m = (torch.zeros_like(w_in_EDH), torch.zeros_like(w_out_EFD))
        self.v = (torch.zeros_like(w_in_EDH), torch.zeros_like(w_out_EFD))
        self.versions = [0] * w_in_EDH.shape[0]
        """Steps each expert has made."""

    def _clip_scale(self, grads: WeightGrads, slot: int, tokens: int) -> float:
        """Factor that turns the expert's sum into its clipped mean gradient; NaN if the sum is not finite."""
        norm = float(torch.nn.utils.get_total_norm([grad[slot].float() for grad in grads])) / tokens
        if not math.isfinite(norm):
            return math.nan
        clip = self.config.clip_norm
        # As torch.nn.utils.clip_grad_norm_.
        return min(1.0, clip / (norm + 1e-6)) / tokens if clip > 0 else 1.0 / tokens

    @torch.no_grad()
    def step(
        self, tokens: int, grads: WeightGrads, *, still: Collection[int] = (), latest: float = math.inf
    ) -> list[int]:
        """One update of every expert by the mean over `tokens` of its summed gradients, which are used up.
        Slots in `still` do nothing, and versions do not go beyond `latest`. Returns the slots that stepped.

        An expert without rows steps as well, with a zero gradient, as it would in a single process. One whose sum is
        not finite does not step (weights, moments and version stay): its next gradients are its next chance.
        """
        scales: dict[int, float] = {}
        slots_by_version: defaultdict[int, list[int]] = defaultdict(list)
        for slot, version in enumerate(self.versions):
            if slot in still:
                continue
            scale = self._clip_scale(grads, slot, tokens)
            if math.isnan(scale):
                logger.warning("expert in slot %d: gradient is not finite, step %d skipped", slot, version)
                continue
            scales[slot] = scale
            slots_by_version[version].append(slot)
        for version, slots in slots_by_version.items():
            means = [grad[slot].float().mul_(scales[slot]) for slot in slots for grad in grads]
            self._adamw(means, slots, version)
            for slot in slots:
                self.versions[slot] = version + (version < latest)
        return [slot for slots in slots_by_version.values() for slot in slots]

    def _adamw(self, grads: list[Tensor], slots: list[int], version: int) -> None:
        """Step the experts in `slots`, all at `version`, by their two gradients each: one fused pass over their
        memory."""

        def matrices(stacks: tuple[Tensor, ...]) -> list[Tensor]:
            return [stack[slot] for slot in slots for stack in stacks]

        weights = matrices(self.w)
        adamw(
            weights,
            grads,
            matrices(self.m),
            matrices(self.v),
            [],
            [torch.tensor(float(version), device=weight.device) for weight in weights],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=self.config.lr_at(version),
            weight_decay=self.config.weight_decay,
            eps=self.config.eps,
        )
