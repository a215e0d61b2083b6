"""Discovery in hivemind's DHT, on the caller's loop; with `daemon` and `guard` all that imports hivemind.

Freshness. All of hivemind's caches are off and a read merges what every replica has, by the latest expiry of each
entry: a refresh replaces and a withdrawal hides a record as soon as one replica of the shard has it.

Trust. Members keep an entry filed under a peer id only if it is that peer's own signed record, filed where it
belongs, with the expiry that was signed: nobody can replace, replay or outlive somebody else's record. The manifest
and the list of runs are not signed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import warnings
from collections.abc import Collection, Coroutine, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

from moe_net.discovery import layout
from moe_net.discovery.book import AddressBook, split, tcp_of
from moe_net.discovery.crowd import Crowd, RunExperts
from moe_net.discovery.daemon import SHUTDOWN_TIMEOUT_S, Daemon, dismantle, socket_directory, start_daemon
from moe_net.discovery.guard import NoCache, Store, Validator, limit_nesting
from moe_net.discovery.layout import (
    MAX_MANIFEST_BYTES,
    RUNS_KEY,
    SHARDS,
    manifest_key,
    peer_subkey,
    shard_key,
    shard_of,
)
from moe_net.discovery.listen import dht_announcement, free_multiaddr
from moe_net.discovery.record import MAX_LIFETIME_S, Record, check, open_record, run_fault
from moe_net.errors import DiscoveryError, JoinError, RecordError
from moe_net.types import PeerInfo

with warnings.catch_warnings():
    # hivemind compiles two functions with torch.jit.script, which torch has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from hivemind.dht.node import DHTNode
    from hivemind.dht.protocol import ValidationError
    from hivemind.dht.routing import DHTID
    from hivemind.p2p import P2PDaemonError, PeerID
    from hivemind.utils.multiaddr import Multiaddr

log = logging.getLogger(__name__)

limit_nesting()

T = TypeVar("T")

REPLICAS = 5
"""Nodes that keep each dictionary."""
BEAM = 10
"""Nodes a read asks per dictionary: twice the replicas, so that new nodes nearer to the key do not hide old ones."""
GREET_EVERY_S = 5.0
"""Between two looks for members that were met and are not known any more."""
PROBE_TIMEOUT_S = 2.0
# A connection of libp2p, encryption included.
_CONNECT_TIMEOUT_S = 5.0

# The keys of one read of which another node has said what it has, or that it has nothing.
_answered: ContextVar[set[DHTID] | None] = ContextVar("answered", default=None)


class _Node(DHTNode):
    """hivemind's node, which tells what nobody has from what nobody could tell: to hivemind it is the same."""

    async def _call_find_with_blacklist(self, peer_id: PeerID, keys: Collection[DHTID]) -> Any:
        answers = await super()._call_find_with_blacklist(peer_id, keys)
        answered = _answered.get()
        if answers and answered is not None:
            answered.update(answers)
        return answers


def _peer_in(address: str) -> PeerID:
    split(address)
    try:
        return PeerID.from_base58(Multiaddr(address)["p2p"])
    except (ValueError, LookupError) as error:
        raise ValueError(f"{address!r} is not the libp2p address of a member: {error}") from error


class DhtDiscovery:
    """A member of a run's DHT. Make it with `create`; `close` it, or use it as an async context manager."""

    def __init__(
        self, daemon: Daemon, node: DHTNode, validator: Validator, directory: str, book: AddressBook,
        *, run: str | None, shards: int, addresses: tuple[str, ...], client_mode: bool, timeout_s: float,
        has_joined: bool, greet_every_s: float,
    ) -> None:  # fmt: skip
        """Use `create`."""
        self.run = run
        """The run; without one at first, the only one of the DHT once `get_manifest` has found it."""
        self.addresses = addresses
        """Multiaddrs by which others can join; none for a client."""
        self._daemon, self._node, self._validator = daemon, node, validator
        self._directory = directory
        self._book = book
        self._has_joined = has_joined
        self._greet_every_s = greet_every_s
        self._shards = shards
        self._client_mode = client_mode
        self._timeout_s = timeout_s
        self._running: set[asyncio.Task[Any]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._junk: frozenset[str] = frozenset()
        self._was_mute = self._was_crowded = False
        self._crowd = Crowd()
        self._keeping = asyncio.create_task(self._keep_in_touch(), name="greetings in the DHT")

    @classmethod
    async def create(
        cls,
        *,
        run: str | None,
        join: Sequence[str] = (),
        listen: str = "/ip4/127.0.0.1/tcp/0",
        advertise: str | None = None,
        announce: str | None = None,
        identity: Path | None = None,
        known: Sequence[str] = (),
        client_mode: bool = False,
        shards: int = SHARDS,
        replicas: int = REPLICAS,
        join_timeout_s: float = 10.0,
        timeout_s: float = 10.0,
        greet_every_s: float = GREET_EVERY_S,
    ) -> DhtDiscovery:
        """Join the DHT that any of the addresses `join` belongs to, or start a new one when there are none.

        `listen` is the multiaddr to listen on. Others are told the multiaddr `announce`, else the host `advertise` (or
        that of `host:port`) with the port of `listen`, else where it listens. `identity` is the file of the libp2p key,
        made when there is none; without it, a key for this process. `known` are members of an earlier life, which are
        greeted as well and need not be there. A member in `client_mode` does not listen and keeps nothing for others.

        `run` None: `get_manifest` finds out, when the DHT carries one run only. `timeout_s` bounds every later
        operation. JoinError when no address answers within about `join_timeout_s`; ValueError for an address that
        cannot be one; OSError when it cannot listen.
        """
        fault = None if run is None else run_fault(run)
        if fault:
            raise ValueError(f"run {run!r}: {fault}")
        if client_mode and not join:
            raise ValueError("a client keeps nothing and needs a member to join: give the address of one")
        members = [_peer_in(address) for address in join]
        book = AddressBook(join)
        for address in known:
            try:
                book.note(str(_peer_in(address)), [split(address)[0]])
            except ValueError as error:
                log.warning("left out of the members known before: %s", error)
        if not client_mode:
            listen = await free_multiaddr(listen)
            if announce is None and advertise is not None:
                announce = dht_announcement(advertise, listen)
        directory = socket_directory()
        validator = Validator(shards)
        if run is not None:
            validator.guard(run)
        daemon: Daemon | None = None
        try:
            async with asyncio.timeout(join_timeout_s):
                daemon = await start_daemon(
                    directory, join=join, listen=listen, announce=announce, identity=identity, client_mode=client_mode,
                    timeout_s=join_timeout_s,
                )  # fmt: skip
                node = await _Node.create(
                    p2p=daemon,
                    # One place in the DHT for one key: a restarted member takes its own again.
                    node_id=DHTID.generate(source=cast(PeerID, daemon.peer_id).to_bytes()),
                    num_replicas=replicas,
                    client_mode=client_mode,
                    record_validator=validator,
                    cache_locally=False,
                    cache_nearest=0,
                    cache_on_store=False,
                    cache_refresh_before_expiry=0,
                    reuse_get_requests=False,
                )
                # Nobody knows us yet.
                node.protocol.storage, node.protocol.cache = Store(validator), NoCache()
                if members and not await _greet(node, members):
                    raise JoinError("they did not answer in the DHT's protocol")
                addresses = () if client_mode else tuple(str(a) for a in await daemon.get_visible_maddrs())
        except (P2PDaemonError, ValidationError, JoinError, OSError, TimeoutError) as error:
            await dismantle(daemon, directory)
            reason = str(error) or f"not within {join_timeout_s:.0f} s"
            if not join:
                raise DiscoveryError(f"the libp2p daemon could not listen on {listen}: {reason}") from error
            raise JoinError(
                f"could not join by any of {len(join)} addresses ({', '.join(join)}): {reason}. "
                "Is a member running there, and does no firewall keep it from us?"
            ) from error
        except BaseException:
            await dismantle(daemon, directory)
            raise
        discovery = cls(
            daemon, node, validator, directory, book,
            run=run, shards=shards, addresses=addresses, client_mode=client_mode, timeout_s=timeout_s,
            has_joined=bool(join), greet_every_s=greet_every_s,
        )  # fmt: skip
        if known and not join:
            await discovery.greet_lost()
        return discovery

    async def __aenter__(self) -> DhtDiscovery:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def announce(self, record: bytes, *, peer_id: str, expires_at_s: float) -> None:
        """Publish a record. RecordError when nobody would accept it; DiscoveryError when it could not be stored."""
        opened = open_record(record)
        check(opened, run=self._require_run(), now_s=time.time(), peer_id=peer_id)
        if opened.expires_at_s != expires_at_s:
            raise RecordError(f"record of peer {peer_id} expires at {opened.expires_at_s}, not at {expires_at_s}")
        key = shard_key(opened.run, shard_of(peer_id, self._shards))
        await self._store([(key, peer_subkey(peer_id), record, expires_at_s)])

    async def peers(self, experts: RunExperts | None = None) -> tuple[PeerInfo, ...]:
        """Every live peer of the run whose record verifies and names any of `experts`, sorted by peer id.

        DiscoveryError when nobody answers, or when nobody is found and not every shard could be read.
        """
        run = self._require_run()
        await self._ensure_connected()
        found: list[Record] = []
        junk: set[str] = set()
        keys = [shard_key(run, shard) for shard in range(self._shards)]
        _answered.set(answered := set())
        shelves = await self._get(keys)
        # Whoever began a DHT may be alone in it, and its own store is all there is.
        mute = [k for k in keys if shelves[k] is None and DHTID.generate(k) not in answered] if self._has_joined else []
        now_s = time.time()
        for key, shelf in shelves.items():
            entries = layout.live_entries(shelf, now_s)
            if entries is None:
                junk |= set() if shelf is None else {f"a plain value at {key}"}
                continue
            records, wrong = layout.read_entries(entries.items(), run=run, now_s=now_s)
            found += records
            junk |= set(wrong)
        if junk - self._junk:
            log.warning("skipped %d entries of the DHT, among them: %s", len(junk), "; ".join(sorted(junk)[:3]))
        self._junk = frozenset(junk)
        if mute:
            unread = f"nobody could tell what is in {len(mute)} of the directory's {len(keys)} shards"
            if not found:
                raise DiscoveryError(unread)
            log.log(logging.DEBUG if self._was_mute else logging.WARNING, "%s: their peers are missing", unread)
        self._was_mute = bool(mute)
        peers, left_out = self._crowd.peers(found, experts)
        if left_out and not self._was_crowded:
            log.warning("left out %d of %d peers: they claim more than a view may have", left_out, len(found))
        self._was_crowded = left_out > 0
        return tuple(peers)

    async def put_manifest(self, manifest_json: str, *, expires_at_s: float) -> None:
        """Publish the run's manifest and list the run.

        ValueError when it has more than `MAX_MANIFEST_BYTES` or would live longer than `MAX_LIFETIME_S`.
        """
        run = self._require_run()
        if layout.lasts_too_long(expires_at_s, time.time()):
            raise ValueError(f"the manifest would live longer than {MAX_LIFETIME_S:.0f} s: no member would keep it")
        if len(manifest_json.encode()) > MAX_MANIFEST_BYTES:
            raise ValueError(f"the manifest has more than {MAX_MANIFEST_BYTES} bytes")
        entries = [(manifest_key(run), None, manifest_json, expires_at_s), (RUNS_KEY, run, True, expires_at_s)]
        try:
            await self._store(entries)
        except DiscoveryError:
            # Somebody else's, with a later expiry, serves as well.
            if await self.get_manifest() is None:
                raise

    async def get_manifest(self) -> str | None:
        """The run's manifest, if anybody published it; without a run, that of the only one there is."""
        if self.run is None:
            self.run = await self.find_run()
            if self.run is None:
                return None
            self._validator.guard(self.run)
        await self._ensure_connected()
        key = manifest_key(self.run)
        found = (await self._get([key]))[key]
        manifest = layout.fit_manifest(found)
        if manifest is None and found is not None:
            log.warning("skipped what the DHT has as the manifest of run %r: not a text of a fit size", self.run)
        return manifest

    async def runs(self) -> tuple[str, ...]:
        """The names of the runs that have a manifest in this DHT, sorted."""
        await self._ensure_connected()
        listed = layout.live_entries((await self._get([RUNS_KEY]))[RUNS_KEY], time.time())
        return tuple(sorted(n for n in listed or {} if isinstance(n, str) and run_fault(n) is None))

    async def find_run(self) -> str | None:
        """The only run of this DHT, None when there is none yet; JoinError names them when there are several."""
        names = await self.runs()
        if len(names) > 1:
            raise JoinError(f"this DHT carries {len(names)} runs ({', '.join(names[:10])}): say which one")
        return names[0] if names else None

    async def close(self) -> None:
        """Leave the DHT and end the daemon; may be called again. A withdrawal has to be announced before."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        # A caller that is cancelled leaves; the closing goes on.
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for task in (*self._running, self._keeping):
            task.cancel()
        try:
            async with asyncio.timeout(SHUTDOWN_TIMEOUT_S):
                # Waits for the daemon's word that our handlers are gone.
                if not self._daemon.has_exited:
                    await self._node.shutdown()
        except (TimeoutError, P2PDaemonError, OSError) as error:
            log.debug("the DHT node did not shut down: %r", error)
        finally:
            await dismantle(self._daemon, self._directory)

    def _require_run(self) -> str:
        if self.run is None:
            raise DiscoveryError("no run yet: none was named, and get_manifest has not found one")
        return self.run

    @property
    def known_members(self) -> tuple[str, ...]:
        """Multiaddrs of the members that were met last, for `known` of a later life."""
        return self._book.multiaddrs

    async def greet_lost(self) -> bool:
        """Look for members that were met and that the routing table does not have (any more); whether one answers.

        Without it two sites that were parted would know their own halves for ever: whoever does not answer once leaves
        the routing table.
        """
        for member, addresses in (await self._daemon.connections()).items():
            self._book.note(str(member), addresses)
        present = map(str, self._node.protocol.routing_table.peer_id_to_uid)
        lost = self._book.next_lost(present)
        answers = await asyncio.gather(*map(self._greet, lost))
        if any(answers):
            await self._node.find_nearest_nodes([self._node.node_id])
        return any(answers)

    async def _greet(self, member: str) -> bool:
        addresses, peer_id = self._book.addresses(member), PeerID.from_base58(member)
        # libp2p waits longer after each call in vain, five minutes in the end. So it is not asked before TCP answers.
        if not any(await asyncio.gather(*map(_answers, addresses))):
            return False
        protocol = self._node.protocol
        if await protocol.call_ping(peer_id) is None:
            # The connection may be of the time before: the daemon would keep it until it notices.
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    await self._daemon.reconnect(peer_id, addresses)
            except (P2PDaemonError, OSError, TimeoutError) as error:
                log.debug("%s answers at %s, but not in libp2p: %r", member, ", ".join(addresses), error)
                return False
            if await protocol.call_ping(peer_id) is None:
                return False
        self._node.blacklist.register_success(peer_id)
        return True

    async def _keep_in_touch(self) -> None:
        while not self._daemon.has_exited:
            await asyncio.sleep(self._greet_every_s)
            try:
                await self.greet_lost()
            except (P2PDaemonError, OSError) as error:
                log.debug("looked for nobody: %r", error)

    async def _ensure_connected(self) -> None:
        """Whoever joined others and knows nobody any more asks for them again, and trusts no empty answer."""
        lost = self._has_joined and not self._node.protocol.routing_table.uid_to_peer_id
        if lost and not await self._bounded(self.greet_lost()):
            raise DiscoveryError("no other member of the DHT answers")

    async def _get(self, keys: Sequence[str]) -> dict[str, Any]:
        """The newest value of each key: a mapping subkey -> (value, expiration_time), a plain value, or None."""
        search = self._node.get_many(keys, sufficient_expiration_time=math.inf, beam_size=BEAM)
        found = await self._bounded(cast("Coroutine[Any, Any, dict[str, Any]]", search))
        return {key: None if entry is None else entry.value for key, entry in found.items()}

    async def _store(self, entries: Sequence[tuple[str, str | None, Any, float]]) -> None:
        stored = await self._bounded(
            self._node.store_many(
                keys=[key for key, _, _, _ in entries],
                subkeys=[subkey for _, subkey, _, _ in entries],
                values=[value for _, _, value, _ in entries],
                expiration_time=[float(expires_at_s) for _, _, _, expires_at_s in entries],
                # A client's own store is seen by nobody and must not count as a replica.
                exclude_self=self._client_mode,
                beam_size=max(BEAM, self._node.num_replicas),
            )
        )
        refused = [key for key, accepted in stored.items() if not accepted]
        if refused:
            raise DiscoveryError(f"the DHT did not store {refused[0]}: nobody answered, or a later record is there")

    async def _bounded(self, operation: Coroutine[Any, Any, T]) -> T:
        """`operation` within the time limit; DiscoveryError when it takes longer, or when we are closed meanwhile."""
        if self._closing is not None or self._daemon.has_exited:
            operation.close()
            raise DiscoveryError("closed" if self._closing is not None else "the libp2p daemon has died")
        if self._keeping.done():
            operation.close()
            self._keeping.result()  # a bug there must not part us from the others in silence
        task = asyncio.create_task(operation)
        self._running.add(task)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await task
        except TimeoutError as error:
            raise DiscoveryError(f"the DHT did not answer within {self._timeout_s:.0f} s") from error
        except asyncio.CancelledError:
            if self._closing is not None and task.cancelled():
                raise DiscoveryError("closed meanwhile") from None
            raise
        finally:
            self._running.discard(task)


async def _answers(address: str) -> bool:
    """Whether somebody listens there; of what is not TCP nobody can tell."""
    place = tcp_of(address)
    if place is None:
        return True
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(*place)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def _greet(node: DHTNode, members: Sequence[PeerID]) -> bool:
    """Meet the members that answer and the nodes nearest to us; False when none answers.

    hivemind's own bootstrap leaves a timer behind. ValidationError when a member cannot call us back or when the
    clocks differ by more than 3 s.
    """
    pings = [node.protocol.call_ping(member, validate=True) for member in members]
    answers = await asyncio.gather(*pings, return_exceptions=True)
    if not any(isinstance(answer, DHTID) for answer in answers):
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return False
    await node.find_nearest_nodes([node.node_id])
    return True
