"""Strangers in the DHT: what they store and answer neither ends a member nor blinds it."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

import msgpack
import pytest

from moe_net.discovery.dht import DhtDiscovery
from moe_net.discovery.guard import Store, Validator
from moe_net.discovery.layout import RUNS_KEY, SHARDS, manifest_key, peer_subkey, shard_key, shard_of
from moe_net.discovery.record import Identity, sign
from moe_net.errors import DiscoveryError
from moe_net.types import ExpertId

# After moe_net.discovery.dht, which silences the warnings of hivemind's import.
from hivemind.dht.node import DHTNode  # isort: skip
from hivemind.dht.routing import DHTID  # isort: skip
from hivemind.dht.storage import DHTLocalStorage  # isort: skip
from hivemind.p2p import P2PHandlerError, PeerID  # isort: skip
from hivemind.proto import dht_pb2  # isort: skip
from hivemind.utils import MSGPackSerializer  # isort: skip

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


def test_a_dictionarys_own_limit_is_not_believed() -> None:
    # hivemind compares it with a number when the answers are merged, and drops by it what others have.
    for limit in ("many", 1, None):
        data = msgpack.packb(msgpack.ExtType(0x50, msgpack.packb([limit, 1.0, [["a", b"", 1.0], ["b", b"", 1.0]]])))
        assert MSGPackSerializer.loads(data).maxsize == math.inf


# What is kept ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def members() -> AsyncIterator[tuple[DhtDiscovery, DhtDiscovery, DhtDiscovery]]:
    """An honest member, an honest client (which keeps nothing) and a stranger."""
    async with (
        await DhtDiscovery.create(run=RUN) as honest,
        await DhtDiscovery.create(run=RUN, join=honest.addresses, client_mode=True) as client,
        stranger(honest.addresses[0]) as rogue,
    ):
        yield honest, client, rogue


async def store(
    rogue: DhtDiscovery, key: str, value: bytes, expires_at_s: float, *, subkey: object = None, in_cache: bool = False
) -> bool:
    """Whether the honest member takes what the stranger sends it; `value` is packed."""
    protocol = rogue._node.protocol
    (peer,) = protocol.routing_table.uid_to_peer_id.values()
    stored = await protocol.call_store(
        peer, [DHTID.generate(key)], [value], [expires_at_s], subkeys=[subkey], in_cache=in_cache
    )
    return bool(stored and stored[0])


async def announce(member: DhtDiscovery, identity: Identity, *, ttl_s: float = 30.0) -> bytes:
    expires_at_s = time.time() + ttl_s
    data = sign(
        identity, run=RUN, address="10.0.0.1:5", experts=[ExpertId(0, 0)], sequence=1, expires_at_s=expires_at_s
    )
    await member.announce(data, peer_id=identity.peer_id, expires_at_s=expires_at_s)
    return data


Members = tuple[DhtDiscovery, DhtDiscovery, DhtDiscovery]


async def test_a_shard_takes_no_junk_and_stays_readable(members: Members) -> None:
    honest, client, rogue = members
    me = Identity.generate()
    await announce(honest, me)
    key = shard_key(RUN, shard_of(me.peer_id, SHARDS))
    big = msgpack.packb(b"j" * 500_000)
    # Twelve of them would not fit into one message of the daemon, and the shard with them.
    for i in range(12):
        assert not await store(rogue, key, big, time.time() + 60, subkey=f"junk{i}")
    assert not await store(rogue, key, msgpack.packb(1), time.time() + 60, subkey="small junk")
    assert not await store(rogue, key, msgpack.packb(1), time.time() + 60, subkey=5)
    assert [p.peer_id for p in await client.peers()] == [me.peer_id]


async def test_junk_in_an_answer_does_not_get_into_the_readers_own_store(members: Members) -> None:
    honest, _, rogue = members
    me = Identity.generate()
    await announce(honest, me)
    key = DHTID.generate(shard_key(RUN, shard_of(me.peer_id, SHARDS)))
    assert rogue._node.protocol.storage.store_subkey(key, "junk", msgpack.packb(1), time.time() + 60)
    assert [p.peer_id for p in await honest.peers()] == [me.peer_id]
    assert list(honest._node.protocol.storage.get(key).value.data) == [peer_subkey(me.peer_id)]


async def test_names_that_cannot_be_compared_do_not_hang_a_reader(members: Members) -> None:
    honest, client, rogue = members
    me = Identity.generate()
    await announce(honest, me)
    key = DHTID.generate(shard_key(RUN, shard_of(me.peer_id, SHARDS)))
    (expires_at_s,) = (p.expires_at_s for p in await client.peers())
    # hivemind orders entries of one expiry by name.
    rogue._node.protocol.storage.clear()
    rogue._node.protocol.storage.store_subkey(key, 5, msgpack.packb(1), expires_at_s)
    assert [p.peer_id for p in await client.peers()] == [me.peer_id]


async def test_nobody_fills_the_memory_for_years(members: Members) -> None:
    honest, _, rogue = members
    kept = honest._node.protocol.storage
    years_s, hour_s = time.time() + 10 * 365 * 86400, time.time() + 3600
    text = msgpack.packb("t" * 1000)
    for expires_at_s in (years_s, math.inf, math.nan, hour_s + 600):
        assert not await store(rogue, "any", text, expires_at_s)
    for value in (b"j" * 1_000_000, "j" * 1_000_000, 5, None, ["text"]):
        assert not await store(rogue, "any", msgpack.packb(value), hour_s)
    assert not await store(rogue, "any", text, hour_s, in_cache=True)
    assert len(kept) == 0
    # It could be the manifest of another run.
    assert await store(rogue, "any", text, hour_s)
    kept.OTHERS_BYTES = 100_000
    taken = [await store(rogue, f"any {i}", text, hour_s) for i in range(20)]
    assert 0 < sum(taken) < 10
    # Nor is there any room taken from the own run.
    await announce(honest, me := Identity.generate())
    await honest.put_manifest("{}", expires_at_s=time.time() + 30)
    assert [p.peer_id for p in await honest.peers()] == [me.peer_id]


async def test_the_manifests_place_takes_nothing_but_a_manifest(members: Members) -> None:
    honest, client, rogue = members
    key, late_s = manifest_key(RUN), time.time() + 1800
    for value in (5, b"bytes", None, "t" * 300_000):
        assert not await store(rogue, key, msgpack.packb(value), late_s)
    assert not await store(rogue, key, msgpack.packb(1), late_s, subkey="a dictionary")
    # In its own store it has it, and answers with it.
    rogue._node.protocol.storage.store(DHTID.generate(key), msgpack.packb(5), late_s)
    await honest.put_manifest("{}", expires_at_s=time.time() + 300)
    assert await client.get_manifest() == "{}"
    with pytest.raises(ValueError, match="live longer"):
        await honest.put_manifest("{}", expires_at_s=time.time() + 2 * 86400)


async def test_the_list_of_runs_takes_only_names(members: Members) -> None:
    honest, client, rogue = members
    await honest.put_manifest("{}", expires_at_s=time.time() + 300)
    late_s = time.time() + 1800
    for subkey, value in (("x", 5), ("x" * 200, True), (7, True), (None, "t")):
        assert not await store(rogue, RUNS_KEY, msgpack.packb(value), late_s, subkey=subkey)
    assert await store(rogue, RUNS_KEY, msgpack.packb(True), late_s, subkey="another")
    assert await client.runs() == ("another", RUN)


async def test_the_cache_of_a_member_hides_nothing(members: Members) -> None:
    honest, client, rogue = members
    await announce(honest, me := Identity.generate())
    shard = shard_of(me.peer_id, SHARDS)
    thief = next(i for i in iter(Identity.generate, None) if shard_of(i.peer_id, SHARDS) == shard)
    expires_at_s = time.time() + 1800
    data = sign(thief, run=RUN, address="10.0.0.2:5", experts=[], sequence=1, expires_at_s=expires_at_s)
    # hivemind answers from its cache when what is there expires later.
    arguments = {"subkey": peer_subkey(thief.peer_id), "in_cache": True}
    assert not await store(rogue, shard_key(RUN, shard), msgpack.packb(data), expires_at_s, **arguments)
    assert [p.peer_id for p in await client.peers()] == [me.peer_id]


async def test_an_old_record_that_is_sent_again_does_not_shorten_the_new_ones_life(members: Members) -> None:
    honest, _, rogue = members
    me = Identity.generate()
    old, old_until_s = await announce(honest, me, ttl_s=20), 0.0
    old_until_s = (await honest.peers())[0].expires_at_s
    await announce(honest, me, ttl_s=30)
    key = shard_key(RUN, shard_of(me.peer_id, SHARDS))
    assert not await store(rogue, key, msgpack.packb(old), old_until_s, subkey=peer_subkey(me.peer_id))
    shelf = honest._node.protocol.storage.get(DHTID.generate(key)).value
    assert shelf.key_to_heap[peer_subkey(me.peer_id)].expiration_time > old_until_s


def test_a_full_dictionary_takes_refreshes_only_and_fits_into_an_answer() -> None:
    validator = Validator(SHARDS)
    validator.guard(RUN)
    kept, key, now_s = Store(validator), DHTID.generate(shard_key(RUN, 0)), time.time()
    value, names = b"r" * 16_000, [f"peer:{i:040}" for i in range(100)]
    taken = [name for name in names if kept.store_subkey(key, name, value, now_s + 30)]
    assert taken == names[: len(taken)]
    assert 40 < len(taken) < 100
    assert 4 * len(MSGPackSerializer.dumps(kept.get(key).value)) < 4 * 2**20 - 64 * 1024
    assert kept.store_subkey(key, names[0], value, now_s + 31)
    assert not kept.store_subkey(key, names[-1], value, now_s + 31)


async def test_a_directory_that_cannot_be_read_is_an_error_and_no_empty_one(members: Members) -> None:
    honest, client, rogue = members
    await announce(honest, Identity.generate())
    # Too large for a message, as they would be at members that keep everything.
    overfull = DHTLocalStorage()
    for shard in range(SHARDS):
        for i in range(10):
            key = DHTID.generate(shard_key(RUN, shard))
            overfull.store_subkey(key, f"junk{i}", msgpack.packb(b"j" * 500_000), time.time() + 60)
    for member in (honest, rogue):
        member._node.protocol.storage.data.update(overfull.data)
    with pytest.raises(DiscoveryError, match="nobody could tell what is in 16 of the directory's 16 shards"):
        await client.peers()


async def test_a_shard_that_cannot_be_read_is_told_once(
    members: Members, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest, client, _ = members
    await announce(honest, me := Identity.generate())
    unread = DHTID.generate(shard_key(RUN, (shard_of(me.peer_id, SHARDS) + 1) % SHARDS))
    ask = DHTNode._call_find_with_blacklist

    async def ask_in_vain(node: DHTNode, peer: PeerID, keys: Collection[DHTID]) -> dict[DHTID, object]:
        return {key: answer for key, answer in (await ask(node, peer, keys)).items() if key != unread}

    monkeypatch.setattr(DHTNode, "_call_find_with_blacklist", ask_in_vain)
    for _ in range(2):
        assert [p.peer_id for p in await client.peers()] == [me.peer_id]
    assert [r.getMessage() for r in caplog.records if "nobody could tell" in r.getMessage()] == [
        "nobody could tell what is in 1 of the directory's 16 shards: their peers are missing"
    ]
