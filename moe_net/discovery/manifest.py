"""The run's manifest in the directory: every member that stays keeps it there, so that no single one is needed."""

from __future__ import annotations

import asyncio
import logging
import time

from moe_net.discovery.base import Discovery
from moe_net.errors import DiscoveryError

log = logging.getLogger(__name__)

MANIFEST_TTL_S = 300.0
"""Life of the manifest after the last member that knew it has gone: a run may be away for a short while."""
POLL_S = 0.5
"""Between two looks for a manifest that has not reached our part of the directory yet."""


async def put_manifest(discovery: Discovery, manifest_json: str, *, ttl_s: float = MANIFEST_TTL_S) -> None:
    """Publish or refresh it; a failure is logged only, for there are more chances before it expires."""
    try:
        await discovery.put_manifest(manifest_json, expires_at_s=time.time() + ttl_s)
    except DiscoveryError as error:
        log.warning("the manifest was not refreshed: %s", error)


async def keep_manifest(discovery: Discovery, manifest_json: str, *, ttl_s: float = MANIFEST_TTL_S) -> None:
    """Refresh it for ever."""
    while True:
        await asyncio.sleep(ttl_s / 6)
        await put_manifest(discovery, manifest_json, ttl_s=ttl_s)


async def find_manifest(discovery: Discovery, *, timeout_s: float) -> str | None:
    """The manifest as soon as the directory has it; None after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            # A directory has no event to wait for.
            while (manifest_json := await discovery.get_manifest()) is None:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
            return manifest_json
    except TimeoutError:
        return None
