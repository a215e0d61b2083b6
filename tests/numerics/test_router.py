"""The router against plain Python.

B sequences, S positions, T = B * S tokens, D model width, E experts, K experts per token.
"""

# pyright: basic
from __future__ import annotations

import math

import pytest
import torch

from moe_net.errors import NoLiveExpertsError
from moe_net.model.config import RouterConfig
from moe_net.model.router import Router, Routing, combine_denominator, expert_capacity

D, E = 12, 6


def make_router(*, layer: int = 3, seed: int = 1, std: float = 0.5, **config: object) -> Router:
    return Router(RouterConfig(**config), D, E, layer=layer, seed=seed, init_std=std)  # type: ignore[arg-type]


def random_x(b: int, s: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, s, D, generator=torch.Generator().manual_seed(seed))


def plain_route(
    router: Router, x_BSD: torch.Tensor, live: list[bool], bias: list[float], factor: float
) -> tuple[list[list[int]], list[list[float]], list[int]]:
    """Ids and gates per token, and the load, by loops over Python floats."""
    weight = router.weight.double().tolist()
    b_count, s_count, _ = x_BSD.shape
    k_count = router.config.experts_per_token
    chosen: dict[tuple[int, int], list[int]] = {}
    prob: dict[tuple[int, int], dict[int, float]] = {}
    for b in range(b_count):
        for s in range(s_count):
            x = x_BSD[b, s].double().tolist()
            logit = {e: sum(w * v for w, v in zip(weight[e], x, strict=True)) for e in range(E) if live[e]}
            total = sum(math.exp(v) for v in logit.values())
            prob[b, s] = {e: math.exp(v) / total for e, v in logit.items()}
            chosen[b, s] = sorted(logit, key=lambda e: -(logit[e] + bias[e]))[:k_count]
    load = [0] * E
    room = [math.ceil(factor * b_count * s_count * k_count / E) if factor else 10**9] * E
    kept: set[tuple[int, int, int]] = set()
    for s in range(s_count):
        for k in range(k_count):
            for b in range(b_count):
                if k < len(chosen[b, s]):
                    e = chosen[b, s][k]
                    load[e] += 1
                    if room[e] > 0:
                        room[e] -= 1
                        kept.add((b, s, k))
    ids, gates = [], []
    for b in range(b_count):
        for s in range(s_count):
            row = [chosen[b, s][k] if (b, s, k) in kept else -1 for k in range(k_count)]
            ids.append(row)
            gates.append([prob[b, s][e] if e >= 0 else 0.0 for e in row])
    return ids, gates, load


@pytest.mark.parametrize("factor", [0.0, 0.4, 0.75, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("n_live", [6, 3])
def test_choices_gates_and_drops_equal_a_plain_loop(k: int, factor: float, n_live: int) -> None:
    router = make_router(experts_per_token=k, capacity_factor=factor)
    x_BSD = random_x(3, 7, seed=k)
    live = [e % 2 == 0 if n_live == 3 else True for e in range(E)]
    bias = [0.3, -0.2, 0.0, 1.5, -1.0, 0.4]
    routing = router(x_BSD, live_E=torch.tensor(live), bias_E=torch.tensor(bias))
    ids, gates, load = plain_route(router, x_BSD, live, bias, factor)
    assert routing.expert_ids_TK.tolist() == ids
    torch.testing.assert_close(routing.gates_TK, torch.tensor(gates))
    assert routing.load_E.tolist() == load
    n_dropped = sum(load) - sum(e >= 0 for row in ids for e in row)
    assert int(routing.overflow) == n_dropped
    if factor == 0:
        assert n_dropped == 0
    elif factor < 1:  # less room than pairs
        assert n_dropped > 0


def outputs_up_to(routing: Routing, s: int, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = routing.expert_ids_TK.view(*shape, -1)[:, : s + 1]
    return ids, routing.gates_TK.view(*shape, -1)[:, : s + 1]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_tokens_after_a_position_change_nothing_at_or_before_it(k: int) -> None:
    router = make_router(experts_per_token=k, capacity_factor=0.5)
    changed_later = 0
    for trial in range(20):
        x_BSD = random_x(2, 8, seed=trial)
        before = router(x_BSD)
        for t in (0, 3, 6):
            other_BSD = x_BSD.clone()
            other_BSD[0, t + 1 :] = random_x(1, 7 - t, seed=1000 + trial)[0]
            after = router(other_BSD)
            for old, new in zip(outputs_up_to(before, t, (2, 8)), outputs_up_to(after, t, (2, 8)), strict=True):
                assert torch.equal(old, new)
            changed_later += not torch.equal(before.expert_ids_TK, after.expert_ids_TK)
    assert changed_later > 40


def test_serving_all_first_choices_first_would_leak_the_future() -> None:
    # Token 0 prefers expert 0, then 1; token 1 prefers 1. Capacity one: GShard's order gives expert 1 to token 1.
    router = make_router(experts_per_token=2, capacity_factor=1.0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E, D))
    x_BSD = torch.zeros(1, 3, D)
    x_BSD[0, 0, :2] = torch.tensor([5.0, 4.0])
    x_BSD[0, 1, 1:3] = torch.tensor([5.0, 4.0])
    x_BSD[0, 2, 3:5] = torch.tensor([5.0, 4.0])
    assert router(x_BSD).expert_ids_TK.tolist() == [[0, 1], [-1, 2], [3, 4]]


def test_keeping_the_highest_gates_is_refused_for_a_causal_model() -> None:
    router = make_router(experts_per_token=1, capacity_factor=1.0, overflow="lowest_gate")
    with pytest.raises(ValueError, match="leaks the future"):
        router(random_x(1, 4))


def test_without_causality_an_over_full_expert_keeps_its_highest_gates() -> None:
    router = make_router(experts_per_token=1, capacity_factor=1.0, overflow="lowest_gate")
    x_BSD = random_x(1, 24)
    routing = router(x_BSD, causal=False)
    capacity = 4
    assert int(routing.overflow) > 0
    best_T = routing.probs_TE.argmax(1)
    for e in range(E):
        offered = routing.probs_TE[best_T == e, e].sort(descending=True).values
        kept = routing.gates_TK[routing.expert_ids_TK == e].sort(descending=True).values
        assert torch.equal(kept, offered[:capacity])


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 4), (1.25, 5), (0.1, 1)])
def test_capacity_is_a_multiple_of_the_fair_share_rounded_up(factor: float, expected: int) -> None:
    assert expert_capacity(factor, n_tokens=15, experts_per_token=2, n_experts=8) == expected


def test_evaluation_uses_its_own_capacity() -> None:
    router = make_router(experts_per_token=2, capacity_factor=0.5, eval_capacity_factor=0.0)
    assert int(router(random_x(2, 16)).overflow) > 0
    assert int(router.eval()(random_x(2, 16)).overflow) == 0


def test_dead_experts_leave_a_router_that_never_had_them() -> None:
    router = make_router(experts_per_token=2)
    live_E = torch.tensor([True, False, True, True, False, True])
    routing = router(random_x(2, 5), live_E=live_E)
    small = Router(RouterConfig(experts_per_token=2), D, 4)
    with torch.no_grad():
        small.weight.copy_(router.weight[live_E])
    expected = small(random_x(2, 5))
    torch.testing.assert_close(routing.probs_TE[:, live_E], expected.probs_TE)
    assert torch.equal(routing.probs_TE[:, ~live_E], torch.zeros(10, 2))
    torch.testing.assert_close(routing.gates_TK, expected.gates_TK)
    assert torch.equal(routing.expert_ids_TK, live_E.nonzero().flatten()[expected.expert_ids_TK])
    torch.testing.assert_close(routing.balance_loss, expected.balance_loss)
    torch.testing.assert_close(routing.z_loss, expected.z_loss)


def test_fewer_live_experts_than_choices_leave_empty_choices_and_finite_gradients() -> None:
    router = make_router(experts_per_token=4, capacity_factor=1.0)
    x_BSD = random_x(2, 5).requires_grad_()
    live_E = torch.tensor([False, True, False, False, True, False])
    routing = router(x_BSD, live_E=live_E)
    assert torch.equal(routing.expert_ids_TK[:, 2:], torch.full((10, 2), -1))
    assert set(routing.expert_ids_TK[:, :2].flatten().tolist()) <= {1, 4, -1}
    (routing.gates_TK.square().sum() + routing.balance_loss + routing.z_loss).backward()
    assert x_BSD.grad is not None
    assert router.weight.grad is not None
    assert bool(x_BSD.grad.isfinite().all())
    assert bool(router.weight.grad.isfinite().all())
    assert torch.equal(router.weight.grad[~live_E], torch.zeros(4, D))


def test_no_live_expert_is_an_error_that_names_the_layer() -> None:
    with pytest.raises(NoLiveExpertsError, match="layer 3"):
        make_router(layer=3)(random_x(1, 2), live_E=torch.zeros(E, dtype=torch.bool))


def test_the_selection_bias_moves_choices_but_no_gate_and_no_loss_input() -> None:
    router = make_router(experts_per_token=1)
    x_BSD = random_x(2, 8)
    bias_E = torch.tensor([0.0, 0.0, 100.0, 0.0, 0.0, 0.0])
    plain, biased = router(x_BSD), router(x_BSD, bias_E=bias_E)
    assert int(plain.moved) == 0
    plain_sets, biased_sets = ([set(ids) for ids in r.expert_ids_TK.tolist()] for r in (plain, biased))
    assert int(biased.moved) == sum(len(b - p) for p, b in zip(plain_sets, biased_sets, strict=True)) > 0
    assert biased.load_E.tolist() == [0, 0, 16, 0, 0, 0]
    assert torch.equal(biased.probs_TE, plain.probs_TE)
    assert torch.equal(biased.logits_TE, plain.logits_TE)
    assert torch.equal(biased.gates_TK[:, 0], plain.probs_TE[:, 2])
    assert torch.equal(biased.z_loss, plain.z_loss)


def test_loss_free_balancing_evens_out_a_skewed_load() -> None:
    router = make_router(experts_per_token=2, bias_update_rate=0.05)
    x_BSD = random_x(4, 64) + 0.5
    first = router(x_BSD).load_E
    for _ in range(200):
        router.update_balance_bias(router(x_BSD).load_E)
    last = router(x_BSD).load_E
    mean = first.sum() / E
    assert first.max() > 1.5 * mean
    assert last.max() < 1.15 * mean
    assert "balance_bias_E" in router.state_dict()


def test_jitter_comes_from_its_generator_in_training_only() -> None:
    router = make_router(experts_per_token=2, jitter=0.1)
    x_BSD = random_x(2, 8)
    state = torch.get_rng_state()
    one, two, three = (router(x_BSD, generator=torch.Generator().manual_seed(s)).logits_TE for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    exact = router.eval()(x_BSD).logits_TE
    bound = 0.1 * x_BSD.flatten(0, 1).abs() @ router.weight.abs().t() + 1e-5
    assert bool(((one - exact).abs() <= bound).all())
    with pytest.raises(ValueError, match="generator"):
        router.train()(x_BSD)


def test_the_router_computes_in_fp32_under_bf16_and_autocast() -> None:
    router = make_router(experts_per_token=2)
    weight = router.weight.detach().clone()
    x_BSD = random_x(2, 8).bfloat16()
    expected = router(x_BSD.float())
    router.bfloat16()
    assert torch.equal(router.weight, weight)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x_BSD)
    for name in ("gates_TK", "logits_TE", "probs_TE", "balance_loss", "z_loss"):
        assert torch.equal(getattr(routing, name), getattr(expected, name))


@pytest.mark.parametrize("mode", ["normalized", "raw"])
def test_the_gradient_through_the_combine_equals_finite_differences(mode: str) -> None:
    router = make_router(experts_per_token=3, capacity_factor=0.8).double()
    x_BSD = random_x(2, 4, seed=4).double().requires_grad_()
    values_TK = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    live_E = torch.tensor([True, True, True, False, True, True])

    def combined(x_BSD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        routing = torch.func.functional_call(router, {"weight": weight}, (x_BSD,), {"live_E": live_E})
        z_T = combine_denominator(routing.gates_TK, routing.expert_ids_TK >= 0, mode)  # type: ignore[arg-type]
        return (routing.gates_TK * values_TK).sum(1) / z_T

    assert int(router(x_BSD, live_E=live_E).overflow) > 0
    assert torch.autograd.gradcheck(combined, (x_BSD, router.weight.detach().requires_grad_()))


def test_the_denominator_sums_what_answered_and_is_one_where_nothing_did() -> None:
    gates_TK = torch.tensor([[0.5, 0.25], [0.5, 0.25], [0.5, 0.25], [0.0, 0.0]], requires_grad=True)
    answered_TK = torch.tensor([[True, True], [False, True], [False, False], [True, False]])
    z_T = combine_denominator(gates_TK, answered_TK, "normalized")
    assert z_T.tolist() == [0.75, 0.25, 1.0, 1.0]
    (torch.zeros(4) / z_T).sum().backward()
    assert gates_TK.grad is not None
    assert bool(gates_TK.grad.isfinite().all())
    assert combine_denominator(gates_TK, answered_TK, "raw").tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="softmax"):
        combine_denominator(gates_TK, answered_TK, "softmax")


def test_no_tokens_route_to_nothing_with_zero_losses() -> None:
    routing = make_router(experts_per_token=2, capacity_factor=1.0)(torch.zeros(0, 4, D))
    assert routing.expert_ids_TK.shape == (0, 2)
    assert routing.balance_loss.item() == 0.0
    assert routing.z_loss.item() == 0.0


def test_weights_depend_on_seed_and_layer_alone() -> None:
    torch.manual_seed(1)
    one = make_router(layer=1, seed=7).weight
    torch.manual_seed(2)
    assert torch.equal(one, make_router(layer=1, seed=7).weight)
    assert not torch.equal(one, make_router(layer=2, seed=7).weight)
    assert not torch.equal(one, make_router(layer=1, seed=8).weight)
    assert abs(Router(RouterConfig(), 400, 50, init_std=0.3).weight.std().item() - 0.3) < 0.01
