"""Discovery within one process: the same contract as the DHT's, for tests and for a swarm in one process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from moe_net.discovery.crowd import Crowd, RunExperts
from moe_net.discovery.record import Record, check, open_record
from moe_net.errors import RecordError
from moe_net.types import PeerInfo

log = logging.getLogger(__name__)


class MemoryRegistry:
    """What the members of one process share; give the same registry to each `MemoryDiscovery`."""

    def __init__(self, *, clock_s: Callable[[], float] = time.time) -> None:
        self.clock_s = clock_s
        # run -> peer id -> (expiry, record); run -> (expiry, manifest)
        self.records: dict[str, dict[str, tuple[float, bytes]]] = {}
        self.manifests: dict[str, tuple[float, str]] = {}

    def put(self, run: str, peer_id: str, record: bytes, expires_at_s: float) -> None:
        """File bytes as they are, junk included; a later expiry wins, as in the DHT."""
        shelf = self.records.setdefault(run, {})
        if peer_id not in shelf or shelf[peer_id][0] < expires_at_s:
            shelf[peer_id] = (expires_at_s, record)


class MemoryDiscovery:
    """A member of a run whose directory is a `MemoryRegistry`."""

    def __init__(self, registry: MemoryRegistry, *, run: str) -> None:
        self.run = run
        self._registry = registry
        self._crowd = Crowd()

    async def announce(self, record: bytes, *, peer_id: str, expires_at_s: float) -> None:
        """Publish a record; RecordError when it would not be accepted by anybody."""
        opened = open_record(record)
        check(opened, run=self.run, now_s=self._registry.clock_s(), peer_id=peer_id)
        if opened.expires_at_s != expires_at_s:
            raise RecordError(f"record of peer {peer_id} expires at {opened.expires_at_s}, not at {expires_at_s}")
        self._registry.put(self.run, peer_id, record, expires_at_s)

    async def peers(self, experts: RunExperts | None = None) -> tuple[PeerInfo, ...]:
        """Every live peer of the run whose record verifies and names any of `experts`, sorted by peer id."""
        now_s = self._registry.clock_s()
        shelf = self._registry.records.get(self.run, {})
        for peer_id in [p for p, (expires_at_s, _) in shelf.items() if expires_at_s <= now_s]:
            del shelf[peer_id]
        found: list[Record] = []
        for peer_id, (_, record) in sorted(shelf.items()):
            try:
                opened = open_record(record)
                check(opened, run=self.run, now_s=now_s, peer_id=peer_id)
            except RecordError as error:
                log.debug("skipped: %s", error)
                continue
            if not opened.withdrawn:
                found.append(opened)
        return tuple(self._crowd.peers(found, experts)[0])

    async def put_manifest(self, manifest_json: str, *, expires_at_s: float) -> None:
        """Publish the run's manifest."""
        old = self._registry.manifests.get(self.run)
        if old is None or old[0] < expires_at_s:
            self._registry.manifests[self.run] = (expires_at_s, manifest_json)

    async def get_manifest(self) -> str | None:
        """The run's manifest while it has not expired."""
        expires_at_s, manifest = self._registry.manifests.get(self.run, (-1.0, ""))
        return manifest if expires_at_s > self._registry.clock_s() else None

    async def close(self) -> None:
        """Nothing to give back; the registry outlives its members."""
