"""`moe-coordinator local` with its real members: what `make demo` does, on a model that is trained in seconds."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from moe_coordinator.config import newest_checkpoint, to_toml
from moe_net.config import RunConfig
from moe_net.model.config import ModelConfig
from moe_net.optim import OptimizerConfig
from moe_peer.checkpoint import read_meta
from moe_peer.metrics import EvalMetrics, Event, StepMetrics, read_metrics

SEQUENCES, SEQ_LEN, STEPS, KILL_AT = 4, 32, 40, 20
RUN = RunConfig(
    name="local",
    model=ModelConfig(
        seq_len=SEQ_LEN, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, n_experts=6, d_ff_expert=32
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5, total_steps=STEPS),
    global_batch_tokens=SEQUENCES * SEQ_LEN,
)  # fmt: skip


async def local(folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    (folder / "in.toml").write_text(to_toml(RUN))
    text = Path(asyncio.__file__).parent  # some source: enough, and read at once
    argv = (
        *(sys.executable, "-m", "moe_coordinator.cli", "local", "--config", str(folder / "in.toml")),
        *("--out", str(folder / "out"), "--sequences", str(SEQUENCES), "--data", str(text), *arguments),
    )
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*argv, stdout=pipe, stderr=pipe)


async def test_a_real_swarm_learns_and_goes_on_without_the_peer_that_was_killed(tmp_path: Path) -> None:
    process = await local(tmp_path, "--peers", "3", "--kill-peer-at-step", str(KILL_AT), "--eval-every", "20")
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    assert b"killed peer-2" in stderr
    for word in (b"val nats per byte", b"bigram nats per byte", b"loss.png", b"sample:", b"def "):
        assert word in stdout
    out = tmp_path / "out" / "trainer-0"
    records = read_metrics(out / "metrics.jsonl")
    steps = [r for r in records if isinstance(r, StepMetrics)]
    assert [s.step for s in steps] == list(range(STEPS))
    assert (steps[0].live_experts, steps[-1].live_experts) == (12, 8)
    assert "peer_suspended" in {r.what for r in records if isinstance(r, Event) and r.step >= KILL_AT}
    evaluations = {r.step: r.val_nats_per_byte for r in records if isinstance(r, EvalMetrics)}
    assert list(evaluations) == [0, 20, STEPS]
    assert evaluations[STEPS] < evaluations[20] < 0.9 * evaluations[0]
    assert (out / "loss.png").stat().st_size > 10_000
    assert read_meta(newest_checkpoint(tmp_path / "out")).step == STEPS
