"""A causal transformer in Qwen3-MoE's architecture, with the MoE blocks injected.

B sequences, S positions, D model width, N query heads, G key/value heads, H head width, V vocabulary, F FFN width.

Parameters of the trunk have the names that `Qwen3MoeForCausalLM` gives them (less the leading `model.`); an MoE block
is whatever the factory returns, and has its router at `layers.<i>.mlp.router.weight` and, where experts see another
width than D, the projections to it and back below `layers.<i>.mlp.latent`.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_net.model.config import ModelConfig
from moe_net.model.init import normal_
from moe_net.model.latent import LatentProjections
from moe_net.model.norm import RMSNorm, rope_tables, rotated_norms
from moe_net.model.router import Router, Routing
from moe_net.optim import OptimizerConfig
from moe_net.types import Activation


class Output(NamedTuple):
    """What a forward pass returns."""

    logits_BSV: Tensor
    routings: list[Routing]
    """One per MoE layer, in the order of `ModelConfig.moe_layers`."""


class Attention(nn.Module):
    """Causal grouped-query attention with RMSNorm on every head's query and key, no biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width_q, width_kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, width_q, bias=False)
        self.k_proj = nn.Linear(config.d_model, width_kv, bias=False)
        self.v_proj = nn.Linear(config.d_model, width_kv, bias=False)
        self.o_proj = nn.Linear(width_q, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_eps)

    def forward(self, x_BSD: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        q_BSNH, k_BSGH = self.q_proj(x_BSD).view(heads), self.k_proj(x_BSD).view(heads)
        v_BGSH = self.v_proj(x_BSD).view(heads).transpose(1, 2)
        q_BSNH, k_BSGH = rotated_norms(q_BSNH, k_BSGH, self.q_norm, self.k_norm, cos_SH, sin_SH)
        # Under autocast the projections are bf16 while norms and tables are fp32: one dtype for the kernel.
        q_BNSH, k_BGSH = q_BSNH.to(v_BGSH.dtype).transpose(1, 2), k_BSGH.to(v_BGSH.dtype).transpose(1, 2)
        shared = q_BNSH.shape[1] != k_BGSH.shape[1]
        y_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BGSH, v_BGSH, is_causal=True, enable_gqa=shared)
        return self.o_proj(y_BNSH.transpose(1, 2).flatten(2))


class DenseFFN(nn.Module):
    """The FFN of a block without experts: SwiGLU (Shazeer, 2020), or GELU without a gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.activation == Activation.SWIGLU
        if self.gated:
            self.gate_proj = nn.Linear(config.d_model, config.d_ff_dense, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff_dense, bias=False)
        self.down_proj = nn.Linear(config.d_ff_dense, config.d_model, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))
        return self.down_proj(F.gelu(self.up_proj(x_BSD)))


class Block(nn.Module):
    """Pre-norm attention and FFN (dense, or an injected MoE), each with a residual."""

    def __init__(self, config: ModelConfig, mlp: nn.Module, *, sparse: bool) -> None:
        super().__init__()
        self.sparse = sparse
        self.input_layernorm = RMSNorm(config.d_model, config.rms_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_eps)
        self.mlp = mlp

    def forward(
        self, x_BSD: Tensor, cos_SH: Tensor, sin_SH: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Routing | None]:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos_SH, sin_SH)
        h_BSD = self.post_attention_layernorm(x_BSD)
        if not self.sparse:
            return x_BSD + self.mlp(h_BSD), None
        y_BSD, routing = self.mlp(h_BSD) if generator is None else self.mlp(h_BSD, generator=generator)
        return x_BSD + y_BSD, routing


class Transformer(nn.Module):
    """The trunk (embeddings, attention, norms, dense FFNs) around injected MoE blocks.

    `moe(layer)` returns a module that maps h_BSD to (y_BSD, Routing) and holds its `Router` as a submodule; it has to
    accept the keyword `generator` if the model is ever called with one. Trunk and router weights depend on `seed`
    and the config alone: not on the global generator, nor on what is injected.
    """

    def __init__(self, config: ModelConfig, moe: Callable[[int], nn.Module], *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        sparse = frozenset(config.moe_layers)
        # torch's layers draw their default weights from the global generator: give it back as it was.
        with torch.random.fork_rng(devices=[]):
            # Not `nn.Embedding(V, D)`: its default weights, on the meta device, import torch's compiler (4 s).
            self.embed_tokens = nn.Embedding.from_pretrained(
                torch.empty(config.vocab_size, config.d_model), freeze=False
            )
            self.layers = nn.ModuleList(
                Block(config, moe(i) if i in sparse else DenseFFN(config), sparse=i in sparse)
                for i in range(config.n_layers)
            )
            self.norm = RMSNorm(config.d_model, config.rms_eps)
            if not config.tie_embeddings:
                self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for router in self.routers():
            router.reset_parameters(seed=seed, std=config.init_std)
        routed = {id(router.weight) for router in self.routers()}
        for name, parameter in self.trunk_parameters().items():
            if parameter.ndim == 2 and id(parameter) not in routed:
                normal_(parameter, seed=seed, name=name, std=config.init_std)

    def forward(self, tokens_BS: Tensor, *, generator: torch.Generator | None = None) -> Output:
        """Logits of the next token at every position.

        Args:
            tokens_BS: int64, S at most `seq_len` (ValueError beyond).
            generator: of the routers' jitter (`RouterConfig.jitter`), used in training only.
        """
        config = self.config
        if tokens_BS.shape[1] > config.seq_len:
            raise ValueError(f"{tokens_BS.shape[1]} tokens in a sequence, but seq_len={config.seq_len}")
        x_BSD = self.embed_tokens(tokens_BS)
        cos_SH, sin_SH = rope_tables(tokens_BS.shape[1], config.head_dim, config.rope_theta, x_BSD)
        routings: list[Routing] = []
        for block in self.layers:
            x_BSD, routing = block(x_BSD, cos_SH, sin_SH, generator)
            if routing is not None:
                routings.append(routing)
        head = self.embed_tokens if config.tie_embeddings else self.lm_head
        return Output(F.linear(self.norm(x_BSD), head.weight), routings)

    def routers(self) -> list[Router]:
        """The routers of the MoE layers, ascending by layer."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def trunk_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is not an expert, by name: routers and projections around experts, too."""
        sparse = tuple(f"layers.{layer}.mlp." for layer in self.config.moe_layers)
        around = [module for module in self.modules() if isinstance(module, Router | LatentProjections)]
        ours = {id(parameter) for module in around for parameter in module.parameters()}
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if not name.startswith(sparse) or id(parameter) in ours
        }

    def parameter_groups(self, optimizer: OptimizerConfig, *, experts: bool = True) -> list[dict[str, object]]:
        """Groups for `torch.optim.AdamW`: matrices decay, norms and embeddings do not.

        Args:
            experts: include experts that live in this process (LocalMoE); False: the trunk alone.
        """
        named = dict(self.named_parameters()) if experts else self.trunk_parameters()
        decay = {name: p for name, p in named.items() if p.ndim >= 2 and name != "embed_tokens.weight"}
        return [
            {"params": list(decay.values()), "weight_decay": optimizer.weight_decay},
            {"params": [p for name, p in named.items() if name not in decay], "weight_decay": 0.0},
        ]
