"""The coordinator process: a DHT node, the manifest in the DHT, CoordinatorService. Losing it loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Sequence

import uvloop

from moe_coordinator.config import ServeOptions
from moe_coordinator.service import CoordinatorServicer, running_server
from moe_coordinator.state import State
from moe_net.config import RunConfig, to_json
from moe_net.discovery.base import Discovery
from moe_net.discovery.dht import DhtDiscovery
from moe_net.discovery.join import resolve_join
from moe_net.discovery.listen import advertised_address
from moe_net.discovery.manifest import keep_manifest
from moe_net.discovery.reach import addresses_of, announced_host
from moe_net.folder import alone_in
from moe_net.signals import until_signalled

log = logging.getLogger(__name__)

KEEP_MEMBERS_EVERY_S = 5.0


def main(options: ServeOptions, run: RunConfig) -> int:
    """Serve `run` until SIGTERM or SIGINT; returns exit code 0."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with contextlib.nullcontext() if options.state is None else alone_in(options.state):
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
    run_at = await addresses_of((*options.join, *members)) if options.join else None
    reached_at = options.advertise or announced_host(options.listen, run_at)
    state = None if options.state is None else State(options.state)
    # The DHT before the gRPC server: its daemon is forked, and gRPC does not survive a fork.
    discovery = await DhtDiscovery.create(
        run=run.name,
        join=members,
        listen=options.dht_multiaddr,
        advertise=reached_at,
        announce=options.dht_advertise,
        identity=None if state is None else state.dht_key,
        known=() if state is None else state.members(),
    )
    try:
        await publish_manifest(discovery, manifest_json, ttl_s=options.manifest_ttl_s)
        servicer = CoordinatorServicer(manifest_json=manifest_json, dht_addresses=discovery.addresses)
        async with running_server(servicer, options.listen) as listening:
            address = advertised_address(reached_at, listening)
            ready = {"event": "ready", "role": "coordinator", "address": address, "listen": listening}
            print(json.dumps({**ready, "dht": list(discovery.addresses), "run": run.name}), flush=True)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(keep_manifest(discovery, manifest_json, ttl_s=options.manifest_ttl_s))
                    if state is not None:
                        tasks.create_task(_keep_members(state, discovery))
            finally:
                log.info("leaving: the run goes on without a coordinator")
    finally:
        await discovery.close()


async def _keep_members(state: State, discovery: DhtDiscovery) -> None:
    """Write down who is there, now and then: a coordinator that is killed has no time for it."""
    while True:
        state.keep_members(discovery.known_members)
        await asyncio.sleep(KEEP_MEMBERS_EVERY_S)
