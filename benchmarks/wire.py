# pyright: basic
"""Payload throughput of one call with a tensor each way: ours, bare TCP, plain gRPC, hivemind.

    python benchmarks/wire.py    # about a minute

Each contestant is two processes on this machine, connected over loopback; they take turns within a round. GB/s counts
the payload of request and reply. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

from _processes import Child, end_cleanly_on_sigterm, print_table

MIB = 2**20
SIZES = {"4 KiB": 4096, "1 MiB": MIB, "16 MiB": 16 * MIB}
TIMEOUT_S = 120.0
TCP = "bare uvloop TCP"
RAW = "grpc.aio, raw bytes"
OURS = "moe-net Forward"
# hivemind refuses a unary message above 4 MiB, and its client sends none above 2 MiB.
UNARY_LIMIT_BYTES = 2 * MIB
TCP_BAR, HIVEMIND_BAR = 0.6, 5.0


@dataclass(slots=True)
class Contestant:
    name: str
    client: Child
    kind: str
    limit_bytes: int = 64 * MIB
    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    n_lost: int = 0

    def measure(self, size: str, at_least_s: float) -> None:
        if SIZES[size] <= self.limit_bytes:
            answer = self.client.ask(
                TIMEOUT_S, do="trips", kind=self.kind, payload_bytes=SIZES[size], at_least_s=at_least_s
            )
            self.seconds.setdefault(size, []).extend(answer["seconds"])
            self.n_lost += answer["lost"]

    def trip_s(self, size: str) -> float | None:
        return median(self.seconds[size]) if size in self.seconds else None

    def gb_per_s(self, size: str) -> float | None:
        trip_s = self.trip_s(size)
        return None if trip_s is None else 2 * SIZES[size] / trip_s / 1e9


def start(stack: ExitStack, script: str) -> Child:
    """Server and client of one script; returns the client."""
    server = stack.enter_context(Child(script, "server"))
    client = stack.enter_context(Child(script, "client", server.answer(TIMEOUT_S)["address"]))
    client.answer(TIMEOUT_S)
    return client


def print_throughput(found: list[Contestant]) -> None:
    by_name = {contestant.name: contestant for contestant in found}
    rows = []
    for contestant in found:
        small_s = contestant.trip_s("4 KiB")
        row = [contestant.name, "-" if small_s is None else f"{small_s * 1e3:.2f}"]
        for size in ("1 MiB", "16 MiB"):
            speed, bar = contestant.gb_per_s(size), by_name[TCP].gb_per_s(size)
            row += ["-", "-"] if speed is None or bar is None else [f"{speed:.2f}", f"{speed / bar:.2f}"]
        rows.append(row)
    print_table(["GB/s both ways", "4 KiB, ms", "1 MiB", "of TCP", "16 MiB", "of TCP"], rows)
    for contestant in found:
        if contestant.n_lost:
            n_calls = contestant.n_lost + sum(map(len, contestant.seconds.values()))
            print(
                f"  {contestant.name}: {contestant.n_lost} of {n_calls} calls ended without reply or error (not timed)"
            )


def print_bars(found: list[Contestant]) -> bool:
    """Ours against the bars; False when one is missed."""
    by_name = {contestant.name: contestant for contestant in found}
    met = True
    for size in ("1 MiB", "16 MiB"):
        ours = by_name[OURS].gb_per_s(size) or 0.0
        fastest = max(c.gb_per_s(size) or 0.0 for c in found if c.name.startswith("hivemind"))
        for other, speed, bar in (
            (TCP, by_name[TCP].gb_per_s(size) or 0.0, TCP_BAR),
            ("hivemind", fastest, HIVEMIND_BAR),
        ):
            met &= ours >= bar * speed
            verdict = "met" if ours >= bar * speed else "MISSED"
            print(f"bar {bar:g}x {other} at {size}: {verdict} ({ours / speed:.2f}x)")
    return met


def print_profile(found: list[Contestant]) -> None:
    """Where the time between a bare TCP echo and ours goes, in ms of one round trip."""
    by_name = {contestant.name: contestant for contestant in found}
    for size in ("1 MiB", "16 MiB"):
        parts = by_name[OURS].client.ask(TIMEOUT_S, do="parts", payload_bytes=SIZES[size])["parts_s"]
        tcp_s, raw_s, ours_s = (by_name[name].trip_s(size) or 0.0 for name in (TCP, RAW, OURS))
        copy_s, finite_s = parts.pop("copy into bytes"), parts.pop("finite check alone")
        lines = {
            "TCP": tcp_s,
            "gRPC (raw bytes, without the copy into them, minus TCP)": raw_s - copy_s - tcp_s,
            **parts,
            "the rest: the server's queue, less what pieces save": ours_s - raw_s + copy_s - sum(parts.values()),
            "all": ours_s,
            "(one copy of the payload)": copy_s,
            "(one check that the payload is finite)": finite_s,
        }
        print(f"\none round trip of {size}")
        print_table(["part", "ms"], [[name, f"{value * 1e3:.2f}"] for name, value in lines.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--at-least-s", type=float, default=0.3, help="seconds per contestant, size and round")
    parser.add_argument("--without-ours", action="store_true")
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    print(f"cores: {os.cpu_count()}, load before: {os.getloadavg()[0]:.1f}; hivemind unary: at most 2 MiB per message")
    with ExitStack() as stack:
        tcp, plain, hivemind = (start(stack, f"_wire_{name}.py") for name in ("tcp", "grpc", "hivemind"))
        found = [
            Contestant(TCP, tcp, "tcp"),
            Contestant(RAW, plain, "raw"),
            Contestant("grpc.aio, protobuf bytes field", plain, "protobuf"),
            Contestant("hivemind unary", hivemind, "unary", UNARY_LIMIT_BYTES),
            Contestant("hivemind stream", hivemind, "stream"),
        ]
        if not arguments.without_ours:
            found.insert(1, Contestant(OURS, start(stack, "_wire_moe_net.py"), "forward"))
        for _ in range(arguments.rounds):
            for size in SIZES:
                for contestant in found:
                    contestant.measure(size, arguments.at_least_s)
        print_throughput(found)
        met = True
        if not arguments.without_ours:
            met = print_bars(found)
            print_profile(found)
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
