"""A joining replica takes over what living ones have learned, before anybody sends it a row."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_net.errors import CheckpointError
from moe_net.experts.host import ExpertHost
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.types import ExpertId, PeerInfo
from moe_net.wire.state import experts_in, split_name

log = logging.getLogger(__name__)

ASK_TIMEOUT_S = 5.0
"""For a replica's versions: one small message."""
BUSY_PAUSE_S = 0.5
"""Before asking replicas again that all were busy with other newcomers."""

Candidates = dict[ExpertId, list[tuple[int, str]]]
"""Expert -> (version, peer id) of its replicas that know more than we do, the best one first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What came from one peer."""

    peer: str
    experts: tuple[ExpertId, ...]


def rank(versions: Mapping[str, Mapping[ExpertId, int]], mine: Mapping[ExpertId, int]) -> Candidates:
    """The replicas worth asking: those of a later version than `mine`. (Equal versions are equal weights when both
    are fresh, and a checkpoint that was asked for wins otherwise.)"""
    found: Candidates = {}
    for expert, version in mine.items():
        ranked = sorted((-v[expert], peer) for peer, v in versions.items() if v.get(expert, 0) > version)
        if ranked:
            found[expert] = [(-negative, peer) for negative, peer in ranked]
    return found


def next_fetch(candidates: Candidates) -> tuple[str, int, list[int]]:
    """(peer, layer, indices) of the first expert's best replica, with all else of the layer that it is the best for."""
    first = min(candidates)
    peer = candidates[first][0][1]
    same = [e.index for e, ranked in candidates.items() if e.layer == first.layer and ranked[0][1] == peer]
    return peer, first.layer, sorted(same)


def without_peer(candidates: Candidates, peer_id: str) -> Candidates:
    """The candidates as if that peer were not there; experts left without any are not in it."""
    left = {expert: [c for c in ranked if c[1] != peer_id] for expert, ranked in candidates.items()}
    return {expert: ranked for expert, ranked in left.items() if ranked}


async def catch_up(
    host: ExpertHost,
    view: View,
    transport: GrpcTransport,
    *,
    own_id: str,
    timeout_s: float,
) -> list[Taken]:
    """Fetch weights, moments and versions of every hosted expert of which a living replica has a later version.

    A replica that does not answer, or answers badly, is left out and the next one asked; an expert that nobody gives
    away within `timeout_s` stays as it is. The host must not be in use yet.
    """
    mine = {ExpertId(layer, i): v for layer, versions in host.versions.items() for i, v in versions.items()}
    peers = {p.peer_id: p for p in view.peers.values() if p.peer_id != own_id and not mine.keys().isdisjoint(p.experts)}
    taken: defaultdict[str, list[ExpertId]] = defaultdict(list)
    clock_s = asyncio.get_running_loop().time
    deadline_s = clock_s() + timeout_s
    candidates = rank(await _versions(peers.values(), transport, timeout_s=min(ASK_TIMEOUT_S, timeout_s)), mine)
    busy: set[str] = set()
    while candidates and clock_s() < deadline_s:
        patient = _unless_all_busy(candidates, busy)
        if patient is None:
            busy.clear()
            await asyncio.sleep(min(BUSY_PAUSE_S, max(0.0, deadline_s - clock_s())))
            continue
        peer_id, layer, indices = next_fetch(patient)
        try:
            # Half of what is left, so that one who stalls leaves time for the next.
            left_s = (deadline_s - clock_s()) / 2
            state = await transport.fetch(peers[peer_id], layer, indices, timeout_s=left_s)
            got = await asyncio.to_thread(_adopt, host, state, layer, indices)
        except CallError as error:
            log.warning("catching up: experts of layer %d: %s", layer, error)
            if error.failure is CallFailure.BUSY:
                busy.add(peer_id)
            else:
                candidates = without_peer(candidates, peer_id)
        except CheckpointError as error:
            log.warning("catching up: experts of layer %d from %s: %s", layer, peer_id, error)
            candidates = without_peer(candidates, peer_id)
        else:
            for expert in got:
                taken[peer_id].append(expert)
                del candidates[expert]
            if len(got) < len(indices):  # the others are broken there
                candidates = without_peer(candidates, peer_id)
    # Layers came at different moments, perhaps with a commit in between: their steps must end together.
    host.continue_at(host.committed_tokens)
    return [Taken(peer=peer, experts=tuple(sorted(experts))) for peer, experts in sorted(taken.items())]


def _unless_all_busy(candidates: Candidates, busy: set[str]) -> Candidates | None:
    for peer in busy:
        candidates = without_peer(candidates, peer)
    return candidates or None


async def _versions(
    peers: Iterable[PeerInfo], transport: GrpcTransport, *, timeout_s: float
) -> dict[str, dict[ExpertId, int]]:
    """What each of `peers` says of its experts, asked at once; who does not answer is not in it."""
    said: dict[str, dict[ExpertId, int]] = {}

    async def ask(peer: PeerInfo) -> None:
        try:
            info = await transport.info(peer, timeout_s=timeout_s)
        except CallError as error:
            log.warning("catching up: %s", error)
            return
        said[peer.peer_id] = {
            ExpertId(layer.layer, index): version
            for layer in info.layers
            for index, version in zip(layer.expert_index, layer.version, strict=False)
        }

    async with asyncio.TaskGroup() as group:
        for peer in peers:
            group.create_task(ask(peer))
    return said


def _adopt(host: ExpertHost, state: Mapping[str, Tensor], layer: int, indices: Sequence[int]) -> list[ExpertId]:
    """The experts that were taken over; CheckpointError, and nothing changed, when some are none of those asked for."""
    asked = {str(ExpertId(layer, index)): ExpertId(layer, index) for index in indices}
    got = experts_in(state)
    if not got <= asked.keys():
        raise CheckpointError(f"asked for {len(asked)} experts of layer {layer}, got others")
    # Its place between two steps, but not its gradients: it will step on those itself, and they must count once.
    sums = ("g_in", "g_out")
    host.load_state({n: torch.zeros_like(v) if split_name(n)[1] in sums else v for n, v in state.items()})
    return [expert for name, expert in asked.items() if name in got]
