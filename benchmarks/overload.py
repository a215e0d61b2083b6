# pyright: basic
"""A server that is asked for four times what it can do: refusals, latencies of what it accepts, memory.

    python benchmarks/overload.py    # five and a half minutes; --seconds for less

Four clients send Forward and Backward calls at a fixed rate, whatever comes back, each with a deadline. README.md says
how to read it.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import median

import psutil
import torch
import uvloop
from _hedging_run import make_run
from _processes import Child, end_cleanly_on_sigterm, print_table

from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.types import Encoding, PeerInfo
from moe_net.wire.messages import BackwardCall, CommitCall, ForwardCall, RoutedRows

CLIENTS, ROWS, DEADLINE_S = 4, 512, 0.5
OVERLOAD, LATENCY_BAR, MEMORY_BAR, GOODPUT_BAR = 4.0, 2.0, 1.05, 0.7
WARM_UP_S = 5.0


@dataclass(slots=True)
class Seen:
    """What the clients saw."""

    accepted_s: list[float] = field(default_factory=list[float])
    outcomes: Counter[str] = field(default_factory=Counter[str])
    refused_s: list[float] = field(default_factory=list[float])


def make_rows(d_model: int, n_experts: int, seed: int) -> RoutedRows:
    generator = torch.Generator().manual_seed(seed)
    return RoutedRows(
        x_RD=torch.randn(ROWS, d_model, generator=generator),
        experts_per_row_R=torch.full((ROWS,), 2, dtype=torch.int32),
        expert_index_P=torch.stack(
            [torch.randperm(n_experts, generator=generator)[:2] for _ in range(ROWS)]
        ).flatten().to(torch.int32),
        gate_P=torch.rand(2 * ROWS, generator=generator),
    )  # fmt: skip


class Client:
    """One trainer, as far as a server can tell: forwards, backwards, a commit now and then."""

    def __init__(self, number: int, peer: PeerInfo, seen: Seen) -> None:
        run = make_run()
        self.name = f"client-{number}"
        self._transport = GrpcTransport(run=run.name, shape=run.model.expert_shape)
        self._peer = peer
        self._seen = seen
        self._rows = make_rows(run.model.d_model, run.model.n_experts, number)
        self._step = 0
        self._done: list[bytes] = []
        """Calls of this step."""

    async def call(self) -> None:
        """A forward, and its backward if that was accepted."""
        layer, call_id, step = secrets.randbelow(4), secrets.token_bytes(16), self._step
        forward = ForwardCall(
            call_id=call_id, trainer=self.name, step=step, layer=layer, rows=self._rows, encoding=Encoding.BF16,
            reply_encoding=Encoding.BF16,
        )  # fmt: skip
        if await self._timed("forward", self._transport.forward(self._peer, forward, timeout_s=DEADLINE_S)):
            backward = BackwardCall(
                call_id=call_id, trainer=self.name, step=step, layer=layer, grad_RD=self._rows.x_RD,
                encoding=Encoding.BF16, reply_encoding=Encoding.BF16,
            )  # fmt: skip
            work = self._transport.backward(self._peer, backward, timeout_s=DEADLINE_S)
            if await self._timed("backward", work) and step == self._step:
                self._done.append(call_id)

    async def commit(self) -> None:
        call = CommitCall(trainer=self.name, step=self._step, tokens=1, calls=tuple(self._done))
        self._step += 1
        self._done.clear()
        await self._timed("commit", self._transport.commit(self._peer, call, timeout_s=DEADLINE_S))

    async def _timed(self, kind: str, work) -> bool:
        started_s = time.perf_counter()
        try:
            await work
        except CallError as error:
            self._seen.outcomes[error.failure.value] += 1
            if error.failure is CallFailure.BUSY:
                self._seen.refused_s.append(time.perf_counter() - started_s)
            return False
        self._seen.outcomes["accepted"] += 1
        if kind != "commit":
            self._seen.accepted_s.append(time.perf_counter() - started_s)
        return True

    async def close(self) -> None:
        await self._transport.close()


async def capacity_per_s(client: Client, seconds: float) -> float:
    """Forward-and-backward pairs per second with three at a time."""
    done, end_s = 0, time.perf_counter() + seconds

    async def one_after_another() -> None:
        nonlocal done
        while time.perf_counter() < end_s:
            await client.call()
            done += 1

    await asyncio.gather(*(one_after_another() for _ in range(3)))
    await client.commit()
    return done / seconds


async def overload(clients: list[Client], per_s: float, seconds: float) -> None:
    """Every client sends its share of `per_s` calls, one at its time, whatever has become of those before."""

    async def send(client: Client) -> None:
        began_s, sent = time.perf_counter(), 0
        async with asyncio.TaskGroup() as calls:
            while (now_s := time.perf_counter()) < began_s + seconds:
                while sent < (now_s - began_s) * per_s / len(clients):
                    calls.create_task(client.call())
                    sent += 1
                    if sent % 50 == 0:
                        calls.create_task(client.commit())
                await asyncio.sleep(0.005)

    await asyncio.gather(*(send(client) for client in clients))


async def watch(process: psutil.Process, every_s: float, into: list[int]) -> None:
    while True:
        into.append(process.memory_info().rss)
        await asyncio.sleep(every_s)


async def measure(address: str, pid: int, seconds: float) -> int:
    run = make_run()
    peer = PeerInfo(peer_id="server", address=address, experts=run.model.expert_ids)
    warm = Client(99, peer, Seen())
    await capacity_per_s(warm, WARM_UP_S)
    capacity = await capacity_per_s(warm, WARM_UP_S)
    seen, rss = Seen(), list[int]()
    clients = [Client(i, peer, seen) for i in range(CLIENTS)]
    watching = asyncio.create_task(watch(psutil.Process(pid), 1.0, rss))
    try:
        await overload(clients, OVERLOAD * capacity, seconds)
    finally:
        watching.cancel()
        for client in (warm, *clients):
            await client.close()
    return report(seen, rss, capacity, seconds)


def report(seen: Seen, rss: list[int], capacity: float, seconds: float) -> int:
    ordered = sorted(seen.accepted_s)
    p99_s = ordered[int(0.99 * len(ordered))]
    fifth = max(1, len(rss) // 5)
    early, late = median(rss[fifth : 2 * fifth]), median(rss[-fifth:])
    # A pair of calls is the unit of the capacity.
    goodput = len(seen.accepted_s) / 2 / seconds / capacity
    print(f"capacity {capacity:.0f} forward+backward/s of {ROWS} rows; asked for {OVERLOAD:.0f} times that")
    print_table(["outcome", "calls"], [[what, str(n)] for what, n in seen.outcomes.most_common()])
    refused_ms = 1e3 * median(seen.refused_s) if seen.refused_s else 0.0
    median_ms, p99_ms = 1e3 * median(ordered), 1e3 * p99_s
    print(f"accepted: median {median_ms:.0f} ms, p99 {p99_ms:.0f} ms; a refusal takes {refused_ms:.0f} ms")
    print(f"memory of the server: {early / 2**20:.0f} MiB early, {late / 2**20:.0f} MiB at the end")
    bars = {
        f"p99 of accepted calls at most {LATENCY_BAR:.0f} deadlines": p99_s <= LATENCY_BAR * DEADLINE_S,
        f"memory at the end at most {MEMORY_BAR} of early on": late <= MEMORY_BAR * early,
        f"at least {GOODPUT_BAR} of the capacity accepted ({goodput:.2f})": goodput >= GOODPUT_BAR,
        "refusals": seen.outcomes["busy"] > 0,
    }
    for bar, ok in bars.items():
        print(f"bar {bar}: {'ok' if ok else 'MISSED'}")
    return int(not all(bars.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    torch.set_num_threads(1)
    with Child("_hedging_server.py", "server", "0", "0", "0") as server:
        ready = server.answer(60)
        return uvloop.run(measure(ready["address"], ready["pid"], arguments.seconds))


if __name__ == "__main__":
    raise SystemExit(main())
