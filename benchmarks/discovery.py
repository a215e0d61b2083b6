"""What the directory costs: records of a thousand peers in a small DHT, by layout.

    python benchmarks/discovery.py --peers 1000 --experts 4000 --nodes 20

Starts `--nodes` DHT members here (each has a libp2p daemon), announces `--peers` records through them and reads the
whole directory from one member, which is a client as a trainer at home is. Look-ups are requests to other nodes;
bytes are the protobuf answers that came in. Compared are the layout of moe-net (records in `--shards` dictionaries),
other numbers of dictionaries, one giant dictionary, and one key per expert (that one with `--per-expert-peers` peers
only: with all of them it takes minutes).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_net.discovery.dht import BEAM, DhtDiscovery
from moe_net.discovery.layout import SHARDS
from moe_net.discovery.record import Identity, sign
from moe_net.types import ExpertId

RUN = "benchmark"
TTL_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    layout: str
    announce_ms: float
    refresh_ms: float
    lookups: int
    mib: float
    largest_kib: float
    found: int


@dataclass(slots=True)
class Meter:
    """Counts what one member asks others and what comes back."""

    calls: int = 0
    bytes: int = 0

    def attach(self, member: DhtDiscovery) -> None:
        protocol: Any = member._node.protocol
        client = protocol.p2p._client
        call = client.call_unary_handler

        async def counted(*arguments: Any) -> bytes:
            answer = await call(*arguments)
            self.calls += 1
            self.bytes += len(answer)
            return answer

        client.call_unary_handler = counted


@contextlib.asynccontextmanager
async def swarm(nodes: int, shards: int) -> AsyncIterator[tuple[list[DhtDiscovery], DhtDiscovery]]:
    async with contextlib.AsyncExitStack() as stack:
        members = [await stack.enter_async_context(await DhtDiscovery.create(run=RUN, shards=shards))]
        while len(members) < nodes:
            join = [random.choice(members).addresses[0]]
            joining = DhtDiscovery.create(run=RUN, join=join, shards=shards, timeout_s=120)
            members.append(await stack.enter_async_context(await joining))
        joining = DhtDiscovery.create(
            run=RUN, join=members[0].addresses, shards=shards, client_mode=True, timeout_s=120
        )
        yield members, await stack.enter_async_context(await joining)


def largest_kib(members: Sequence[DhtDiscovery]) -> float:
    """Of the dictionaries and values that any member keeps, as they travel."""
    serializer: Any = members[0]._node.protocol.serializer
    values = (value for member in members for _, (value, _) in member._node.protocol.storage.items())
    return max(len(value if isinstance(value, bytes) else serializer.dumps(value)) for value in values) / 1024


async def in_records(
    args: argparse.Namespace, identities: Sequence[Identity], hosted: Sequence[list[ExpertId]], shards: int, name: str
) -> Row:
    """The records in `shards` dictionaries, by moe-net's own code."""
    async with swarm(args.nodes, shards) as (members, reader):
        gate = asyncio.Semaphore(args.parallel)
        took_ms: list[float] = []

        async def announce(number: int) -> None:
            async with gate:
                expires_at_s = time.time() + TTL_S
                record = sign(
                    identities[number],
                    run=RUN,
                    address=f"192.0.2.{number % 250 + 1}:{4000 + number}",
                    experts=hosted[number],
                    sequence=int(expires_at_s * 1000),
                    expires_at_s=expires_at_s,
                )
                started_s = time.perf_counter()
                member = members[number % len(members)]
                await member.announce(record, peer_id=identities[number].peer_id, expires_at_s=expires_at_s)
                took_ms.append(1e3 * (time.perf_counter() - started_s))

        started_s = time.perf_counter()
        await asyncio.gather(*(announce(n) for n in range(len(identities))))
        all_s = time.perf_counter() - started_s
        meter = Meter()
        meter.attach(reader)
        refresh_ms: list[float] = []
        found = 0
        for _ in range(args.repeats):
            started_s = time.perf_counter()
            found = len(await reader.peers())
            refresh_ms.append(1e3 * (time.perf_counter() - started_s))
        return Row(
            layout=name,
            announce_ms=1e3 * all_s / len(identities),
            refresh_ms=statistics.median(refresh_ms),
            lookups=meter.calls // args.repeats,
            mib=meter.bytes / args.repeats / 2**20,
            largest_kib=largest_kib(members),
            found=found,
        )


async def in_keys_of_experts(
    args: argparse.Namespace, identities: Sequence[Identity], hosted: Sequence[list[ExpertId]]
) -> Row:
    """One key per expert, a dictionary of its replicas' addresses, as hivemind declares experts."""
    async with swarm(args.nodes, SHARDS) as (members, reader):
        gate = asyncio.Semaphore(args.parallel)
        expires_at_s = time.time() + TTL_S

        async def announce(number: int) -> None:
            async with gate:
                node: Any = members[number % len(members)]._node
                keys = [f"{RUN}/{expert}" for expert in hosted[number]]
                address = f"192.0.2.{number % 250 + 1}:{4000 + number}"
                subkeys = [identities[number].peer_id] * len(keys)
                await node.store_many(keys, [address] * len(keys), expires_at_s, subkeys=subkeys)

        started_s = time.perf_counter()
        await asyncio.gather(*(announce(n) for n in range(len(identities))))
        all_s = time.perf_counter() - started_s
        meter = Meter()
        meter.attach(reader)
        node: Any = reader._node
        keys = [f"{RUN}/{expert}" for expert in sorted({e for experts in hosted for e in experts})]
        # Once: it is a matter of seconds.
        started_s = time.perf_counter()
        found = await node.get_many(keys, sufficient_expiration_time=math.inf, beam_size=BEAM)
        refresh_ms = 1e3 * (time.perf_counter() - started_s)
        peers = {subkey for entry in found.values() if entry is not None for subkey in entry.value}
        return Row(
            layout=f"{len(identities)} peers, {len(keys)} keys of experts",
            announce_ms=1e3 * all_s / len(identities),
            refresh_ms=refresh_ms,
            lookups=meter.calls,
            mib=meter.bytes / 2**20,
            largest_kib=largest_kib(members),
            found=len(peers),
        )


def host(args: argparse.Namespace) -> list[list[ExpertId]]:
    """Runs of neighbouring experts, `--hosted` for each peer; a layer has 256."""
    starts = [(n * args.hosted) % args.experts for n in range(args.peers)]
    flat = [[(start + i) % args.experts for i in range(args.hosted)] for start in starts]
    return [[ExpertId(number // 256, number % 256) for number in numbers] for numbers in flat]


async def measure(args: argparse.Namespace) -> list[Row]:
    random.seed(0)
    identities = [Identity.generate() for _ in range(args.peers)]
    hosted = host(args)
    rows: list[Row] = []
    layouts = sorted({args.shards, *args.compare})
    for shards in layouts:
        mark = " (moe-net)" if shards == args.shards else " (giant)" if shards == 1 else ""
        rows.append(await in_records(args, identities, hosted, shards, f"{shards} dictionaries{mark}"))
    few = min(args.per_expert_peers, args.peers)
    if few:
        rows.append(await in_keys_of_experts(args, identities[:few], hosted[:few]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=1000, help="records")
    parser.add_argument("--experts", type=int, default=4000, help="different experts")
    parser.add_argument("--hosted", type=int, default=8, help="experts of each peer")
    parser.add_argument("--nodes", type=int, default=20, help="DHT members that keep the records")
    parser.add_argument("--shards", type=int, default=SHARDS, help="dictionaries of moe-net's layout")
    parser.add_argument("--compare", type=int, nargs="*", default=[1], help="other numbers of dictionaries")
    parser.add_argument("--parallel", type=int, default=16, help="announcements at the same time")
    parser.add_argument("--repeats", type=int, default=3, help="refreshes, of which the median counts")
    parser.add_argument("--per-expert-peers", type=int, default=25, help="peers of that comparison; 0: leave it out")
    args = parser.parse_args()
    rows = asyncio.run(measure(args))
    title = f"{args.peers} peers, {args.experts} experts, {args.hosted} each; {args.nodes} nodes"
    table = Table(title=title)
    for column in ("layout", "announce ms/peer", "refresh ms", "look-ups", "MiB/refresh", "largest KiB", "peers found"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for row in rows:
        table.add_row(
            row.layout, f"{row.announce_ms:.1f}", f"{row.refresh_ms:.0f}", str(row.lookups), f"{row.mib:.2f}",
            f"{row.largest_kib:.1f}", str(row.found),
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
