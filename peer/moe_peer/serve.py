"""`moe-peer serve`: the process around an ExpertServer: joining, choosing experts, announcing, leaving."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sys
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import torch
import uvloop
from torch import Tensor

from moe_net.client import make_banks
from moe_net.config import RunConfig, from_json, to_json
from moe_net.discovery.announcer import Announcer
from moe_net.discovery.crowd import RunExperts
from moe_net.discovery.dht import DhtDiscovery
from moe_net.discovery.directory import DirectoryWatcher
from moe_net.discovery.join import resolve_join
from moe_net.discovery.listen import advertised_address
from moe_net.discovery.manifest import find_manifest, keep_manifest, put_manifest
from moe_net.discovery.reach import addresses_of, announced_host, default_listen
from moe_net.discovery.record import Identity, to_ranges
from moe_net.errors import JoinError
from moe_net.experts.host import ExpertHost
from moe_net.machine import available_memory_bytes
from moe_net.placement.assign import assign
from moe_net.placement.view import View
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.signals import until_signalled
from moe_net.types import ExpertId
from moe_net.wire.allocator import tune_allocator
from moe_peer.catchup import catch_up
from moe_peer.checkpoint import find_checkpoint, load_layer
from moe_peer.config import ServeConfig, parse_experts
from moe_peer.gossip import Gossip, Meeting
from moe_peer.memory import find_device, memory_of_experts
from moe_peer.memory_plan import MIB, SCARCE_BYTES, MemoryPlan, plan_memory
from moe_peer.repair import Repair
from moe_peer.server import ExpertServer
from moe_peer.status import say_what_is_served
from moe_peer.threads import use_threads

log = logging.getLogger(__name__)


def run_serve(config: ServeConfig) -> int:
    """Serve until SIGINT or SIGTERM; exit code. JoinError, CheckpointError, ValueError: why it could not begin."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    tune_allocator(sparing=available_memory_bytes() < SCARCE_BYTES)
    use_threads(config.threads)
    uvloop.run(until_signalled(_serve(config)))
    return 0


async def _serve(config: ServeConfig) -> None:
    device = find_device(config.device)
    identity = Identity.generate() if config.identity is None else Identity.load_or_create(config.identity)
    async with AsyncExitStack() as stack:
        # The one call before the DHT's daemon starts (by fork and exec at once, which gRPC survives; no channel is left
        # open): the daemon must be told whom to join.
        joined = await resolve_join(config.join, timeout_s=config.join_timeout_s)
        known = None if joined.manifest_json is None else _read_manifest(joined.manifest_json, config)
        run_at = await addresses_of((*config.join, *joined.dht_addresses))
        listen = config.listen or default_listen(run_at)
        reached_at = config.advertise or announced_host(listen, run_at)
        discovery = await DhtDiscovery.create(
            run=config.run if known is None else known.name,
            join=joined.dht_addresses,
            listen=config.dht_multiaddr(listen),
            advertise=reached_at,
            announce=config.dht_advertise,
            join_timeout_s=config.join_timeout_s,
        )
        stack.push_async_callback(discovery.close)
        run = known or _read_manifest(await _manifest_from_dht(discovery, config), config)
        experts, plan = await _choose_experts(config, run, device, discovery, identity)
        # Off the loop: the DHT's neighbours ping us meanwhile.
        host = await asyncio.to_thread(_make_host, config, run, device, experts, plan)
        transport = GrpcTransport(run=run.name, shape=run.model.expert_shape)
        stack.push_async_callback(transport.close)
        there = await discovery.peers(RunExperts(run.model.expert_ids))
        await _catch_up(config, host, View(there), transport, identity)
        server = await stack.enter_async_context(
            ExpertServer.serving(
                host,
                run=run,
                peer_id=identity.peer_id,
                listen=listen,
                grace_s=config.grace_s,
                max_batch_rows=config.max_batch_rows,
                max_queue_rows=config.max_queue_rows,
                max_queue_bytes=plan.queue_bytes,
                sparing=plan.sparing,
                on_meeting=_print_meeting,
            )
        )

        def address_now() -> str:
            # A line may come back with another address.
            return advertised_address(config.advertise or announced_host(listen, run_at), server.address)

        announcer = Announcer(
            discovery, identity, run=run.name, address=address_now, experts=experts, ttl_s=run.record_ttl_s
        )
        await stack.enter_async_context(announcer)
        directory = None
        if config.share_gradients or config.exchange_every_s > 0:
            directory = await stack.enter_async_context(DirectoryWatcher(discovery, experts=run.model.expert_ids))
        if directory is not None and config.share_gradients:
            server.sharing.begin(transport.share, lambda: directory.view)
        if directory is not None and config.exchange_every_s > 0:
            await stack.enter_async_context(
                Gossip(
                    server.replicator,
                    transport,
                    host,
                    lambda: directory.view,
                    peer_id=identity.peer_id,
                    every_s=config.exchange_every_s,
                )
            )
        # The coordinator may be gone tomorrow: newcomers find the manifest as long as one peer is there.
        await put_manifest(discovery, to_json(run))
        ready = {
            "event": "ready",
            "role": "peer",
            "address": announcer.address,
            "listen": server.address,
            "peer_id": identity.peer_id,
            "run": run.name,
            "experts": describe(experts),
            "dht": list(discovery.addresses),
        }
        print(json.dumps(ready), flush=True)
        log.info(
            "serving %d experts (%s) of run %s at %s", len(experts), describe(experts), run.name, announcer.address
        )

        async def who_hosts() -> View:
            return View(await discovery.peers(RunExperts(run.model.expert_ids)))

        repair = Repair(
            host, server.run_on_device, announcer, transport, who_hosts, partial(_from_checkpoint, config, run),
            own_id=identity.peer_id,
        )  # fmt: skip
        keeping = [
            asyncio.create_task(keep_manifest(discovery, to_json(run))),
            asyncio.create_task(say_what_is_served(lambda: server.served)),
            asyncio.create_task(repair.run()),
        ]
        try:
            await server.failed()
        finally:
            for task in keeping:
                task.cancel()
            log.info("leaving: withdraw, finish what runs (%.0f s at most), stop", config.grace_s)
            await asyncio.gather(announcer.close(), server.leave(grace_s=config.grace_s))


async def _catch_up(
    config: ServeConfig, host: ExpertHost, view: View, transport: GrpcTransport, identity: Identity
) -> None:
    """Before the announcement: nobody sends rows to experts that are about to be replaced."""
    began_s = time.monotonic()
    taken = await catch_up(host, view, transport, own_id=identity.peer_id, timeout_s=config.catch_up_timeout_s)
    if not taken:
        return
    took_s = time.monotonic() - began_s
    for part in taken:
        log.info("took %d experts (%s) from %s", len(part.experts), describe(part.experts), part.peer)
    event = {
        "event": "caught_up",
        "experts": sum(len(part.experts) for part in taken),
        "of": len(host.experts),
        "from": {part.peer: describe(part.experts) for part in taken},
        "version": max(version for versions in host.versions.values() for version in versions.values()),
        "bytes": transport.traffic.received_bytes,
        "took_s": round(took_s, 3),
    }
    print(json.dumps(event), flush=True)


def _print_meeting(meeting: Meeting) -> None:
    """Prints an exchange for machines; a terminal gets the line of `status`."""
    if sys.stdout.isatty():
        return
    event = {
        "event": "exchange",
        "partner": meeting.partner,
        "layer": meeting.layer,
        "divergence": meeting.divergence,
        "experts": meeting.experts,
        "bytes": meeting.n_bytes,
        "took_s": round(meeting.took_s, 3),
    }
    print(json.dumps(event), flush=True)


def describe(experts: tuple[ExpertId, ...]) -> str:
    """As `parse_experts` reads it."""
    ranges = to_ranges(experts)
    return ",".join(f"{layer}.{first}" + (f"-{first + n - 1}" if n > 1 else "") for layer, first, n in ranges)


def _read_manifest(manifest_json: str, config: ServeConfig) -> RunConfig:
    try:
        run = from_json(RunConfig, manifest_json)
    except ValueError as error:
        raise JoinError(f"the run's manifest cannot be read (another version of moe-net?): {error}") from error
    if config.run not in (None, run.name):
        raise JoinError(f"the coordinator's run is {run.name!r}, not {config.run!r}")
    return run


async def _manifest_from_dht(discovery: DhtDiscovery, config: ServeConfig) -> str:
    manifest_json = await find_manifest(discovery, timeout_s=config.join_timeout_s)
    if manifest_json is None:
        which = "any run" if discovery.run is None else f"run {discovery.run!r}"
        raise JoinError(
            f"joined the DHT by {', '.join(config.join)}, but it had no manifest of {which} for "
            f"{config.join_timeout_s:.0f} s. Is the name right, and has the run begun?"
        )
    return manifest_json


async def _choose_experts(
    config: ServeConfig, run: RunConfig, device: str, discovery: DhtDiscovery, identity: Identity
) -> tuple[tuple[ExpertId, ...], MemoryPlan]:
    chosen = () if config.experts is None else parse_experts(config.experts, run.model)
    every = run.model.expert_ids
    n_asked = len(chosen) or config.max_experts
    available_bytes, expert_bytes = memory_of_experts(device, run, max_batch_rows=config.max_batch_rows)
    plan = plan_memory(
        config, available_bytes=available_bytes, expert_bytes=expert_bytes,
        n_asked=n_asked and min(n_asked, len(every)),
    )  # fmt: skip
    if not chosen:
        view = View(await discovery.peers(RunExperts(every)))
        chosen = assign(every, view, plan.n_experts, identity.peer_id)
    log.info(
        "contributing %d of %d experts, %.0f MiB, caches of %.0f MiB for their calls, and %d threads; %.0f MiB are "
        "available", len(chosen), len(every), len(chosen) * expert_bytes / MIB, plan.caches_bytes / MIB,
        torch.get_num_threads(), available_bytes / MIB,
    )  # fmt: skip
    if len(chosen) > plan.fitting_experts:
        log.warning(
            "%d experts were asked for, but beside the caches and the work there is room for %d: with many calls at "
            "once this peer may run out of memory", len(chosen), plan.fitting_experts,
        )  # fmt: skip
    return chosen, plan


def _make_host(
    config: ServeConfig, run: RunConfig, device: str, experts: tuple[ExpertId, ...], plan: MemoryPlan
) -> ExpertHost:
    # A life of its own: what an earlier process of this peer had learned went with it, if no replica took it over.
    origin = 1 + secrets.randbelow(2**63 - 1)
    host = ExpertHost(
        make_banks(run, experts, device=device, origin=origin, at_once_bytes=plan.at_once_bytes),
        stage_bytes=plan.stage_bytes,
    )
    if config.load is not None:
        load_experts(host, run, config.load)
    return host


def _from_checkpoint(config: ServeConfig, run: RunConfig, layer: int) -> dict[str, Tensor]:
    """What this peer would begin with; empty when that is nothing."""
    path = None if config.load is None else find_checkpoint(config.load)
    return {} if path is None else load_layer(path, run, layer)


def load_experts(host: ExpertHost, run: RunConfig, folder: Path) -> int:
    """Experts hosted here from the newest checkpoint in `folder`; how many. Those it lacks stay fresh, with a warning.

    CheckpointError when it is damaged or of another run, or when there is no such folder.
    """
    path = find_checkpoint(folder)
    if path is None:
        log.warning("no checkpoint in %s yet: %d experts start afresh", folder, len(host.experts))
        return 0
    loaded = 0
    for layer in sorted({expert.layer for expert in host.experts}):
        loaded += host.load_state(load_layer(path, run, layer))
    log.info("loaded %d of %d experts from %s", loaded, len(host.experts), path)
    if loaded < len(host.experts):
        log.warning("%d experts are not in %s: they start afresh", len(host.experts) - loaded, path)
    return loaded
