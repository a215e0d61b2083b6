"""A swarm of real processes for tests: a small run, and how its coordinator, peers and trainers are started."""

from __future__ import annotations

import sys
from pathlib import Path

from moe_coordinator.config import to_toml
from moe_coordinator.supervisor import Child, ChildSpec, Supervisor
from moe_net.config import RunConfig
from moe_net.model.config import ModelConfig
from moe_net.optim import OptimizerConfig

READY_S = 60.0
SEQUENCES, SEQ_LEN = 4, 32
RUN = RunConfig(
    name="processes",
    model=ModelConfig(
        seq_len=SEQ_LEN, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, n_experts=4, d_ff_expert=32
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5, total_steps=40),
    global_batch_tokens=SEQUENCES * SEQ_LEN,
    wire="fp32",
    # Short, so that a peer that was killed leaves the directory within the test.
    record_ttl_s=6.0,
)  # fmt: skip


def module(name: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *map(str, arguments))


def trainer_spec(join: str, out: Path, steps: int, *more: object, name: str = "trainer") -> ChildSpec:
    argv = module(
        "moe_peer.cli", "train", "--join", join, "--out", out, "--steps", steps, "--sequences", SEQUENCES,
        "--eval-every", 10, "--eval-batches", 1, "--checkpoint-every", 10, "--sample-tokens", 8, "--threads", 1,
        "--max-data-mib", 1, *more,
    )  # fmt: skip
    return ChildSpec(name=name, argv=argv)


def peer_spec(name: str, join: str, *more: object) -> ChildSpec:
    return ChildSpec(name=name, argv=module("moe_peer.cli", "serve", "--join", join, "--threads", 1, *more))


async def start_coordinator(supervisor: Supervisor, folder: Path, run: RunConfig = RUN) -> tuple[Child, str]:
    (folder / "run.toml").write_text(to_toml(run))
    coordinator = await supervisor.start(
        ChildSpec(name="coordinator", argv=module("moe_coordinator.cli", "serve", "--config", folder / "run.toml"))
    )
    return coordinator, str((await coordinator.ready(READY_S))["address"])
