"""Router losses against plain Python, with gradients against finite differences in fp64.

T tokens, E experts.
"""

# pyright: basic
from __future__ import annotations

import math

import pytest
import torch

from moe_net.model.config import RouterConfig
from moe_net.model.losses import auxiliary_loss, balance_loss, updated_bias, z_loss

T, E = 9, 5
LIVE = [True, False, True, True, False]


def random_logits() -> torch.Tensor:
    return 2 * torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def choose(logits_TE: torch.Tensor, k: int, live: list[bool]) -> torch.Tensor:
    """Load of a top-k among the live experts."""
    masked_TE = logits_TE.masked_fill(~torch.tensor(live), -torch.inf)
    return torch.bincount(masked_TE.topk(k, dim=1).indices.flatten(), minlength=E)


def plain_probs(logits: list[float], live: list[bool]) -> list[float]:
    total = sum(math.exp(v) for v, alive in zip(logits, live, strict=True) if alive)
    return [math.exp(v) / total if alive else 0.0 for v, alive in zip(logits, live, strict=True)]


@pytest.mark.parametrize("live", [[True] * E, LIVE])
@pytest.mark.parametrize("k", [1, 2])
def test_balance_loss_equals_switch_equations_4_to_6(k: int, live: list[bool]) -> None:
    logits_TE = random_logits()
    load_E = choose(logits_TE, k, live)
    rows = [plain_probs(row, live) for row in logits_TE.tolist()]
    expected = 0.0
    for e in range(E):
        f = int(load_E[e]) / (T * k)
        p = sum(row[e] for row in rows) / T
        expected += sum(live) * f * p
    live_E = torch.tensor(live)
    probs_TE = logits_TE.masked_fill(~live_E, -torch.inf).softmax(1)
    assert float(balance_loss(probs_TE, load_E, live_E=live_E)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_loss_of_a_uniform_router_is_one_for_every_k(k: int) -> None:
    probs_TE = torch.full((T, E), 1 / E)
    assert float(balance_loss(probs_TE, torch.full((E,), T * k))) == pytest.approx(1.0)


def test_balance_loss_of_a_collapsed_router_is_the_number_of_live_experts() -> None:
    probs_TE = torch.zeros(T, E)
    probs_TE[:, 2] = 1.0
    load_E = torch.tensor([0, 0, T, 0, 0])
    assert float(balance_loss(probs_TE, load_E)) == pytest.approx(E)
    assert float(balance_loss(probs_TE, load_E, live_E=torch.tensor(LIVE))) == pytest.approx(3)


@pytest.mark.parametrize("live", [[True] * E, LIVE])
def test_z_loss_equals_st_moe_equation_5(live: list[bool]) -> None:
    logits_TE = random_logits()
    expected = 0.0
    for row in logits_TE.tolist():
        expected += math.log(sum(math.exp(v) for v, alive in zip(row, live, strict=True) if alive)) ** 2 / T
    assert float(z_loss(logits_TE, live_E=torch.tensor(live))) == pytest.approx(expected, rel=1e-12)


def test_z_loss_of_large_logits_does_not_overflow() -> None:
    assert float(z_loss(torch.full((1, 4), 1000.0))) == pytest.approx((1000 + math.log(4)) ** 2)


@pytest.mark.parametrize("live", [[True] * E, LIVE])
def test_gradients_equal_finite_differences_and_dead_experts_get_none(live: list[bool]) -> None:
    logits_TE = random_logits().requires_grad_()
    live_E = torch.tensor(live)
    load_E = choose(logits_TE.detach(), 2, live)

    def loss(logits_TE: torch.Tensor) -> torch.Tensor:
        probs_TE = logits_TE.masked_fill(~live_E, -torch.inf).softmax(1)
        return balance_loss(probs_TE, load_E, live_E=live_E) + z_loss(logits_TE, live_E=live_E)

    assert torch.autograd.gradcheck(loss, (logits_TE,))
    loss(logits_TE).backward()
    assert logits_TE.grad is not None
    assert bool(logits_TE.grad.isfinite().all())
    assert torch.equal(logits_TE.grad[:, ~live_E], torch.zeros(T, E - sum(live), dtype=torch.float64))


@pytest.mark.parametrize("live", [[True] * E, LIVE])
def test_bias_moves_by_the_rate_towards_experts_below_the_mean_load(live: list[bool]) -> None:
    bias = [0.1, 0.2, -0.3, 0.0, 0.5]
    load = [7, 0, 1, 4, 0]
    loads = [n for n, alive in zip(load, live, strict=True) if alive]
    mean = sum(loads) / len(loads)
    expected = [
        b + (0.01 * ((mean > n) - (mean < n)) if alive else 0.0) for b, n, alive in zip(bias, load, live, strict=True)
    ]
    moved = updated_bias(torch.tensor(bias), torch.tensor(load), 0.01, live_E=torch.tensor(live))
    assert moved.tolist() == pytest.approx(expected)


def test_a_balanced_load_leaves_the_bias_alone() -> None:
    bias_E = torch.tensor([0.1, 0.2, -0.3])
    assert torch.equal(updated_bias(bias_E, torch.tensor([4, 4, 4]), 0.01), bias_E)


def test_auxiliary_loss_weighs_both_terms() -> None:
    config = RouterConfig(balance_loss=0.01, z_loss=0.001)
    assert float(auxiliary_loss(torch.tensor(3.0), torch.tensor(5.0), config)) == pytest.approx(0.035)
