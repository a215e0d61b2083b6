# pyright: basic
"""Our side of the benchmarks: the run that client and server agree on, and a client connected to one server."""

from __future__ import annotations

from _moe_task import EXPERTS_PER_TOKEN, LEARNING_RATE, N_EXPERTS

from moe_net.config import RunConfig
from moe_net.model.config import ModelConfig, RouterConfig
from moe_net.optim import OptimizerConfig
from moe_net.types import ExpertId, PeerInfo

LAYER = 0
PEER = "benchmark-peer"
EXPERTS = tuple(ExpertId(LAYER, index) for index in range(N_EXPERTS))


def make_run(d_model: int, d_ff: int) -> RunConfig:
    """One MoE layer of plain GELU experts, fp32 on the wire; every commit makes a step of AdamW as torch's default."""
    return RunConfig(
        name="benchmark",
        model=ModelConfig(
            d_model=d_model,
            n_layers=1,
            n_experts=N_EXPERTS,
            d_ff_expert=d_ff,
            activation="gelu",
            router=RouterConfig(experts_per_token=EXPERTS_PER_TOKEN, combine="normalized", balance_loss=0.0),
        ),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE,
            warmup_steps=0,
            min_lr_ratio=1.0,
            beta2=0.999,
            weight_decay=0.01,
            clip_norm=0.0,
        ),
        global_batch_tokens=1,
        wire="fp32",
    )


def peer_at(address: str) -> PeerInfo:
    return PeerInfo(peer_id=PEER, address=address, experts=EXPERTS)
