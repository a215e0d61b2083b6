"""The coordinator process: a DHT node, the manifest in the DHT, CoordinatorService. Losing it loses nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence

import uvloop

from moe_coordinator.config import ServeOptions
from moe_net.config import RunConfig, load_toml, to_json
from moe_net.discovery.base import Discovery
from moe_net.discovery.manifest import keep_manifest
from moe_net.signals import on_signals

log = logging.getLogger(__name__)


def main(options: ServeOptions) -> int:
    """Serve until SIGTERM or SIGINT; returns exit code 0."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run = load_toml(RunConfig, options.config)
    uvloop.run(_serve(options, run))
    return 0


async def publish_manifest(discovery: Discovery, manifest_json: str, *, ttl_s: float) -> None:
    """Publish a run's manifest; ValueError when the run has another one already: its members rely on theirs."""
    published = await discovery.get_manifest()
    if published is not None and published != manifest_json:
        raise ValueError("the run has another manifest already: join with that one, or choose another name")
    await discovery.put_manifest(manifest_json, expires_at_s=time.time() + ttl_s)


async def _serve(options: ServeOptions, run: RunConfig) -> None:
    stop = asyncio.Event()
    with on_signals(lambda _: stop.set()):
        await _serve_until(stop, options, run)


async def _serve_until(stop: asyncio.Event, options: ServeOptions, run: RunConfig) -> None:
    # Imported here: hivemind and its torch take seconds, in which a wrong manifest has been reported already.
    from moe_coordinator.service import CoordinatorServicer, running_server
    from moe_net.discovery.dht import DhtDiscovery

    manifest_json = to_json(run)
    members: Sequence[str] = ()
    if options.join:
        from moe_net.discovery.join import resolve_join

        _, members = await resolve_join(options.join)
    # The DHT before the gRPC server: its daemon is forked, and gRPC does not survive a fork.
    discovery = await DhtDiscovery.create(run=run.name, join=members, listen=options.dht_multiaddr)
    try:
        await publish_manifest(discovery, manifest_json, ttl_s=options.manifest_ttl_s)
        servicer = CoordinatorServicer(manifest_json=manifest_json, dht_addresses=discovery.addresses)
        async with running_server(servicer, options.listen) as address, asyncio.TaskGroup() as tasks:
            refresh = tasks.create_task(keep_manifest(discovery, manifest_json, ttl_s=options.manifest_ttl_s))
            ready = {"event": "ready", "role": "coordinator", "address": address, "dht": list(discovery.addresses)}
            print(json.dumps({**ready, "run": run.name}), flush=True)
            await stop.wait()
            refresh.cancel()
    finally:
        await discovery.close()
