"""Ways to a SwarmLink: join a run over the network, or host every expert in this process."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass

import torch

from moe_net.config import RunConfig, from_json
from moe_net.discovery.dht import DhtDiscovery
from moe_net.discovery.directory import DirectoryWatcher
from moe_net.discovery.join import resolve_join
from moe_net.discovery.manifest import find_manifest
from moe_net.errors import JoinError
from moe_net.experts.bank import AT_ONCE_BYTES, ExpertBank
from moe_net.experts.host import ExpertHost
from moe_net.model.remote_moe import SwarmLink
from moe_net.placement.view import View
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.rpc.local import LocalTransport
from moe_net.rpc.policy import CallPolicy
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.trace import EventSink, FaultEvent, ignore
from moe_net.types import Encoding, ExpertId, PeerInfo


def make_banks(
    run: RunConfig,
    experts: Sequence[ExpertId],
    *,
    device: str = "cpu",
    compute_dtype: torch.dtype | None = None,
    origin: int = 0,
    at_once_bytes: int = AT_ONCE_BYTES,
) -> dict[int, ExpertBank]:
    """Fresh experts of a run, one bank per layer; the same weights wherever they are made. `origin`: a number of the
    process's own, when there are to be replicas (see `experts.lineage`). `at_once_bytes`: what rows that run together
    may take beside themselves, on a CPU.

    Unless `compute_dtype` says otherwise they compute in fp32, on a CUDA device in bf16, or in fp16 where that has no
    bf16.
    """
    dtype = compute_dtype or torch.float32
    if compute_dtype is None and device.startswith("cuda"):
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    banks: dict[int, ExpertBank] = {}
    for layer in sorted({expert.layer for expert in experts}):
        banks[layer] = ExpertBank(
            layer=layer,
            indices=sorted(expert.index for expert in experts if expert.layer == layer),
            shape=run.model.expert_shape,
            optimizer=run.optimizer,
            global_batch_tokens=run.global_batch_tokens,
            run=run.name,
            seed=run.seed,
            init_std=run.model.init_std,
            device=device,
            compute_dtype=dtype,
            origin=origin,
            at_once_bytes=at_once_bytes,
        )
    return banks


@contextmanager
def host_here(
    run: RunConfig, *, n_peers: int = 1, encoding: Encoding = Encoding.FP32, on_event: EventSink = ignore
) -> Generator[SwarmLink]:
    """Every expert of the run in this process, dealt out to `n_peers` hosts that are called without a network."""
    dealt = [[e for e in run.model.expert_ids if e.index % n_peers == peer] for peer in range(n_peers)]
    peers = [
        PeerInfo(peer_id=f"here-{i}", address="", experts=tuple(experts)) for i, experts in enumerate(dealt) if experts
    ]
    hosts = {peer.peer_id: ExpertHost(make_banks(run, peer.experts)) for peer in peers}
    view = View(peers)
    with Portal() as portal:
        swarm = ExpertSwarm(
            trainer="here", transport=LocalTransport(hosts), view=lambda: view, encoding=encoding, on_event=on_event
        )
        try:
            yield SwarmLink(swarm=swarm, runner=portal)
        finally:
            portal.run(swarm.close())


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """A trainer's place in a run that goes on elsewhere."""

    run: RunConfig
    link: SwarmLink
    directory: DirectoryWatcher
    transport: GrpcTransport


@contextmanager
def join_run(
    addresses: Sequence[str],
    *,
    name: str | None = None,
    trainer: str = "trainer",
    policy: CallPolicy | None = None,
    on_event: EventSink = ignore,
    wait_s: float = 60.0,
    spread: bool = False,
) -> Generator[Membership]:
    """Join the run `name` (None: the only one there) by any of `addresses`; waits for its experts.

    An address is a coordinator's `host:port` or the libp2p address of any member. JoinError says what was tried, or
    which experts nobody hosts after `wait_s`.
    """
    with Portal() as portal:
        stack = AsyncExitStack()
        try:
            yield portal.run(_join(stack, portal, addresses, name, trainer, policy, on_event, wait_s, spread))
        finally:
            portal.run(stack.aclose())


async def _join(
    stack: AsyncExitStack,
    portal: Portal,
    addresses: Sequence[str],
    name: str | None,
    trainer: str,
    policy: CallPolicy | None,
    on_event: EventSink,
    wait_s: float,
    spread: bool,
) -> Membership:
    joined = await resolve_join(addresses)
    known = None if joined.manifest_json is None else from_json(RunConfig, joined.manifest_json)
    # The DHT before the first gRPC channel that stays: its daemon is forked, and gRPC does not survive a fork.
    discovery = await DhtDiscovery.create(
        run=name if known is None else known.name, join=joined.dht_addresses, client_mode=True
    )
    stack.push_async_callback(discovery.close)
    run = known or await _manifest_from_dht(discovery, name, wait_s)
    if name is not None and run.name != name:
        raise JoinError(f"{', '.join(addresses)} belongs to run {run.name!r}, not {name!r}")
    wanted = frozenset(run.model.expert_ids)
    watcher = DirectoryWatcher(discovery, experts=wanted, interval_s=run.record_ttl_s / 6)
    directory = await stack.enter_async_context(watcher)
    try:
        await directory.wait_for(lambda view: wanted <= view.experts, wait_s)
    except TimeoutError:
        missing = sorted(wanted - directory.view.experts)
        raise JoinError(
            f"after {wait_s:.0f} s nobody hosts {len(missing)} of {len(wanted)} experts "
            f"({', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}); "
            f"{len(directory.view.peers)} peers are there. Start more: moe-peer serve --join {addresses[0]}"
        ) from None
    transport = GrpcTransport(run=run.name, shape=run.model.expert_shape)
    stack.push_async_callback(transport.close)

    def noticed(fault: FaultEvent) -> None:
        if fault.what == "peer_suspended":
            directory.refresh_soon()  # others may host what it had, and have joined since the last look
        on_event(fault)

    swarm = ExpertSwarm(
        trainer=trainer,
        transport=transport,
        view=lambda: directory.view,
        encoding=run.wire_encoding,
        policy=policy,
        spread=spread,
        on_event=noticed,
    )
    stack.push_async_callback(swarm.close)
    return Membership(run=run, link=SwarmLink(swarm=swarm, runner=portal), directory=directory, transport=transport)


async def _manifest_from_dht(discovery: DhtDiscovery, name: str | None, timeout_s: float) -> RunConfig:
    manifest_json = await find_manifest(discovery, timeout_s=timeout_s)
    if manifest_json is None:
        raise JoinError(f"for {timeout_s:.0f} s nobody had the manifest of {f'run {name!r}' if name else 'any run'}")
    return from_json(RunConfig, manifest_json)
