"""Keeping a run's manifest in the directory: every member that stays does it, so that no single one is needed."""

from __future__ import annotations

import asyncio
import logging
import time

from moe_net.discovery.base import Discovery
from moe_net.errors import DiscoveryError

log = logging.getLogger(__name__)

MANIFEST_TTL_S = 300.0
"""Life of the manifest after the last member that knew it has gone: a run may be away for a short while."""


async def keep_manifest(discovery: Discovery, manifest_json: str, *, ttl_s: float = MANIFEST_TTL_S) -> None:
    """Refresh the manifest for ever: several chances before it expires. A refresh that fails is tried again."""
    while True:
        await asyncio.sleep(ttl_s / 6)
        try:
            await discovery.put_manifest(manifest_json, expires_at_s=time.time() + ttl_s)
        except DiscoveryError as error:
            log.warning("the manifest was not refreshed: %s", error)
