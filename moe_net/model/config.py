"""Sizes and recipe of a model, without torch: the coordinator and `--help` read it too."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from moe_net.types import Activation, ExpertId, ExpertShape


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
    """Largest share of tokens an expert takes, as a multiple of the fair share; 0: no limit (training)."""
    eval_capacity_factor: float = 0.0
    """The same in evaluation (ST-MoE: 2.0)."""
    overflow: Literal["position", "lowest_gate"] = "position"
    """Which tokens of an over-full expert go through the residual: the later ones, or those with the lowest gate
    (refused for causal models: whether a token is kept would depend on tokens after it)."""
    bias_update_rate: float = 0.0
    """Loss-free balancing: step of the selection bias towards under-used experts (Wang et al., 2024); 0: off."""


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
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if not 1 <= self.router.experts_per_token <= self.n_experts:
            raise ValueError(
                f"router.experts_per_token={self.router.experts_per_token} is not in 1..n_experts={self.n_experts}"
            )
        if self.moe_every < 1:
            raise ValueError("moe_every must be at least 1")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the blocks that have experts."""
        return tuple(i for i in range(self.n_layers) if (i + 1) % self.moe_every == 0)

    @property
    def expert_shape(self) -> ExpertShape:
        return ExpertShape(d_model=self.d_model, d_ff=self.d_ff_expert, activation=Activation(self.activation))

    @property
    def expert_ids(self) -> tuple[ExpertId, ...]:
        """Every expert of the model, ascending."""
        return tuple(ExpertId(layer, e) for layer in self.moe_layers for e in range(self.n_experts))


PRESETS: dict[str, ModelConfig] = {
    # The demo: 4 layers, 8 experts each, about 2.2 M parameters; trains in minutes on two cores.
    "tiny": ModelConfig(),
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
    # Switch Transformers, section 2.4 and table 9: top-1, raw gate, capacity 1.25, jitter 1e-2, init scale 0.1,
    # experts in every other block, no z-loss. Sizes of T5-base.
    "switch-base-like": ModelConfig(
        vocab_size=32_000,
        seq_len=512,
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
        init_std=0.006,
        router=RouterConfig(
            experts_per_token=1,
            combine="raw",
            balance_loss=0.01,
            jitter=0.01,
            capacity_factor=1.25,
            eval_capacity_factor=2.0,
        ),
    ),
    # GLaM, section 4 and table 4 (0.1B/64E): top-2, experts in every other block, balance loss 0.01.
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
        router=RouterConfig(experts_per_token=2, balance_loss=0.01, capacity_factor=2.0, eval_capacity_factor=2.0),
    ),
    # ST-MoE, section 4 and appendix: top-2, z-loss 1e-3, capacity 1.25 in training and 2.0 in evaluation,
    # experts in every fourth block.
    "st-moe-like": ModelConfig(
        vocab_size=32_000,
        seq_len=512,
        d_model=1024,
        n_layers=24,
        n_heads=16,
        n_kv_heads=16,
        head_dim=64,
        d_ff_dense=2816,
        n_experts=32,
        d_ff_expert=2816,
        activation="gelu",
        moe_every=4,
        router=RouterConfig(
            experts_per_token=2,
            balance_loss=0.01,
            z_loss=0.001,
            capacity_factor=1.25,
            eval_capacity_factor=2.0,
        ),
    ),
}


def preset(name: str, **changes: object) -> ModelConfig:
    """The preset called `name` with fields replaced; ValueError names the choices."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
