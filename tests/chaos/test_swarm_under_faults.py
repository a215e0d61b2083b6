"""A swarm of real processes, as users run it, with faults as users describe them."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from programs import on_screen

from moe_coordinator.config import newest_checkpoint, to_toml
from moe_net.config import RunConfig
from moe_net.model.config import ModelConfig
from moe_net.optim import OptimizerConfig
from moe_peer.checkpoint import read_meta, saved_versions
from moe_peer.metrics import Event, StepMetrics, read_metrics

SEQUENCES, SEQ_LEN, STEPS = 4, 32, 30
RUN = RunConfig(
    name="chaos",
    model=ModelConfig(
        seq_len=SEQ_LEN, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, n_experts=4, d_ff_expert=32
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5, total_steps=STEPS),
    global_batch_tokens=SEQUENCES * SEQ_LEN,
    wire="fp32",
    # Short, so that a peer that was killed leaves the directory within the test.
    record_ttl_s=6.0,
)  # fmt: skip
FAULTS = """
[network]
round_trip_s = 0.004
jitter_s = 0.002
[[fault]]
at_step = 0
target = "coordinator"
what = "restart"
[[fault]]
at_step = 4
target = "peer-0"
what = "stop"
duration_s = 3.0
[[fault]]
at_step = 10
target = "peer-1"
what = "kill"
[[fault]]
at_step = 16
target = "peer-2"
what = "cut"
duration_s = 2.0
"""


async def test_training_ends_well_with_one_peer_suspended_another_killed_and_a_third_cut_off(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(to_toml(RUN))
    (tmp_path / "faults.toml").write_text(FAULTS)
    (tmp_path / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(2000)))
    out = tmp_path / "out"
    arguments = {
        "--config": tmp_path / "run.toml", "--faults": tmp_path / "faults.toml", "--data": tmp_path / "text.txt",
        "--out": out, "--peers": 4, "--replicas": 2, "--sequences": SEQUENCES, "--eval-every": STEPS,
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "moe_coordinator.cli", "local"),
        *(str(word) for pair in arguments.items() for word in pair),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    records = read_metrics(out / "trainer-0" / "metrics.jsonl")
    steps = [r for r in records if isinstance(r, StepMetrics)]
    assert [s.step for s in steps] == list(range(STEPS))
    assert steps[-1].loss < steps[0].loss
    # Three of four peers in a row: at the worst moment two of four indices have no replica left, and are masked.
    assert min(s.live_experts for s in steps) >= 4
    assert {r.what for r in records if isinstance(r, Event)} >= {"peer_suspended"}
    notes = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    began = {(note["what"], note["target"]): note for note in notes if note["phase"] == "began"}
    assert {what: note["step"] for (what, _), note in began.items()} == {"restart": 0, "stop": 4, "kill": 10, "cut": 16}
    for line in (b"step 4: suspended peer-0 (SIGSTOP) for 3 s", b"step 16: cut peer-2 off for 2 s"):
        assert line in stderr
    first, again = (ready(out / "logs" / f"coordinator{suffix}.log") for suffix in ("", ".1"))
    assert first == again, "the same address, ports and key of the DHT"
    assert f"coordinator serves again at {first['address']}".encode() in stderr


async def test_a_fault_that_goes_on_when_the_swarm_is_stopped_does_not_keep_it_from_saving(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(to_toml(RUN))
    (tmp_path / "faults.toml").write_text('[[fault]]\nat_step = 3\ntarget = "peer-0"\nwhat = "stop"\n')
    out = tmp_path / "out"
    argv = (
        *(sys.executable, "-m", "moe_coordinator.cli", "local", "--config", tmp_path / "run.toml", "--out", out),
        *("--faults", tmp_path / "faults.toml", "--peers", 1, "--sequences", SEQUENCES, "--max-data-mib", 1),
    )
    with tempfile.TemporaryDirectory(prefix="moe-") as tmp:
        async with on_screen("pipe", [*map(str, argv)], tmp=Path(tmp)) as swarm:
            await swarm.until(lambda: (out / "faults.jsonl").exists() and "began" in (out / "faults.jsonl").read_text())
            swarm.signal(signal.SIGTERM)
            assert await swarm.ended(within_s=30.0) == 128 + signal.SIGTERM, swarm.screen
    checkpoint = newest_checkpoint(out)
    made = sum(isinstance(r, StepMetrics) for r in read_metrics(out / "trainer-0" / "metrics.jsonl"))
    assert read_meta(checkpoint).step == made
    assert saved_versions(checkpoint) == dict.fromkeys(RUN.model.expert_ids, made)


def ready(log: Path) -> Any:
    return json.loads(next(line for line in log.read_text().splitlines() if line.startswith("{")))
