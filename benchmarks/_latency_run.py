# pyright: basic
"""The run of `latency.py`: four MoE layers, four servers, each with a quarter of every layer's experts.

Sizes: almost all work is the experts', so that a step's waits are for servers and network, and a micro-batch of B
tokens takes two cores some 60 to 100 ms: 64 of them cover eight round trips of 200 ms.
"""

from __future__ import annotations

import numpy as np

from moe_net.config import RunConfig
from moe_net.data.batches import Batches
from moe_net.model.config import ModelConfig, RouterConfig
from moe_net.types import ExpertId

N_SERVERS = 4
N_LAYERS = 4
SEQ_LEN = 64
SEQUENCES = 4
B = SEQUENCES * SEQ_LEN
TRIPS = 2 * N_LAYERS
"""Of a micro-batch: each layer, forward and backward."""


def make_run() -> RunConfig:
    """Experts are never asked to step: a commit is a message, as in a large run between two steps."""
    return RunConfig(
        name="latency",
        model=ModelConfig(
            vocab_size=64, seq_len=SEQ_LEN, d_model=128, n_layers=N_LAYERS, n_heads=2, n_kv_heads=1, head_dim=32,
            n_experts=8, d_ff_expert=1280, router=RouterConfig(experts_per_token=2),
        ),
        global_batch_tokens=2**40,
    )  # fmt: skip


def experts_of(server: int) -> tuple[ExpertId, ...]:
    return tuple(e for e in make_run().model.expert_ids if e.index % N_SERVERS == server)


def make_batches(n_micro: int) -> Batches:
    tokens = np.random.default_rng(0).integers(0, 64, 200_000).astype(np.uint16)
    return Batches(tokens, seq_len=SEQ_LEN, sequences_per_micro=n_micro * SEQUENCES)
