# pyright: basic
"""Tokens/s of training as the round trip grows, with 1 to 64 micro-batches in flight.

After the throughput figure of Learning@home (Ryabinin & Gusev, 2020, section 4.1): four servers, four MoE layers,
forward and backward; every byte goes through a proxy that delays it. The law to hold, with B tokens in each of J
micro-batches in flight, and the round trip of a layer (the slowest of its four calls) as it is measured through the
same proxy with nothing else under way:

    measured >= 0.8 * min(capacity, J * B / (round trips of a micro-batch)),   capacity: the best at 0 ms
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from _latency_run import N_SERVERS, TRIPS, B
from _processes import Child, end_cleanly_on_sigterm, print_table

RTTS_MS = (0, 50, 100, 200)
# Micro-batches in flight -> in a step. In its last round trips fewer and fewer are under way, and each ends with an
# update of the trunk and a commit: 16 for each in flight where round trips are the bound.
MICRO_BATCHES = {1: 16, 4: 64, 16: 256, 64: 256}
BAR = 0.8
TIMEOUT_S = 600.0
N_ALONE = 8
"""Micro-batches that a layer's round trip is the mean of."""

Point = tuple[int, int]
"""Round trip in ms, micro-batches in flight."""


def measure(rtts_ms: list[int], repetitions: int, jitter: float) -> tuple[dict[int, float], dict[Point, list[float]]]:
    """Seconds of a layer's round trip by rtt, and tokens/s of each repetition by point."""
    trips_s: dict[int, list[float]] = {rtt: [] for rtt in rtts_ms}
    rates: dict[Point, list[float]] = {(rtt, j): [] for rtt in rtts_ms for j in MICRO_BATCHES}
    with ExitStack() as stack:
        servers = [stack.enter_context(Child("_latency_server.py", str(i))) for i in range(N_SERVERS)]
        addresses = [server.answer(60)["address"] for server in servers]
        network = stack.enter_context(Child("_latency_proxy.py", *addresses))
        proxied = network.answer(60)["addresses"]
        trainer = stack.enter_context(Child("_latency_trainer.py", *proxied))
        trainer.answer(60)
        trainer.ask(TIMEOUT_S, do="train", in_flight=16, n=32)  # warm
        # Round and round, so that a noisy minute hits every point alike.
        for repetition in range(repetitions):
            for rtt in rtts_ms:
                network.ask(10, rtt_s=rtt / 1000, jitter=jitter)
                # What a micro-batch alone waits for, by the model's own routing: the busiest of four servers decides.
                alone = trainer.ask(TIMEOUT_S, do="train", in_flight=1, n=N_ALONE)
                trips_s[rtt].append(alone["idle_s"] / (N_ALONE * TRIPS))
                for j, n in MICRO_BATCHES.items():
                    got = trainer.ask(TIMEOUT_S, do="train", in_flight=j, n=n)
                    rates[rtt, j].append(got["tokens"] / got["taken_s"])
                    print(
                        f"  round {repetition + 1}: {rtt:3} ms, {j:2} in flight: {rates[rtt, j][-1]:6.0f} tokens/s, "
                        f"{got['taken_s']:5.1f} s, nothing computed in {got['idle_s']:5.1f} s, "
                        f"own CPU {got['cpu_s']:5.1f} s, {got['retries']} retries so far",
                        flush=True,
                    )
    return {rtt: median(values) for rtt, values in trips_s.items()}, rates


def plot(path: Path, rates: dict[Point, float], bounds: dict[Point, float], rtts_ms: list[int]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, j in enumerate(MICRO_BATCHES):
        label = "strictly serial" if j == 1 else f"{j} in flight"
        axes.plot(rtts_ms, [rates[rtt, j] for rtt in rtts_ms], "o-", color=f"C{number}", label=label)
        axes.plot(rtts_ms, [bounds[rtt, j] for rtt in rtts_ms], ":", color=f"C{number}")
    axes.set(xlabel="round trip, ms", ylabel="tokens/s", ylim=(0, None), title="Throughput (dotted: the bound)")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3, help="of every point; the median counts")
    parser.add_argument("--rtt-ms", type=int, nargs="+", default=list(RTTS_MS), help="round trips; 0 must be one")
    parser.add_argument("--jitter", type=float, default=0.1, help="mean of the random delay, as a share of the rest")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    options = parser.parse_args()
    if 0 not in options.rtt_ms:
        parser.error("--rtt-ms: the capacity is measured at 0")
    end_cleanly_on_sigterm()
    print(f"{os.cpu_count()} cores; B = {B} tokens a micro-batch, {TRIPS} round trips each", flush=True)
    trips_s, all_rates = measure(options.rtt_ms, options.repetitions, options.jitter)
    rates = {point: median(values) for point, values in all_rates.items()}
    capacity = max(rate for (rtt, _), rate in rates.items() if rtt == 0)
    bounds = {(rtt, j): min(capacity, j * B / (TRIPS * trips_s[rtt])) for rtt, j in rates}
    header = ["round trip", "a layer's, measured", *(f"J = {j}" for j in MICRO_BATCHES), "best / capacity"]
    rows = [
        [
            f"{rtt} ms",
            f"{trips_s[rtt] * 1000:.1f} ms",
            *(f"{rates[rtt, j]:.0f} ({rates[rtt, j] / bounds[rtt, j]:.2f})" for j in MICRO_BATCHES),
            f"{max(rates[rtt, j] for j in MICRO_BATCHES) / capacity:.2f}",
        ]
        for rtt in options.rtt_ms
    ]
    print("\ntokens/s (and its share of the bound); J = 1 is strictly serial")
    print_table(header, rows)
    missed = [f"{rtt} ms, J = {j}" for (rtt, j), rate in rates.items() if rate < BAR * bounds[rtt, j]]
    slowest = max(options.rtt_ms)
    if max(rates[slowest, j] for j in MICRO_BATCHES) < BAR * capacity:
        missed.append(f"{slowest} ms against 0 ms")
    print(f"bar {BAR} of the bound: {'missed at ' + '; '.join(missed) if missed else 'met everywhere'}")
    if options.plot is not None:
        plot(options.plot, rates, bounds, options.rtt_ms)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
