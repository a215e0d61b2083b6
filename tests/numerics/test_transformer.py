"""The transformer against a plain Qwen3-MoE written out with explicit loops and matrices.

B sequences, S positions, D model width, L width that experts see, E experts, K experts per token.

The oracle was itself compared with `transformers` 5.23 `Qwen3MoeForCausalLM` through the model: logits equal to 6e-6
(largest logit 7), all blocks sparse and every other one.
"""

# pyright: basic
from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_net.model.config import ModelConfig, RouterConfig
from moe_net.model.generate import generate
from moe_net.model.local_moe import LocalMoE
from moe_net.model.router import Router, Routing
from moe_net.model.transformer import Transformer
from moe_net.optim import OptimizerConfig

SMALL = ModelConfig(
    vocab_size=31,
    seq_len=12,
    d_model=16,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    d_ff_dense=20,
    n_experts=5,
    d_ff_expert=10,
    rope_theta=123.0,
    init_std=0.3,
    router=RouterConfig(experts_per_token=2),
)
NARROW = dataclasses.replace(SMALL, expert_width=4)


def local_model(config: ModelConfig = SMALL, *, seed: int = 0) -> Transformer:
    return Transformer(config, lambda layer: LocalMoE(config, layer, seed=seed), seed=seed)


def with_router(config: ModelConfig = SMALL, **changes: Any) -> ModelConfig:
    return dataclasses.replace(config, router=dataclasses.replace(config.router, **changes))


def random_tokens(b: int = 2, s: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(SMALL.vocab_size, (b, s), generator=torch.Generator().manual_seed(seed))


def shake_norms(model: nn.Module) -> None:
    """Norm weights start at one, which would hide a norm that is left out or applied twice."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))


# --- the oracle: one sequence, fp64, no module of ours --------------------------------------------------------------


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_rope(x_SH: Tensor, theta: float) -> Tensor:
    out_SH, half = x_SH.clone(), x_SH.shape[1] // 2
    for s in range(x_SH.shape[0]):
        for i in range(half):
            angle = s * theta ** (-2 * i / x_SH.shape[1])
            a, b = x_SH[s, i], x_SH[s, i + half]
            out_SH[s, i] = a * math.cos(angle) - b * math.sin(angle)
            out_SH[s, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out_SH


def plain_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        h = up @ x
        return down @ (h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))
    g = gate @ x
    return down @ (g / (1 + torch.exp(-g)) * (up @ x))


def plain_moe(x_SD: Tensor, w: dict[str, Tensor], prefix: str, config: ModelConfig) -> Tensor:
    rows = []
    for x in x_SD:
        probs = torch.exp(w[f"{prefix}router.weight"] @ x)
        probs = probs / probs.sum()
        best = sorted(range(config.n_experts), key=lambda e: -float(probs[e]))[: config.router.experts_per_token]
        z = sum(probs[e] for e in best) if config.router.combine == "normalized" else 1.0
        narrow = config.expert_width is not None
        if narrow:
            x = w[f"{prefix}latent.down_proj.weight"] @ x
        y = torch.zeros_like(x)
        for e in best:
            w_in, down = w[f"{prefix}w_in_EDH"][e].t(), w[f"{prefix}w_out_EFD"][e].t()
            gate, up = w_in[: config.d_ff_expert], w_in[-config.d_ff_expert :]
            y = y + probs[e] / z * plain_ffn(x, gate, up, down, config.activation)
        rows.append(w[f"{prefix}latent.up_proj.weight"] @ y if narrow else y)
    return torch.stack(rows)


def plain_logits(tokens: list[int], w: dict[str, Tensor], config: ModelConfig) -> Tensor:
    n_positions, width, eps = len(tokens), config.head_dim, config.rms_eps
    x_SD = torch.stack([w["embed_tokens.weight"][t] for t in tokens])
    for layer in range(config.n_layers):
        p = f"layers.{layer}."
        h_SD = plain_norm(x_SD, w[p + "input_layernorm.weight"], eps)
        heads = []
        for n in range(config.n_heads):
            g = n // (config.n_heads // config.n_kv_heads)
            own, shared = slice(n * width, (n + 1) * width), slice(g * width, (g + 1) * width)
            q = plain_norm(h_SD @ w[p + "self_attn.q_proj.weight"][own].t(), w[p + "self_attn.q_norm.weight"], eps)
            k = plain_norm(h_SD @ w[p + "self_attn.k_proj.weight"][shared].t(), w[p + "self_attn.k_norm.weight"], eps)
            v = h_SD @ w[p + "self_attn.v_proj.weight"][shared].t()
            q, k = plain_rope(q, config.rope_theta), plain_rope(k, config.rope_theta)
            rows = []
            for s in range(n_positions):
                score = torch.stack([(q[s] * k[r]).sum() / math.sqrt(width) for r in range(s + 1)]).exp()
                rows.append(sum(score[r] * v[r] for r in range(s + 1)) / score.sum())
            heads.append(torch.stack(rows))
        x_SD = x_SD + torch.cat(heads, 1) @ w[p + "self_attn.o_proj.weight"].t()
        h_SD = plain_norm(x_SD, w[p + "post_attention_layernorm.weight"], eps)
        if (layer + 1) % config.moe_every == 0:
            x_SD = x_SD + plain_moe(h_SD, w, p + "mlp.", config)
        else:
            matrices = (w.get(f"{p}mlp.{name}_proj.weight", torch.empty(0)) for name in ("gate", "up", "down"))
            gate, up, down = matrices
            x_SD = x_SD + torch.stack([plain_ffn(x, gate, up, down, config.activation) for x in h_SD])
    head = w["embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
    return plain_norm(x_SD, w["norm.weight"], eps) @ head.t()


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, moe_every=2, tie_embeddings=False),
        dataclasses.replace(with_router(experts_per_token=1, combine="raw"), activation="gelu", moe_every=2),
        dataclasses.replace(SMALL, n_layers=1, n_kv_heads=4),
        NARROW,
        dataclasses.replace(SMALL, expert_width=23, moe_every=2),
    ],
    ids=["all-sparse", "every-other-untied", "gelu-raw-top1", "without-gqa", "narrow-experts", "wide-experts"],
)
def test_logits_equal_the_plain_model(config: ModelConfig) -> None:
    model = local_model(config)
    shake_norms(model)
    tokens_BS = random_tokens(2, 9)
    weights = {name: value.detach().double() for name, value in model.state_dict().items()}
    logits_BSV, routings = model(tokens_BS)
    assert len(routings) == len(config.moe_layers)
    for b in range(2):
        expected_SV = plain_logits(tokens_BS[b].tolist(), weights, config)
        torch.testing.assert_close(logits_BSV[b].double(), expected_SV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("expert_width", [None, 4])
def test_gradients_of_every_weight_equal_finite_differences(expert_width: int | None) -> None:
    router = with_router(z_loss=0.1, balance_loss=0.1)
    config = dataclasses.replace(router, n_layers=2, moe_every=2, expert_width=expert_width)
    model = local_model(config).double()
    shake_norms(model)
    tokens_BS = random_tokens(1, 6)

    def loss() -> Tensor:
        logits_BSV, (routing,) = model(tokens_BS)
        picked = logits_BSV[0, :-1].log_softmax(-1).gather(1, tokens_BS[0, 1:, None])
        return -picked.mean() + 0.1 * routing.balance_loss + 0.1 * routing.z_loss

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        assert parameter.grad is not None, name
        slope = float((parameter.grad * direction).sum())
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
            above = float(loss())
            parameter.sub_(direction, alpha=2e-6)
            below = float(loss())
            parameter.add_(direction, alpha=1e-6)
        assert (above - below) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("k", [1, 2])
def test_later_tokens_change_no_earlier_logits_even_with_a_tight_capacity(k: int) -> None:
    model = local_model(with_router(experts_per_token=k, combine="raw", capacity_factor=0.5))
    tokens_BS = random_tokens(3, 12)
    before_BSV, routings = model(tokens_BS)
    assert all(int(routing.overflow) > 0 for routing in routings)
    for t in range(11):
        changed_BS = tokens_BS.clone()
        changed_BS[1, t + 1 :] = random_tokens(1, 11 - t, seed=100 + t)[0]
        after_BSV = model(changed_BS).logits_BSV
        torch.testing.assert_close(after_BSV[:, : t + 1], before_BSV[:, : t + 1], rtol=0, atol=2e-5)


def test_a_token_whose_pairs_are_all_dropped_passes_through_the_residual() -> None:
    config = with_router(experts_per_token=1, combine="raw", capacity_factor=0.2)
    moe = LocalMoE(config, 0)
    h_BSD = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y_BSD, routing = moe(h_BSD)
    dropped_T = routing.expert_ids_TK[:, 0] < 0
    assert 0 < int(dropped_T.sum()) < 20
    assert torch.equal(y_BSD.flatten(0, 1)[dropped_T], torch.zeros(int(dropped_T.sum()), 16))
    y_BSD.sum().backward()
    assert h_BSD.grad is not None
    assert bool(h_BSD.grad.isfinite().all())


def test_dead_experts_get_no_tokens_and_no_gradient() -> None:
    moe = LocalMoE(SMALL, 2)
    live_E = torch.tensor([True, False, True, False, True])
    h_BSD = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0))
    y_BSD, routing = moe(h_BSD, live_E=live_E)
    y_BSD.square().sum().backward()
    assert set(routing.expert_ids_TK.flatten().tolist()) == {0, 2, 4}
    assert moe.w_in_EDH.grad is not None
    assert torch.equal(moe.w_in_EDH.grad[~live_E], torch.zeros(2, 16, 20))
    assert all(bool(moe.w_in_EDH.grad[e].abs().sum() > 0) for e in (0, 2, 4))


class NoExperts(nn.Module):
    """Stands for experts that live elsewhere: a router, and zeros for an answer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        torch.rand(7)  # uses the global generator, as a foreign module may
        self.router = Router(config.router, config.d_model, config.n_experts, layer=layer)

    def forward(self, h_BSD: Tensor) -> tuple[Tensor, Routing]:
        return torch.zeros_like(h_BSD), self.router(h_BSD)


def test_projections_around_experts_are_drawn_and_trained_as_the_rest_of_the_trunk_is() -> None:
    trunk = local_model(dataclasses.replace(NARROW, d_model=128, expert_width=64), seed=5).trunk_parameters()
    names = {f"layers.{layer}.mlp.latent.{way}_proj.weight" for layer in range(4) for way in ("down", "up")}
    assert names == {name for name in trunk if ".latent." in name}
    for name in names:
        assert float(trunk[name].detach().std()) == pytest.approx(SMALL.init_std, rel=0.05), name
    model = local_model(NARROW, seed=5)
    for layer, block in enumerate(model.layers):
        alone = LocalMoE(NARROW, layer, seed=5).state_dict()
        assert all(torch.equal(value, alone[name]) for name, value in block.mlp.state_dict().items())


def test_experts_of_the_models_width_have_no_projections() -> None:
    plain, said = (local_model(dataclasses.replace(SMALL, expert_width=w)).state_dict() for w in (None, SMALL.d_model))
    assert list(plain) == list(said)
    assert all(torch.equal(value, said[name]) for name, value in plain.items())
    assert not [name for name in plain if "latent" in name]


def test_the_trunk_depends_on_the_seed_alone_and_not_on_what_is_injected() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    one = local_model(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    two = Transformer(SMALL, lambda layer: NoExperts(SMALL, layer), seed=5)
    other = local_model(seed=6).trunk_parameters()
    ours, theirs = one.trunk_parameters(), two.trunk_parameters()
    assert list(ours) == list(theirs) == [name for name, _ in two.named_parameters()]
    assert "layers.0.mlp.router.weight" in ours
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
        assert value.ndim == 1 or not torch.equal(value, other[name]), name
    values = torch.cat([value.flatten() for value in ours.values() if value.ndim == 2])
    assert float(values.detach().std()) == pytest.approx(SMALL.init_std, rel=0.02)


def test_norms_and_embeddings_do_not_decay_and_every_parameter_is_in_one_group() -> None:
    model = local_model(dataclasses.replace(SMALL, moe_every=2, tie_embeddings=False))
    decay, plain = model.parameter_groups(OptimizerConfig(weight_decay=0.3))
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, resting = ([names[id(p)] for p in group["params"]] for group in (decay, plain))  # type: ignore[attr-defined]
    assert sorted(decaying + resting) == sorted(names.values())
    assert resting == [name for name in names.values() if "norm" in name or name == "embed_tokens.weight"]
    assert {"layers.1.mlp.w_in_EDH", "layers.1.mlp.router.weight", "lm_head.weight"} <= set(decaying)
    trunk = model.parameter_groups(OptimizerConfig(), experts=False)
    assert sum(len(group["params"]) for group in trunk) == len(model.trunk_parameters())  # type: ignore[arg-type]


def test_a_few_steps_learn_a_repeated_sequence() -> None:
    config = with_router(dataclasses.replace(SMALL, init_std=0.05), jitter=0.01, capacity_factor=1.5, z_loss=0.001)
    model = local_model(config)
    generator = torch.Generator().manual_seed(0)
    tokens_BS = random_tokens(4, 12)
    losses = []
    for _ in range(40):
        logits_BSV, routings = model(tokens_BS, generator=generator)
        loss = nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
        total = loss + sum(0.01 * r.balance_loss + 0.001 * r.z_loss for r in routings)
        # Adam without momentum, by hand: torch.optim imports the compiler, which takes 4 s.
        for parameter, slope in zip(model.parameters(), torch.autograd.grad(total, [*model.parameters()]), strict=True):
            parameter.data -= 0.01 * slope / (slope.square().mean().sqrt() + 1e-8)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(31), abs=0.2)
    assert losses[-1] < 0.7


def test_bf16_autocast_stays_close_to_fp32() -> None:
    model = local_model(dataclasses.replace(SMALL, init_std=0.1, moe_every=2))
    tokens_BS = random_tokens()
    weights = list(model.parameters())

    def run() -> tuple[Tensor, list[Tensor]]:
        logits_BSV = model(tokens_BS).logits_BSV
        gradients = torch.autograd.grad(logits_BSV.float().square().sum(), weights)
        return logits_BSV.detach(), list(gradients)

    exact_BSV, exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        rounded_BSV, rounded = run()
    assert float((rounded_BSV - exact_BSV).norm() / exact_BSV.norm()) < 0.02
    for got, right in zip(rounded, exact, strict=True):
        assert got.dtype is torch.float32
        assert float((got - right).norm()) <= 0.1 * float(right.norm())


def test_a_sequence_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="seq_len=12"):
        local_model()(random_tokens(1, 13))


def test_generation_is_reproducible_crops_to_the_window_and_restores_the_mode() -> None:
    model = local_model().train()
    prompt_BS = random_tokens(2, 5)
    one, two, three = (
        generate(model, prompt_BS, new_tokens=15, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert one.shape == (2, 20)
    assert torch.equal(one[:, :5], prompt_BS)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert model.training


def test_greedy_top_1_and_cold_sampling_agree_with_the_argmax() -> None:
    model = local_model().eval()
    tokens_BS = random_tokens(2, 5)
    greedy = generate(model, tokens_BS, new_tokens=6, temperature=0)
    for _ in range(6):
        tokens_BS = torch.cat((tokens_BS, model(tokens_BS).logits_BSV[:, -1:].argmax(-1)), 1)
    assert torch.equal(greedy, tokens_BS)
    choices: tuple[dict[str, Any], ...] = ({"top_k": 1}, {"temperature": 1e-4})
    for options in choices:
        generator = torch.Generator().manual_seed(0)
        assert torch.equal(generate(model, greedy[:, :5], new_tokens=6, generator=generator, **options), greedy)


def test_sampling_follows_the_tempered_distribution_of_the_top_k() -> None:
    model = local_model().eval()
    prompt_BS = random_tokens(1, 4)
    logits_V = model(prompt_BS).logits_BSV[0, -1].detach()
    best = logits_V.topk(3)
    expected = dict(zip(best.indices.tolist(), (best.values / 2).softmax(0).tolist(), strict=True))
    sampled = generate(
        model,
        prompt_BS.expand(4000, -1),
        new_tokens=1,
        temperature=2.0,
        top_k=3,
        generator=torch.Generator().manual_seed(0),
    )[:, -1]
    assert set(sampled.tolist()) == set(expected)
    for token, probability in expected.items():
        assert float((sampled == token).float().mean()) == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize(
    "wrong", [{"generator": None}, {"top_k": 0}, {"top_k": 32}, {"temperature": -1.0}, {"new_tokens": -1}]
)
def test_generation_refuses_arguments_out_of_range(wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"new_tokens": 1, "generator": torch.Generator()}
    with pytest.raises(ValueError, match=r"generator|top_k|negative"):
        generate(local_model(), random_tokens(1, 2), **(arguments | wrong))
