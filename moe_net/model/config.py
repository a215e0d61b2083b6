"""Sizes and recipe of a model, without torch: the coordinator and `--help` read it too."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from moe_net.types import Activation, ExpertId, ExpertShape

# Beyond these a run would fail somewhere inside: records number layers with 16 bits, kernels address with 32.
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 2**16
MAX_EXPERTS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How a token chooses its experts, and what its losses are."""

    experts_per_token: int = 2
    """k of top-k."""
    combine: Literal["normalized", "raw"] = "normalized"
    """Divide by the sum of the chosen gates (GShard, GLaM, Qwen3-MoE), or use the softmax value as it is (Switch)."""
    balance_loss: float = 0.01
    """Weight of the load-balance loss (Switch Transformers, section 2.2, eq. 4-6)."""
    z_loss: float = 0.0
    """Weight of the router z-loss (ST-MoE, section 3.3, eq. 5)."""
    jitter: float = 0.0
    """Multiply the router's input by uniform(1-jitter, 1+jitter), in training only (Switch, section 2.4)."""
    capacity_factor: float = 0.0
    """Largest share of (token, choice) pairs an expert takes in training, as a multiple of the fair share T * k / E;
    0: no limit. Papers that count in tokens, C = factor * T / E, have k times this factor."""
    eval_capacity_factor: float = 0.0
    """The same in evaluation (ST-MoE: 2.0)."""
    overflow: Literal["position", "lowest_gate"] = "position"
    """Which tokens of an over-full expert go through the residual: the later ones, or those with the lowest gate
    (refused for causal models: whether a token is kept would depend on tokens after it)."""
    bias_update_rate: float = 0.0
    """Loss-free balancing: step of the selection bias towards under-used experts (Wang et al., 2024); 0: off."""
    latency_bias: float = 0.0
    """The most that an expert on a slow or overloaded server loses in the selection, in units of the logits; 0: off.
    What it does depends on the network, so no two runs with it are alike."""

    def __post_init__(self) -> None:
        for name in ("balance_loss", "z_loss", "jitter", "capacity_factor", "eval_capacity_factor",
                     "bias_update_rate", "latency_bias"):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:  # false of a NaN
                raise ValueError(f"router.{name}={getattr(self, name)} must be a number, and not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A causal transformer in Qwen3-MoE's architecture."""

    vocab_size: int = 256
    """Token ids; 256 for bytes."""
    seq_len: int = 128
    """Longest sequence."""
    d_model: int = 128
    """Width of the residual stream."""
    n_layers: int = 4
    """Transformer blocks."""
    n_heads: int = 4
    """Query heads."""
    n_kv_heads: int = 2
    """Key and value heads (GQA)."""
    head_dim: int = 32
    """Width of one head."""
    d_ff_dense: int = 384
    """Inner width of the dense FFN in blocks without experts."""
    n_experts: int = 8
    """Experts of each MoE layer."""
    d_ff_expert: int = 128
    """Inner width of one expert."""
    expert_width: int | None = None
    """Width of the rows that experts see, and the wire carries; absent: `d_model`. Each MoE layer projects its tokens
    to another width and back, in the trunk (LatentMoE, arXiv 2601.18089)."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Of experts and dense FFNs."""
    moe_every: int = 1
    """Every how-manyeth block has experts (2: blocks 1, 3, 5, ...)."""
    rope_theta: float = 10_000.0
    """Base of the rotary embedding."""
    rms_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = True
    """The output projection is the embedding, transposed."""
    init_std: float = 0.02
    """Standard deviation of normal initialisation, trunk and experts."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """Routing recipe."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff_dense",
                     "n_experts", "d_ff_expert", "expert_width"):  # fmt: skip
            size = getattr(self, name)
            if size is None:
                continue
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
            if size > MAX_SIZE:
                raise ValueError(f"{name}={size} is more than {MAX_SIZE}")
        if self.n_layers > MAX_LAYERS:
            raise ValueError(f"n_layers={self.n_layers} is more than {MAX_LAYERS}")
        if self.n_layers * self.n_experts > MAX_EXPERTS:
            raise ValueError(
                f"n_layers={self.n_layers} with n_experts={self.n_experts} each are more than {MAX_EXPERTS} experts"
            )
        for name in ("rope_theta", "rms_eps"):
            if not 0 <= getattr(self, name) < math.inf:  # false of a NaN
                raise ValueError(f"{name}={getattr(self, name)} must be a number, and not negative")
        if not 0 < self.init_std < math.inf:
            raise ValueError(f"init_std={self.init_std} must be positive: from weights of 0 nothing is learned")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if not 1 <= self.router.experts_per_token <= self.n_experts:
            raise ValueError(
                f"router.experts_per_token={self.router.experts_per_token} is not in 1..n_experts={self.n_experts}"
            )
        if self.router.experts_per_token == 1 < self.n_experts and self.router.combine == "normalized":
            raise ValueError(
                'router.experts_per_token=1 with router.combine="normalized": the one gate is always 1, so the router '
                'learns nothing from the loss. Use combine = "raw", as Switch Transformers do'
            )
        if self.moe_every < 1:
            raise ValueError("moe_every must be at least 1")
        if not self.moe_layers:
            raise ValueError(f"moe_every={self.moe_every}: none of the n_layers={self.n_layers} blocks has experts")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: the rotary embedding turns pairs")
        if self.router.overflow == "lowest_gate":
            raise ValueError(
                'router.overflow="lowest_gate" leaks the future: in a causal model whether a token keeps its expert '
                'would depend on the gates of later tokens. Use "position"'
            )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the blocks that have experts."""
        return tuple(i for i in range(self.n_layers) if (i + 1) % self.moe_every == 0)

    @property
    def expert_shape(self) -> ExpertShape:
        width = self.d_model if self.expert_width is None else self.expert_width
        return ExpertShape(d_model=width, d_ff=self.d_ff_expert, activation=Activation(self.activation))

    @property
    def expert_ids(self) -> tuple[ExpertId, ...]:
        """Every expert of the model, ascending."""
        return tuple(ExpertId(layer, e) for layer in self.moe_layers for e in range(self.n_experts))


PRESETS: dict[str, ModelConfig] = {
    # The demo: 4 layers, 8 experts each, 1.81 M parameters (0.63 M active); trains in minutes on two cores.
    # 0.02, right for a width of 2000 and more, is too small for 128: after 300 steps of the demo 2.00 nats per byte are
    # left with it, 1.60 with 0.05, 1.56 with 0.06, 1.58 with 0.088 = 128 ** -0.5.
    "tiny": ModelConfig(init_std=0.06),
    # 207.9 M parameters (32 x 8 experts), 31.7 M active.
    "small": ModelConfig(
        seq_len=512,
        d_model=512,
        n_layers=8,
        n_heads=8,
        n_kv_heads=4,
        head_dim=64,
        d_ff_dense=1536,
        n_experts=32,
        d_ff_expert=512,
        router=RouterConfig(experts_per_token=4),
    ),
    # Switch Transformers (Fedus et al., 2022). Table 9, Switch-Base: d_model 768, gated FFN of 2048, 12 heads of 64,
    # 12 layers, 128 experts in every other one; sections 2.2-2.4: top-1, raw gate, balance loss 1e-2, capacity 1.25,
    # jitter 1e-2, no z-loss. Initialisation of variance 0.1 / fan-in (section 2.4): 0.0114 for a fan-in of 768; the
    # paper's second FFN matrix (fan-in 2048) has 0.0070. Theirs is an encoder and a decoder of 12 layers each
    # (7 B); this decoder alone has 3.71 B parameters, 110.1 M active. Evaluation capacity 2.0: their released code.
    "switch-base-like": ModelConfig(
        vocab_size=32_000,
        seq_len=512,
        d_model=768,
        n_layers=12,
        n_heads=12,
        n_kv_heads=12,
        head_dim=64,
        d_ff_dense=2048,
        n_experts=128,
        d_ff_expert=2048,
        moe_every=2,
        init_std=0.0114,
        router=RouterConfig(
            experts_per_token=1,
            combine="raw",
            balance_loss=0.01,
            jitter=0.01,
            capacity_factor=1.25,
            eval_capacity_factor=2.0,
        ),
    ),
    # GLaM (Du et al., 2022), table 4, 0.1B/64E: 12 layers, d_model 768, experts of 3072 without a gate, 12 heads of
    # 64, 64 experts in every other layer, top-2; section 5: sequences of 1024, balance loss 0.01. Capacity 2.0 (ST-MoE,
    # section 5.2, says so of GShard and GLaM) counts tokens: the fair share of top-2 pairs. Theirs has 1.9 B
    # parameters, 145 M active; this one 1.89 B and 138.1 M (their dense FFNs are gated, their vocabulary is 256 K).
    "glam-like": ModelConfig(
        vocab_size=32_000,
        seq_len=1024,
        d_model=768,
        n_layers=12,
        n_heads=12,
        n_kv_heads=12,
        head_dim=64,
        d_ff_dense=3072,
        n_experts=64,
        d_ff_expert=3072,
        activation="gelu",
        moe_every=2,
        router=RouterConfig(
            experts_per_token=2, balance_loss=0.01, capacity_factor=2.0 / 2, eval_capacity_factor=2.0 / 2
        ),
    ),
    # ST-MoE (Zoph et al., 2022), table 11, ST-MoE-L: d_model 1024, gated FFN of 2816, 16 heads of 64, 27 layers, 32
    # experts in every fourth one (6 sparse layers, section 7); top-2, capacity 1.25 in training and 2.0 in evaluation
    # (sections 4.1 and 5.2; of tokens, so half of that in top-2 pairs), balance loss 1e-2, z-loss 1e-3 (section 3.3),
    # Switch's initialisation (section 6.2): 0.0099 for a fan-in of 1024. Theirs is an encoder and a decoder (4.1 B);
    # this decoder alone has 1.99 B parameters, 431.7 M active.
    "st-moe-like": ModelConfig(
        vocab_size=32_000,
        seq_len=512,
        d_model=1024,
        n_layers=27,
        n_heads=16,
        n_kv_heads=16,
        head_dim=64,
        d_ff_dense=2816,
        n_experts=32,
        d_ff_expert=2816,
        moe_every=4,
        init_std=0.0099,
        router=RouterConfig(
            experts_per_token=2,
            balance_loss=0.01,
            z_loss=0.001,
            capacity_factor=1.25 / 2,
            eval_capacity_factor=2.0 / 2,
        ),
    ),
}


def preset(name: str, **changes: object) -> ModelConfig:
    """The preset called `name` with fields replaced; ValueError names the choices."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
