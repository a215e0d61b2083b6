# pyright: basic
"""What replicas cost in quality: one peer, two that share the calls, and two of which one is killed and replaced.

    python benchmarks/replicas.py [--plot docs/replicas.png]    # about five minutes

Three swarms of `moe-coordinator local`, one after the other, on the same data. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean

from _processes import end_cleanly_on_sigterm, print_table

from moe_coordinator.config import to_toml
from moe_net.config import RunConfig
from moe_net.model.config import ModelConfig
from moe_net.optim import OptimizerConfig
from moe_peer.metrics import EvalMetrics, StepMetrics, read_metrics

SEQUENCES, SEQ_LEN, STEPS, EVERY = 64, 64, 240, 20
KILL_AT = 120
CURVE_BAR, STEP_BAR = 0.01, 0.01
RUN = RunConfig(
    name="replicas",
    model=ModelConfig(
        seq_len=SEQ_LEN, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, n_experts=8, d_ff_expert=64,
        init_std=0.06,
    ),
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20, total_steps=STEPS),
    global_batch_tokens=SEQUENCES * SEQ_LEN,
    record_ttl_s=10.0,
)  # fmt: skip
FAULTS = f"""
[[fault]]
target = "peer-1"
what = "restart"
at_step = {KILL_AT}
after_s = 2.0
"""
ONE, TWO, REPLACED = "one peer", "two replicas", "one of two replaced"
Curve = Mapping[int, float]


def swarm(folder: Path, name: str, *options: str) -> tuple[Curve, list[StepMetrics], Path]:
    """(evaluations by step, steps, its folder)"""
    out = folder / name.replace(" ", "-")
    command = [
        sys.executable, "-m", "moe_coordinator.cli", "local", "--config", str(folder / "run.toml"), "--sequences",
        str(SEQUENCES), "--eval-every", str(EVERY), "--out", str(out), *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    records = read_metrics(out / "trainer-0" / "metrics.jsonl")
    curve = {r.step: r.val_nats_per_byte for r in records if isinstance(r, EvalMetrics)}
    return curve, [r for r in records if isinstance(r, StepMetrics)], out


def exchanges(out: Path) -> list[dict]:
    """What the peers logged of their meetings."""
    events = []
    for log in sorted((out / "logs").glob("peer-*.log*")):
        # What goes to stderr meanwhile may stand on the same line.
        text, decode = log.read_text(errors="replace"), json.JSONDecoder().raw_decode
        begins = [found.start() for found in re.finditer(r'\{"event": "(?:exchange|caught_up)"', text)]
        events += [{"log": log.name, **decode(text, begin)[0]} for begin in begins]
    return events


def plot(path: Path, curves: Mapping[str, Curve]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for name, curve in curves.items():
        axis.plot(list(curve), list(curve.values()), "o-", markersize=3, label=name)
    axis.axvline(KILL_AT, color="grey", linestyle=":", label="SIGKILL, and a fresh peer")
    axis.set_xlabel("steps")
    axis.set_ylabel("validation loss, nats per byte")
    axis.legend(frameon=False)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, help="write the curves here, as PNG")
    parser.add_argument("--seed", type=int, default=RUN.seed)
    parser.add_argument("--out", type=Path, help="keep logs and metrics here")
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.toml").write_text(to_toml(replace(RUN, seed=arguments.seed)))
        (folder / "faults.toml").write_text(FAULTS)
        shared = ("--peers", "2", "--replicas", "2", "--spread-replicas")
        runs = {
            ONE: swarm(folder, ONE, "--peers", "1"),
            TWO: swarm(folder, TWO, *shared),
            REPLACED: swarm(folder, REPLACED, *shared, "--faults", str(folder / "faults.toml")),
        }
        met = {name: exchanges(out) for name, (_, _, out) in runs.items()}
    if arguments.plot:
        plot(arguments.plot, {name: curve for name, (curve, _, _) in runs.items()})
    return report(runs, met)


def step_in(replaced: Curve, two: Curve) -> float:
    """What the replacement costs at the worst evaluation, as a share: its loss by that of two replicas, against what
    that was before the kill. Two trainings of two replicas are up to a percent apart half-way: which replica
    answers is a matter of microseconds, and a tie between experts then falls the other way."""
    ratio = {s: loss / two[s] for s, loss in replaced.items()}
    before = mean(r for s, r in ratio.items() if KILL_AT // 2 <= s <= KILL_AT)
    return max(r for s, r in ratio.items() if s > KILL_AT) / before - 1


def report(runs: Mapping[str, tuple[Curve, list[StepMetrics], Path]], met: Mapping[str, list[dict]]) -> int:
    steps = sorted(runs[ONE][0])
    print_table(
        ["validation loss after", *runs],
        [[str(s), *(f"{curve[s]:.4f}" for curve, _, _ in runs.values())] for s in steps],
    )
    for name, events in met.items():
        apart = [e["divergence"] for e in events if e["event"] == "exchange"]
        caught = [e for e in events if e["event"] == "caught_up"]
        if apart:
            shares = f"{mean(apart):.3%} on average, {max(apart):.3%} at most"
            print(f"{name}: {len(apart)} exchanges, weights apart by {shares}")
        for event in caught:
            print(f"{name}: {event['log']} caught up with {event['experts']} experts in {event['took_s']:.2f} s")
    base = runs[ONE][0]
    worst = {name: max(runs[name][0][s] / base[s] - 1 for s in steps if s >= KILL_AT // 2) for name in (TWO, REPLACED)}
    jump = step_in(runs[REPLACED][0], runs[TWO][0])
    bars = {
        f"{name} within {CURVE_BAR:.0%} of one peer ({worst[name]:+.2%} at the worst)": worst[name] <= CURVE_BAR
        for name in (TWO, REPLACED)
    } | {
        f"a replacement shows no step ({jump:+.2%} at the worst)": jump <= STEP_BAR,
        "the newcomer caught up": any(e["event"] == "caught_up" for e in met[REPLACED]),
    }
    for bar, ok in bars.items():
        print(f"bar {bar}: {'ok' if ok else 'MISSED'}")
    return int(not all(bars.values()))


if __name__ == "__main__":
    raise SystemExit(main())
