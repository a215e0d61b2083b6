# pyright: basic
"""The run of the hedging benchmark: a small transformer, four MoE layers."""

from __future__ import annotations

import numpy as np

from moe_net.config import RunConfig
from moe_net.data.batches import Batches
from moe_net.model.config import ModelConfig, RouterConfig
from moe_net.optim import OptimizerConfig

SEQUENCES, SEQ_LEN = 4, 32


def make_run() -> RunConfig:
    return RunConfig(
        name="hedging",
        model=ModelConfig(
            vocab_size=64, seq_len=SEQ_LEN, d_model=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16,
            n_experts=8, d_ff_expert=64, router=RouterConfig(experts_per_token=2),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, total_steps=10_000),
        global_batch_tokens=SEQUENCES * SEQ_LEN,
        wire="bf16",
    )  # fmt: skip


def make_batches(run: RunConfig) -> Batches:
    tokens = (np.arange(20_000) * 7 % run.model.vocab_size).astype(np.uint16)
    return Batches(tokens, seq_len=SEQ_LEN, sequences_per_micro=SEQUENCES, seed=run.seed)
