"""The coordinator process: a DHT node, the manifest in the DHT, CoordinatorService. Losing it loses nothing."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence

import uvloop

from moe_coordinator.config import ServeOptions
from moe_coordinator.service import CoordinatorServicer, running_server
from moe_net.config import RunConfig, to_json
from moe_net.discovery.base import Discovery
from moe_net.discovery.dht import DhtDiscovery
from moe_net.discovery.join import resolve_join
from moe_net.discovery.manifest import keep_manifest
from moe_net.signals import until_signalled


def main(options: ServeOptions, run: RunConfig) -> int:
    """Serve `run` until SIGTERM or SIGINT; returns exit code 0."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    uvloop.run(until_signalled(_serve(options, run)))
    return 0


async def publish_manifest(discovery: Discovery, manifest_json: str, *, ttl_s: float) -> None:
    """Publish a run's manifest; ValueError when the run has another one already: its members rely on theirs."""
    published = await discovery.get_manifest()
    if published is not None and published != manifest_json:
        raise ValueError("the run has another manifest already: join with that one, or choose another name")
    await discovery.put_manifest(manifest_json, expires_at_s=time.time() + ttl_s)


async def _serve(options: ServeOptions, run: RunConfig) -> None:
    manifest_json = to_json(run)
    members: Sequence[str] = ()
    if options.join:
        _, members = await resolve_join(options.join)
    # The DHT before the gRPC server: its daemon is forked, and gRPC does not survive a fork.
    discovery = await DhtDiscovery.create(run=run.name, join=members, listen=options.dht_multiaddr)
    try:
        await publish_manifest(discovery, manifest_json, ttl_s=options.manifest_ttl_s)
        servicer = CoordinatorServicer(manifest_json=manifest_json, dht_addresses=discovery.addresses)
        async with running_server(servicer, options.listen) as address:
            ready = {"event": "ready", "role": "coordinator", "address": address, "dht": list(discovery.addresses)}
            print(json.dumps({**ready, "run": run.name}), flush=True)
            await keep_manifest(discovery, manifest_json, ttl_s=options.manifest_ttl_s)
    finally:
        await discovery.close()
