"""The stacked update against torch.optim.AdamW, one optimizer and one clip per expert."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_net.experts.update import StackedAdamW
from moe_net.kernels.types import WeightGrads
from moe_net.optim import OptimizerConfig

E, D, H, F = 3, 6, 10, 5
CONFIG = OptimizerConfig(learning_rate=0.01, warmup_steps=3, total_steps=12, clip_norm=0.0)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stacked(config: OptimizerConfig) -> StackedAdamW:
    return StackedAdamW(normal(E, D, H, seed=1), normal(E, F, D, seed=2), config)


def sums_of(seed: int) -> WeightGrads:
    return WeightGrads(normal(E, D, H, seed=seed), normal(E, F, D, seed=seed + 1))


class OneExpert:
    """What a single process does: parameters, torch.optim.AdamW, clip_grad_norm_, a learning rate per step."""

    def __init__(self, w_in_DH: Tensor, w_out_FD: Tensor, config: OptimizerConfig) -> None:
        self.config = config
        self.parameters = [torch.nn.Parameter(w_in_DH.clone()), torch.nn.Parameter(w_out_FD.clone())]
        self.adamw = torch.optim.AdamW(
            self.parameters,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def step(self, grads: list[Tensor], version: int) -> None:
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad.clone()
        if self.config.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        for group in self.adamw.param_groups:
            group["lr"] = self.config.lr_at(version)
        self.adamw.step()


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fifteen_steps_equal_torch_adamw_per_expert(clip_norm: float, weight_decay: float) -> None:
    config = replace(CONFIG, clip_norm=clip_norm, weight_decay=weight_decay)
    ours = stacked(config)
    theirs = [OneExpert(ours.w[0][e], ours.w[1][e], config) for e in range(E)]
    for step in range(15):
        tokens = 7 + step
        sums = sums_of(100 * step)
        for grad in sums:
            grad[1] *= 50  # so that the experts clip by different factors
            grad[2] *= 0  # an expert that no token chose
        means = [[grad[e] / tokens for grad in sums] for e in range(E)]
        ours.step(tokens, sums)
        for e, expert in enumerate(theirs):
            expert.step(means[e], step)
            for weights, parameter in zip(ours.w, expert.parameters, strict=True):
                torch.testing.assert_close(weights[e], parameter.detach(), rtol=2e-6, atol=2e-7)
    assert ours.versions == [15] * E


def test_an_expert_without_rows_decays_and_follows_its_momentum() -> None:
    ours = stacked(CONFIG)
    before = ours.w[0].clone()
    ours.step(1, WeightGrads(*(torch.zeros_like(w) for w in ours.w)))
    torch.testing.assert_close(ours.w[0], before * (1 - CONFIG.lr_at(0) * CONFIG.weight_decay))
    assert ours.versions == [1] * E


def test_experts_at_different_versions_get_their_own_rate_and_bias_correction() -> None:
    together, alone = stacked(CONFIG), [stacked(CONFIG) for _ in range(E)]
    together.versions = [0, 4, 9]
    for e, one in enumerate(alone):
        one.versions = [together.versions[e]] * E
    together.step(5, sums_of(0))
    for e, one in enumerate(alone):
        one.step(5, sums_of(0))
        assert torch.equal(together.w[0][e], one.w[0][e])
        assert torch.equal(together.w[1][e], one.w[1][e])
    assert together.versions == [1, 5, 10]
    # A first step of Adam is lr * sign(grad) (and decay); at version 9 with empty moments it is another one.
    assert not torch.equal(together.w[0][2], alone[0].w[0][2])


def test_company_changes_no_bit_of_an_expert() -> None:
    grads = sums_of(3)
    config = replace(CONFIG, clip_norm=0.1)
    together = stacked(config)
    single = StackedAdamW(together.w[0][1:2].clone(), together.w[1][1:2].clone(), config)
    for _ in range(3):
        together.step(2, WeightGrads(*(grad.clone() for grad in grads)))
        single.step(2, WeightGrads(*(grad[1:2].clone() for grad in grads)))
    assert torch.equal(together.w[0][1], single.w[0][0])
    assert torch.equal(together.w[1][1], single.w[1][0])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_expert_with_a_gradient_that_is_not_finite_does_not_step(
    poison: float, caplog: pytest.LogCaptureFixture
) -> None:
    ours = stacked(CONFIG)
    before = ours.w[0].clone()
    sums = WeightGrads(*(torch.full_like(w, 0.5) for w in ours.w))
    sums.w_out_EFD[1, 0, 0] = poison
    ours.step(1, sums)
    assert ours.versions == [1, 0, 1]
    assert torch.equal(ours.w[0][1], before[1])
    assert not torch.equal(ours.w[0][0], before[0])
    assert "slot 1: gradient is not finite, step 0 skipped" in caplog.text
