# pyright: basic
"""How long a training step waits for servers that stall, die or are cut off, and how soon it is at full speed again.

    python benchmarks/recovery.py    # about two minutes

`moe-coordinator local` runs four servers and a trainer; one server is stopped (SIGSTOP) for 20 s, another killed
(SIGKILL), the way to a third blackholed for good. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from _processes import end_cleanly_on_sigterm, print_table

from moe_coordinator.config import to_toml
from moe_net.config import RunConfig
from moe_net.model.config import ModelConfig
from moe_net.optim import OptimizerConfig
from moe_peer.metrics import Event, StepMetrics, read_metrics

SEQUENCES, SEQ_LEN, PEERS = 8, 64, 4
# What happens when, in seconds after the first step; and how many servers run from then on.
STOPPED_S, STOP_LENGTH_S, KILLED_S, BLACKHOLED_S, END_S = 15.0, 20.0, 55.0, 75.0, 100.0
STEP_BAR, SPEED_BAR, RECOVERY_S = 3.0, 0.9, 5.0
RUN = RunConfig(
    name="recovery",
    model=ModelConfig(
        seq_len=SEQ_LEN, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, n_experts=8, d_ff_expert=64,
        init_std=0.06,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20, total_steps=100_000),
    global_batch_tokens=SEQUENCES * SEQ_LEN,
)  # fmt: skip
FAULTS = f"""
[[fault]]
target = "peer-0"
what = "stop"
at_s = {STOPPED_S}
duration_s = {STOP_LENGTH_S}

[[fault]]
target = "peer-1"
what = "kill"
at_s = {KILLED_S}

[[fault]]
target = "peer-2"
what = "blackhole"
at_s = {BLACKHOLED_S}

[[fault]]
target = "trainer-0"
what = "term"
at_s = {END_S}
"""


@dataclass(frozen=True, slots=True)
class Phase:
    """From one event to the next."""

    name: str
    began_s: float
    ended_s: float
    alive: int


def phases(out: Path) -> list[Phase]:
    """As they really happened (Unix time)."""
    noted = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    at_s = {(note["target"], note["what"], note["phase"]): note["time_s"] for note in noted}
    marks = [
        ("SIGSTOP of peer-0", at_s["peer-0", "stop", "began"], 3),
        ("SIGCONT of peer-0", at_s["peer-0", "stop", "ended"], 4),
        ("SIGKILL of peer-1", at_s["peer-1", "kill", "began"], 3),
        ("blackhole before peer-2", at_s["peer-2", "blackhole", "began"], 2),
    ]
    ends = [began for _, began, _ in marks[1:]] + [at_s["trainer-0", "term", "began"]]
    return [Phase(name, began, ended, alive) for (name, began, alive), ended in zip(marks, ends, strict=True)]


def speed(steps: list[StepMetrics], began_s: float, ended_s: float) -> float:
    """Tokens per second of the steps that ended in this time."""
    inside = [s for s in steps if began_s <= s.at_s < ended_s]
    return sum(s.tokens for s in inside) / sum(s.step_s for s in inside) if inside else 0.0


def steady_speed(steps: list[StepMetrics], began_s: float, ended_s: float) -> float:
    """The median over seconds: what the swarm can do, whatever happened in a few of them."""
    seconds = [speed(steps, t, t + 1) for t in map(float, range(int(began_s) + 1, int(ended_s) - 1))]
    return median(seconds) if seconds else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="keep logs and metrics here")
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = arguments.out or Path(folder) / "out"
        (Path(folder) / "run.toml").write_text(to_toml(RUN))
        (Path(folder) / "faults.toml").write_text(FAULTS)
        command = [
            sys.executable, "-m", "moe_coordinator.cli", "local", "--peers", str(PEERS), "--config",
            f"{folder}/run.toml", "--faults", f"{folder}/faults.toml", "--sequences", str(SEQUENCES),
            "--eval-every", "100000", "--steps", "100000", "--out", str(out),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            print(f"bar the trainer never fails: MISSED (exit code {done.returncode})")
            return 1
        records = read_metrics(out / "trainer-0" / "metrics.jsonl")
        return report(records, phases(out))


def report(records: list, happened: list[Phase]) -> int:
    steps = [r for r in records if isinstance(r, StepMetrics)]
    before = steady_speed(steps, steps[0].at_s + 3, happened[0].began_s)
    rows = [["before", "4", "", "", f"{before:.0f}", "", "", ""]]
    missed = 0
    for phase in happened:
        inside = [s for s in steps if phase.began_s <= s.at_s < phase.ended_s]
        longest = max(inside, key=lambda s: s.step_s)
        steady = steady_speed(steps, phase.began_s + RECOVERY_S, phase.ended_s)
        after = speed(steps, phase.began_s + RECOVERY_S, phase.began_s + 2 * RECOVERY_S)
        # Of what those that are alive can do: their share of what all could, or what they do in the end.
        capacity = max(steady, before * phase.alive / PEERS)
        ok = longest.step_s <= STEP_BAR * longest.deadline_s and after >= SPEED_BAR * capacity
        missed += not ok
        dropped = sum(s.dropped_pairs for s in inside) / max(1, sum(s.routed_pairs for s in inside))
        rows.append(
            [phase.name, str(phase.alive), f"{longest.step_s:.2f}", f"{longest.deadline_s:.2f}", f"{steady:.0f}",
             f"{after:.0f}", f"{after / capacity:.2f}", f"{dropped:.2%}"]
        )  # fmt: skip
    print_table(
        [
            "from this event on",
            "alive",
            "longest step, s",
            "deadline",
            "tokens/s",
            "5-10 s after",
            "of alive",
            "dropped",
        ],
        rows,
    )
    faults: dict[str, int] = {}
    for event in (r for r in records if isinstance(r, Event)):
        faults[f"{event.what} -> {event.action}"] = faults.get(f"{event.what} -> {event.action}", 0) + 1
    print("events: " + ", ".join(f"{n} x {what}" for what, n in sorted(faults.items())))
    print(
        f"bar: no step over {STEP_BAR:.0f} deadlines, {SPEED_BAR} of the alive capacity {RECOVERY_S:.0f} s after each "
        f"event: {'MISSED' if missed else 'ok'}"
    )
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
