"""What every Discovery does, and what only the DHT can get wrong."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shutil
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgpack
import psutil
import pytest

from moe_net.discovery import dht as dht_module
from moe_net.discovery.announcer import Announcer
from moe_net.discovery.base import Discovery
from moe_net.discovery.crowd import RunExperts
from moe_net.discovery.dht import DhtDiscovery
from moe_net.discovery.directory import DirectoryWatcher
from moe_net.discovery.layout import RUNS_KEY, SHARDS, peer_subkey, shard_key, shard_of
from moe_net.discovery.memory import MemoryDiscovery, MemoryRegistry
from moe_net.discovery.record import Identity, sign
from moe_net.errors import DiscoveryError, JoinError, RecordError
from moe_net.types import ExpertId, PeerInfo

# After dht_module, which silences the warnings of hivemind's import.
from hivemind.dht.storage import DHTLocalStorage  # isort: skip

RUN = "contract"
EXPERTS = (ExpertId(0, 0), ExpertId(0, 1), ExpertId(3, 7))


class Swarm(ABC):
    """Members of one directory, and somebody who puts junk into it."""

    @abstractmethod
    async def join(self, run: str = RUN) -> Discovery: ...

    @abstractmethod
    async def plant(self, peer_id: str, data: bytes, expires_at_s: float) -> None: ...


class MemorySwarm(Swarm):
    def __init__(self) -> None:
        self.registry = MemoryRegistry()

    async def join(self, run: str = RUN) -> Discovery:
        return MemoryDiscovery(self.registry, run=run)

    async def plant(self, peer_id: str, data: bytes, expires_at_s: float) -> None:
        self.registry.put(RUN, peer_id, data, expires_at_s)


class DhtSwarm(Swarm):
    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self.stack = stack
        self.addresses: tuple[str, ...] = ()
        self.rogue: DhtDiscovery | None = None

    async def join(self, run: str | None = RUN, *, client_mode: bool = False) -> DhtDiscovery:
        member = await DhtDiscovery.create(run=run, join=self.addresses, client_mode=client_mode)
        await self.stack.enter_async_context(member)
        self.addresses = self.addresses or member.addresses
        return member

    async def plant(self, peer_id: str, data: object, expires_at_s: float, *, subkey: object = None) -> bool:
        """Store without any check of our own, as a stranger can; whether the last one asked accepted it."""
        key = shard_key(RUN, shard_of(peer_id, SHARDS))
        return await self.store(key, data, expires_at_s, subkey=peer_subkey(peer_id) if subkey is None else subkey)

    async def store(self, key: str, data: object, expires_at_s: float, *, subkey: object) -> bool:
        if self.rogue is None:
            self.rogue = await self.join()
            trust_everything(self.rogue)
        accepted = await self.rogue._node.store(key, data, expires_at_s, subkey=subkey, exclude_self=True)
        # Its own store has everything, and is a replica for the others.
        await self.rogue._node.store(key, data, expires_at_s, subkey=subkey)
        return accepted


def trust_everything(member: DhtDiscovery) -> None:
    protocol = member._node.protocol
    protocol.record_validator, protocol.storage = None, DHTLocalStorage()


@pytest.fixture
def sockets() -> Iterator[Path]:
    """Where the daemons' sockets are; nothing is left there at the end, and no daemon runs."""
    directory = Path(tempfile.mkdtemp(prefix="mnt-", dir="/tmp"))
    before, tempfile.tempdir = tempfile.tempdir, str(directory)
    yield directory
    tempfile.tempdir = before
    left = os.listdir(directory)
    shutil.rmtree(directory)
    assert left == []
    assert daemons() == []


def daemons() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.name() == "p2pd"]


@pytest.fixture
async def dht(sockets: Path) -> AsyncIterator[DhtSwarm]:
    async with contextlib.AsyncExitStack() as stack:
        yield DhtSwarm(stack)


@pytest.fixture(params=["memory", "dht"])
def swarm(request: pytest.FixtureRequest) -> Swarm:
    return MemorySwarm() if request.param == "memory" else request.getfixturevalue("dht")


def record(
    identity: Identity, *, ttl_s: float = 30.0, address: str = "127.0.0.1:4000", sequence: int = 1, run: str = RUN
) -> tuple[bytes, float]:
    expires_at_s = time.time() + ttl_s
    data = sign(identity, run=run, address=address, experts=EXPERTS, sequence=sequence, expires_at_s=expires_at_s)
    return data, expires_at_s


async def announce(member: Discovery, identity: Identity, **changes: object) -> bytes:
    data, expires_at_s = record(identity, **changes)  # type: ignore[arg-type]
    await member.announce(data, peer_id=identity.peer_id, expires_at_s=expires_at_s)
    return data


# Both ---------------------------------------------------------------------------------------------------------


async def test_an_announced_peer_is_seen_by_another_member(swarm: Swarm) -> None:
    one, other, identity = await swarm.join(), await swarm.join(), Identity.generate()
    await announce(one, identity, sequence=7)
    (peer,) = await other.peers()
    assert (peer.peer_id, peer.address, peer.experts) == (identity.peer_id, "127.0.0.1:4000", EXPERTS)
    assert peer.sequence == 7
    assert peer.expires_at_s > time.time()
    assert await one.peers() == (peer,)


async def test_a_refresh_replaces_what_everybody_has_read_before(swarm: Swarm) -> None:
    one, other, identity = await swarm.join(), await swarm.join(), Identity.generate()
    for sequence in (1, 2, 3):
        await announce(one, identity, sequence=sequence, address=f"127.0.0.1:400{sequence}")
        for member in (one, other):
            assert [(p.sequence, p.address) for p in await member.peers()] == [(sequence, f"127.0.0.1:400{sequence}")]


async def test_a_record_that_expires_is_gone(swarm: Swarm) -> None:
    one, other, identity = await swarm.join(), await swarm.join(), Identity.generate()
    await announce(one, identity, ttl_s=0.6)
    async with DirectoryWatcher(other, interval_s=0.05) as watcher:
        await watcher.wait_for(lambda view: identity.peer_id in view.peers, 5)
        await watcher.wait_for(lambda view: not view.peers, 5)


async def test_an_announcer_keeps_its_record_alive_and_withdraws_it(swarm: Swarm) -> None:
    one, other, identity = await swarm.join(), await swarm.join(), Identity.generate()
    async with DirectoryWatcher(other, interval_s=0.02) as watcher:
        announcer = Announcer(one, identity, run=RUN, address="127.0.0.1:1", experts=EXPERTS, ttl_s=0.6)
        async with announcer:
            first = (await watcher.wait_for(lambda view: bool(view.peers), 5)).peers[identity.peer_id]
            later = await watcher.wait_for(
                lambda view: (
                    identity.peer_id in view.peers
                    and view.peers[identity.peer_id].sequence > first.sequence
                    and view.peers[identity.peer_id].expires_at_s > first.expires_at_s
                ),
                5,
            )
            await announcer.announce([ExpertId(9, 9)])
            await watcher.wait_for(lambda view: view.replicas(ExpertId(9, 9)) == (identity.peer_id,), 5)
        assert later.replicas(ExpertId(3, 7)) == (identity.peer_id,)
        await announcer.close()
    # No time to expire: it is the withdrawal that hides the record, at the next read.
    assert await other.peers() == ()


async def test_a_restarted_peer_is_seen_at_once_after_its_withdrawal(swarm: Swarm) -> None:
    one, other, identity = await swarm.join(), await swarm.join(), Identity.generate()
    for port in (1, 2):
        async with Announcer(one, identity, run=RUN, address=f"127.0.0.1:{port}", experts=EXPERTS, ttl_s=30):
            assert [p.address for p in await other.peers()] == [f"127.0.0.1:{port}"]
        assert await other.peers() == ()


async def test_a_forged_record_is_refused_and_one_that_got_in_is_ignored(swarm: Swarm) -> None:
    one, other = await swarm.join(), await swarm.join()
    honest, victim, thief = Identity.generate(), Identity.generate(), Identity.generate()
    data, expires_at_s = record(thief)
    forged = bytes([*data[:-1], data[-1] ^ 1])
    with pytest.raises(RecordError, match="forged"):
        await one.announce(forged, peer_id=thief.peer_id, expires_at_s=expires_at_s)
    with pytest.raises(RecordError, match="forged"):
        await one.announce(data, peer_id=victim.peer_id, expires_at_s=expires_at_s)
    await announce(one, honest)
    await swarm.plant(thief.peer_id, forged, expires_at_s)
    await swarm.plant(victim.peer_id, data, expires_at_s)
    assert [p.peer_id for p in await other.peers()] == [honest.peer_id]


async def test_junk_is_ignored(swarm: Swarm) -> None:
    one, other, honest = await swarm.join(), await swarm.join(), Identity.generate()
    await announce(one, honest)
    await swarm.plant("ab" * 20, b"junk", time.time() + 30)
    await swarm.plant("cd" * 20, b"", time.time() + 30)
    assert [p.peer_id for p in await other.peers()] == [honest.peer_id]


async def test_a_record_of_another_run_is_refused(swarm: Swarm) -> None:
    member, identity = await swarm.join(), Identity.generate()
    data, expires_at_s = record(identity, run="other")
    with pytest.raises(RecordError, match="another run"):
        await member.announce(data, peer_id=identity.peer_id, expires_at_s=expires_at_s)


async def test_a_manifest_makes_the_round_trip_and_a_later_one_replaces_it(swarm: Swarm) -> None:
    one, other, stranger = await swarm.join(), await swarm.join(), await swarm.join("another")
    assert await other.get_manifest() is None
    await one.put_manifest('{"name": "π"}', expires_at_s=time.time() + 30)
    assert await other.get_manifest() == '{"name": "π"}'
    await one.put_manifest('{"name": "2"}', expires_at_s=time.time() + 40)
    await one.put_manifest('{"name": "late"}', expires_at_s=time.time() + 20)
    assert await other.get_manifest() == '{"name": "2"}'
    assert await stranger.get_manifest() is None


async def test_several_peers_come_sorted_by_peer_id(swarm: Swarm) -> None:
    members = [await swarm.join(), await swarm.join()]
    identities = [Identity.generate() for _ in range(12)]
    await asyncio.gather(*(announce(members[i % 2], identity) for i, identity in enumerate(identities)))
    expected = sorted(identity.peer_id for identity in identities)
    for member in members:
        assert [p.peer_id for p in await member.peers()] == expected


async def test_who_names_the_runs_experts_reads_no_others(swarm: Swarm) -> None:
    one, other, claims = await swarm.join(), await swarm.join(), {}
    for experts in ([ExpertId(60000, i) for i in range(8192)], [ExpertId(0, i) for i in range(100)], list(EXPERTS)):
        identity, expires_at_s = Identity.generate(), time.time() + 30
        claims[identity.peer_id] = experts
        data = sign(identity, run=RUN, address="10.0.0.1:5", experts=experts, sequence=1, expires_at_s=expires_at_s)
        await one.announce(data, peer_id=identity.peer_id, expires_at_s=expires_at_s)
    assert {p.peer_id: list(p.experts) for p in await other.peers()} == claims
    _, some, all_three = claims
    there = await other.peers(RunExperts(EXPERTS))
    assert {p.peer_id: p.experts for p in there} == {some: EXPERTS[:2], all_three: EXPERTS}
    async with DirectoryWatcher(other, experts=EXPERTS, interval_s=30) as watcher:
        view = await watcher.wait_for(lambda view: bool(view.peers), 5)
    assert view.experts == set(EXPERTS)
    assert list(view.peers) == sorted([some, all_three])


async def test_close_may_be_called_again(swarm: Swarm) -> None:
    one, other, identity = await swarm.join(), await swarm.join(), Identity.generate()
    await announce(one, identity)
    await asyncio.gather(one.close(), one.close())
    await one.close()
    assert [p.peer_id for p in await other.peers()] == [identity.peer_id]


# The DHT ------------------------------------------------------------------------------------------------------


async def test_a_member_joins_when_some_of_its_addresses_are_dead(dht: DhtSwarm) -> None:
    alive = await dht.join()
    gone = await DhtDiscovery.create(run=RUN)
    dead = gone.addresses
    await gone.close()
    identity = Identity.generate()
    await announce(alive, identity)
    async with await DhtDiscovery.create(run=RUN, join=[*dead, *alive.addresses]) as member:
        assert [p.peer_id for p in await member.peers()] == [identity.peer_id]
    with pytest.raises(JoinError, match="could not join by any of 1 addresses"):
        await DhtDiscovery.create(run=RUN, join=dead)


async def test_a_wrong_address_is_the_users_mistake(sockets: Path) -> None:
    for address in ("", "127.0.0.1:4000", "/ip4/127.0.0.1/tcp/1", "/ip4/1.2.3.4/tcp/1/p2p/xyz", "/nonsense/1"):
        with pytest.raises(ValueError, match="not the libp2p address"):
            await DhtDiscovery.create(run=RUN, join=[address])
    with pytest.raises(ValueError, match="client"):
        await DhtDiscovery.create(run=RUN, client_mode=True)


async def test_an_address_that_it_cannot_listen_on_is_named_and_not_taken_for_a_failed_join(dht: DhtSwarm) -> None:
    join = (await dht.join()).addresses
    # Two daemons may share a port (SO_REUSEPORT), but not with us.
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match=r"cannot listen on .*in use"):
        await DhtDiscovery.create(run=RUN, join=join, listen=f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}")
    # TEST-NET-3 (RFC 5737): no machine has it.
    with pytest.raises(OSError, match=r"cannot listen on /ip4/203\.0\.113\.7/tcp/0"):
        await DhtDiscovery.create(run=RUN, join=join, listen="/ip4/203.0.113.7/tcp/0")


async def test_a_client_announces_and_reads_but_keeps_nothing(dht: DhtSwarm) -> None:
    one, client, identity = await dht.join(), await dht.join(client_mode=True), Identity.generate()
    assert client.addresses == ()
    await announce(client, identity)
    assert len(client._node.protocol.storage) == 0
    assert [p.peer_id for p in await one.peers()] == [identity.peer_id]
    assert [p.peer_id for p in await client.peers()] == [identity.peer_id]


@pytest.mark.parametrize("ticks", [0, 1, 3, 30, 300])
async def test_cancelling_the_start_leaves_no_daemon(sockets: Path, ticks: int) -> None:
    starting = asyncio.create_task(DhtDiscovery.create(run=RUN))
    for _ in range(ticks):
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert daemons() == []


async def test_close_ends_operations_that_wait_and_leaves_no_daemon(dht: DhtSwarm) -> None:
    one, other = await dht.join(), await dht.join()
    (daemon,) = [d for d in daemons() if d.pid == one._daemon._child.pid]
    daemon.suspend()
    # `other` waits for an answer that does not come.
    reading = asyncio.create_task(other.peers())
    await asyncio.sleep(0)
    closing = asyncio.create_task(other.close())
    with pytest.raises(DiscoveryError, match="closed"):
        await reading
    await closing
    daemon.resume()
    with pytest.raises(DiscoveryError, match="closed"):
        await other.peers()


async def test_close_goes_on_when_its_caller_is_cancelled(dht: DhtSwarm) -> None:
    member = await dht.join()
    closing = asyncio.create_task(member.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await member.close()
    assert daemons() == []


class EventLog:
    """Stands for a logger; sets the event when something is logged."""

    def __init__(self, event: asyncio.Event) -> None:
        self.event = event

    def log(self, *_: object) -> None:
        self.event.set()


async def test_a_dead_daemon_is_an_error_and_the_watcher_keeps_its_view(
    dht: DhtSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, identity = await dht.join(), await dht.join(), Identity.generate()
    await announce(one, identity)
    async with DirectoryWatcher(other, interval_s=30) as watcher:
        view = await watcher.wait_for(lambda view: bool(view.peers), 5)
        (daemon,) = [d for d in daemons() if d.pid == other._daemon._child.pid]
        daemon.kill()
        await other._daemon._child.wait()
        failed = asyncio.Event()
        monkeypatch.setattr("moe_net.discovery.directory.log", EventLog(failed))
        watcher.refresh_soon()
        await asyncio.wait_for(failed.wait(), 5)
        assert watcher.view is view
        assert watcher.failures == 1
    with pytest.raises(DiscoveryError, match="died"):
        await other.peers()


async def test_who_lost_everybody_does_not_take_its_own_store_for_the_directory(dht: DhtSwarm) -> None:
    one = await dht.join()
    async with await DhtDiscovery.create(run=RUN, join=one.addresses) as other:
        await announce(one, Identity.generate())
        await one.close()
        # The first read may still find a routing table that knows the dead.
        with contextlib.suppress(DiscoveryError):
            await other.peers()
        with pytest.raises(DiscoveryError, match="no other member"):
            await other.peers()


async def test_junk_in_a_shard_is_skipped_and_named_once(dht: DhtSwarm, caplog: pytest.LogCaptureFixture) -> None:
    one, identity = await dht.join(), Identity.generate()
    await announce(one, identity)
    # The honest member does not keep it, the other one answers with it.
    assert not await dht.plant(identity.peer_id, {"a": [1, None]}, time.time() + 30, subkey="not a peer")
    with caplog.at_level(logging.WARNING, dht_module.__name__):
        for _ in range(2):
            assert [p.peer_id for p in await one.peers()] == [identity.peer_id]
    assert [r.getMessage() for r in caplog.records if "not a peer" in r.getMessage()] == [
        "skipped 1 entries of the DHT, among them: 'not a peer' is no peer's record"
    ]


async def test_nobody_can_replace_or_prolong_anothers_record(dht: DhtSwarm) -> None:
    one, identity, thief = await dht.join(), Identity.generate(), Identity.generate()
    old = await announce(one, identity, sequence=1)
    await announce(one, identity, sequence=2)
    late_s = time.time() + 300
    assert not await dht.plant(identity.peer_id, old, late_s)
    assert not await dht.plant(identity.peer_id, record(thief, ttl_s=60)[0], late_s)
    assert not await dht.plant(identity.peer_id, b"junk", late_s)
    # A plain value instead of the dictionary, and one that hivemind's reader would stumble over.
    assert not await dht.store(shard_key(RUN, shard_of(identity.peer_id, SHARDS)), 1, late_s, subkey=None)
    assert [p.sequence for p in await one.peers()] == [2]


async def test_a_value_that_does_not_unpack_does_not_hang_a_reader(dht: DhtSwarm) -> None:
    one, identity = await dht.join(), Identity.generate()
    await announce(one, identity)
    rogue = await dht.join()
    trust_everything(rogue)
    key = dht_module.DHTID.generate(shard_key(RUN, shard_of(identity.peer_id, SHARDS)))
    for value in (b"\xc1", msgpack.packb(msgpack.ExtType(0x50, b"junk")), b""):
        rogue._node.protocol.storage.store_subkey(key, f"x{value!r}", value, time.time() + 30)
    async with asyncio.timeout(5):
        assert [p.peer_id for p in await one.peers()] == [identity.peer_id]


async def test_the_only_run_of_a_dht_is_found_and_several_have_to_be_named(dht: DhtSwarm) -> None:
    one, newcomer = await dht.join(), await dht.join(None)
    assert await newcomer.get_manifest() is None
    with pytest.raises(DiscoveryError, match="no run"):
        await newcomer.peers()
    await one.put_manifest("{}", expires_at_s=time.time() + 30)
    assert await newcomer.find_run() == RUN
    assert await newcomer.get_manifest() == "{}"
    assert newcomer.run == RUN
    assert await newcomer.peers() == ()
    second = await dht.join("second")
    await second.put_manifest("{}", expires_at_s=time.time() + 30)
    assert await newcomer.runs() == (RUN, "second")
    undecided = await dht.join(None)
    with pytest.raises(JoinError, match="contract, second"):
        await undecided.get_manifest()


async def test_a_late_node_does_not_hide_what_was_stored_before_it_came(dht: DhtSwarm) -> None:
    one, identities = await dht.join(), [Identity.generate() for _ in range(8)]
    for identity in identities:
        await announce(one, identity)
    for _ in range(5):
        late = await dht.join()
    assert len(await late.peers()) == len(identities)
    assert math.isfinite((await late.peers())[0].expires_at_s)


def test_hivemind_logs_the_way_we_do() -> None:
    assert logging.getLevelName(logging.WARNING) == "WARNING"
    logger = logging.getLogger("hivemind")
    assert logger.handlers == []
    assert logger.propagate
    assert logger.level == logging.WARNING


def test_the_key_of_the_list_of_runs_is_no_runs_key() -> None:
    assert RUNS_KEY not in {shard_key(run, 0) for run in ("", "runs", RUN)}


async def test_a_view_is_published_whole_and_a_failing_callback_free_watcher_can_be_closed_twice() -> None:
    registry = MemoryRegistry()
    member, identity, seen = MemoryDiscovery(registry, run=RUN), Identity.generate(), list[int]()
    watcher = DirectoryWatcher(member, interval_s=0.01, on_view=lambda view: seen.append(len(view.peers)))
    await watcher.close()
    async with watcher:
        await watcher.wait_for(lambda view: bool(seen), 5)
        await announce(member, identity)
        view = await watcher.wait_for(lambda view: bool(view.peers), 5)
        with pytest.raises(TimeoutError):
            await watcher.wait_for(lambda view: len(view.peers) > 1, 0.05)
    await watcher.close()
    assert watcher.view == view
    assert (seen[0], seen[-1]) == (0, 1)
    assert isinstance(view.peers[identity.peer_id], PeerInfo)
