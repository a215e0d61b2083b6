"""The Discovery protocol: how peers make themselves known and trainers learn who is there."""

from __future__ import annotations

from typing import Protocol

from moe_net.discovery.crowd import RunExperts
from moe_net.types import PeerInfo


class Discovery(Protocol):
    """A place of records that expire. Every method is a coroutine on the owner's loop."""

    async def announce(self, record: bytes, *, peer_id: str, expires_at_s: float) -> None:
        """Publish (or refresh) a peer's own signed record; a later `expires_at_s` replaces an earlier one."""
        ...

    async def peers(self, experts: RunExperts | None = None) -> tuple[PeerInfo, ...]:
        """Every live peer of the run whose record verifies, sorted by peer id. Does network I/O: never in a step.

        With the run's `experts` a peer has those of them that it claims, and who claims none is left out: give them
        as soon as they are known, for strangers claim what there is not. Bounded by what `crowd` allows.
        """
        ...

    async def put_manifest(self, manifest_json: str, *, expires_at_s: float) -> None:
        """Publish the run's manifest."""
        ...

    async def get_manifest(self) -> str | None:
        """The run's manifest, if anybody published it."""
        ...

    async def close(self) -> None: ...
