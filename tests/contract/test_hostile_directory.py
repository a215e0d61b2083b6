"""Strangers in the DHT: what they store and answer neither ends a member nor blinds it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgpack
import pytest

# Before hivemind, whose import has warnings that are silenced there.
from moe_net.discovery.dht import DhtDiscovery
from moe_net.discovery.layout import shard_key

from hivemind.dht.routing import DHTID  # isort: skip
from hivemind.dht.storage import DHTLocalStorage  # isort: skip
from hivemind.p2p import P2PHandlerError  # isort: skip
from hivemind.proto import dht_pb2  # isort: skip

RUN = "contract"
# A member in a process of its own, which may crash. It reads the directory whenever it is told to.
VICTIM = f"""
import asyncio, sys
from moe_net.discovery.dht import DhtDiscovery

async def main():
    async with await DhtDiscovery.create(run={RUN!r}) as member:
        print(member.addresses[0], flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print("peers", len(await member.peers()), flush=True)

asyncio.run(main())
"""


class Victim:
    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 30)).decode().strip()

    async def read_directory(self) -> str:
        """What the member says after a look at the directory; "" when it is dead."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        return await self.line()


@asynccontextmanager
async def victim() -> AsyncIterator[Victim]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "ignore", "-c", VICTIM, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        one = Victim(process, "")
        one.address = await one.line()
        yield one
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


@asynccontextmanager
async def stranger(address: str) -> AsyncIterator[DhtDiscovery]:
    """A member that checks nothing: it keeps and sends whatever it likes."""
    async with await DhtDiscovery.create(run=RUN, join=[address]) as member:
        protocol = member._node.protocol
        protocol.record_validator, protocol.storage = None, DHTLocalStorage()
        yield member


def bomb(levels: int = 300) -> bytes:
    """Tuples in tuples: 4 bytes a level, and a C stack's frame."""
    data = msgpack.packb([1])
    for _ in range(levels):
        data = msgpack.packb([msgpack.ExtType(0x40, data)])
    return data


KEY = DHTID.generate(shard_key(RUN, 0))


@pytest.mark.parametrize("tag", [msgpack.packb("peer:x"), b""], ids=["an entry", "a dictionary"])
async def test_a_stored_value_of_tuples_in_tuples_does_not_end_a_member(tag: bytes) -> None:
    # With the empty tag it is a dictionary, which hivemind unpacks before any validator sees it.
    async with victim() as member, stranger(member.address) as rogue:
        protocol = rogue._node.protocol
        (peer,) = protocol.routing_table.uid_to_peer_id.values()
        request = dht_pb2.StoreRequest(
            keys=[KEY.to_bytes()], subkeys=[tag], values=[bomb()], expiration_time=[time.time() + 30],
            in_cache=[False], peer=protocol.node_info,
        )  # fmt: skip
        try:
            stored = list((await protocol.get_stub(peer).rpc_store(request, timeout=5)).store_ok)
        except P2PHandlerError:
            stored = [False]
        assert stored == [False]
        assert await member.read_directory() == "peers 0"


async def test_an_answer_of_tuples_in_tuples_does_not_end_who_asked() -> None:
    async with victim() as member, stranger(member.address) as rogue:
        protocol = rogue._node.protocol
        protocol.storage.store_subkey(KEY, "x", b"\x01", time.time() + 30)

        class Bombs(protocol.serializer):
            @classmethod
            def dumps(cls, obj: object) -> bytes:
                return bomb()

        protocol.serializer = Bombs
        assert await member.read_directory() == "peers 0"
