"""Whole state of many experts from whoever hosts them: for checkpoints, and for peers that take experts over.

Fetching changes nothing at a peer, so any replica may be asked, at once or again. Nothing here counts against a peer's
health: one that is busy with other trainers' checkpoints still runs rows.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator

from torch import Tensor

from moe_net.placement.select import select
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure, ExpertTransport
from moe_net.trace import EventSink, FaultEvent, ignore
from moe_net.types import ExpertId, PeerInfo
from moe_net.wire.state import experts_in

PARALLEL = 8
"""Peers asked at once; each of them one layer at a time, for it holds what it sends twice."""
ATTEMPTS = 3
"""Fetches of a layer from a peer that does not answer. A busy one is asked until the time is over."""
PAUSE_S, MAX_PAUSE_S = 0.1, 2.0
"""Before the same peer is asked again: the first pause, which doubles, and the longest."""


def _always(peer_id: str) -> bool:
    return True


class Collector:
    """One collection of expert state: make it, `collect` once."""

    def __init__(
        self,
        *,
        view: Callable[[], View],
        transport: ExpertTransport,
        timeout_s: float,
        usable: Callable[[str], bool] = _always,
        salt: str = "",
        on_event: EventSink = ignore,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`usable`: peers that are not are asked last. `salt` decides between equal replicas, as in `select`."""
        self._view = view
        self._transport = transport
        self._usable = usable
        self._salt = salt
        self._on_event = on_event
        self._clock_s = clock_s
        self._deadline_s = clock_s() + timeout_s
        self._parallel = asyncio.Semaphore(PARALLEL)
        self._one_at_a_time: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tries: Counter[tuple[str, int]] = Counter()
        self._ruled_out: set[tuple[str, int]] = set()
        self._state: dict[str, Tensor] = {}

    async def collect(self, experts: Collection[ExpertId]) -> dict[str, Tensor]:
        """State as in `ExpertBank.state`; experts that nobody answered for in time are left out."""
        await self._gather(experts)
        return self._state

    async def _gather(self, experts: Collection[ExpertId]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for peer, layer, indices in self._deal(experts):
                tasks.create_task(self._ask(peer, layer, indices))

    def _deal(self, experts: Collection[ExpertId]) -> Iterator[tuple[PeerInfo, int, list[int]]]:
        """Who shall be asked for what: the peers that were tried least, usable ones first."""
        view = self._view()
        for layer in sorted({expert.layer for expert in experts}):
            left = {expert.index for expert in experts if expert.layer == layer}
            rank_of = {
                peer_id: (not self._usable(peer_id), self._tries[peer_id, layer])
                for peer_id in view.peers
                if (peer_id, layer) not in self._ruled_out
            }
            for rank in sorted(set(rank_of.values())):
                others = [peer_id for peer_id in view.peers if rank_of.get(peer_id) != rank]
                of_peer: defaultdict[str, list[int]] = defaultdict(list)
                for index, peer_id in select(
                    view.without(others), layer, dict.fromkeys(left, 1), salt=self._salt
                ).items():
                    of_peer[peer_id].append(index)
                    left.discard(index)
                for peer_id, indices in of_peer.items():
                    yield view.peers[peer_id], layer, indices

    async def _ask(self, peer: PeerInfo, layer: int, indices: list[int]) -> None:
        experts = [ExpertId(layer, index) for index in indices]
        async with self._one_at_a_time[peer.peer_id], self._parallel:
            started_s = self._clock_s()
            left_s = self._deadline_s - started_s
            # One that does not answer must leave time for the others.
            share_s = left_s / 2 if self._others(peer.peer_id, experts) else left_s
            try:
                if left_s <= 0:
                    raise CallError(CallFailure.LATE, peer.peer_id, "no time was left to ask")
                answer = await self._transport.fetch(peer, layer, indices, timeout_s=share_s)
                self._state |= _of(answer, peer.peer_id, experts)
                there = experts_in(answer)
                experts = [expert for expert in experts if str(expert) not in there]
                if not experts:
                    return
                names = ", ".join(map(str, experts))
                failure = CallError(CallFailure.REFUSED, peer.peer_id, f"left out {names}: broken there")
            except CallError as error:
                failure = error
        self._tries[peer.peer_id, layer] += 1
        tries = self._tries[peer.peer_id, layer]
        # Each late answer costs its whole time-out.
        final = failure.failure is CallFailure.REFUSED or tries >= (
            2 if failure.failure is CallFailure.LATE else ATTEMPTS
        )
        if failure.failure is not CallFailure.BUSY and final:
            self._ruled_out.add((peer.peer_id, layer))
        left_s = self._deadline_s - self._clock_s()
        again = left_s > 0 and (
            (peer.peer_id, layer) not in self._ruled_out or bool(self._others(peer.peer_id, experts))
        )
        if failure.failure is not CallFailure.BUSY or tries == 1 or not again:
            self._report(peer, layer, failure, started_s, "again" if again else "left_out")
        if again:
            await asyncio.sleep(max(0.0, min(PAUSE_S * 2 ** min(tries - 1, 10), MAX_PAUSE_S, left_s / 2)))
            await self._gather(experts)

    def _others(self, peer_id: str, experts: Collection[ExpertId]) -> set[str]:
        """Further peers that may be asked for any of `experts`."""
        view = self._view()
        replicas = {(replica, expert.layer) for expert in experts for replica in view.replicas(expert)}
        return {replica for replica, _ in replicas - self._ruled_out} - {peer_id}

    def _report(self, peer: PeerInfo, layer: int, error: CallError, started_s: float, action: str) -> None:
        cost_s = self._clock_s() - started_s
        self._on_event(
            FaultEvent(
                what="fetch_failed", peer=peer.peer_id, layer=layer, action=action, cost_s=cost_s, detail=error.detail
            )
        )


def _of(answer: dict[str, Tensor], peer_id: str, experts: Collection[ExpertId]) -> dict[str, Tensor]:
    """The answer, if it is of some of `experts` and of nothing else: a peer must not speak for another's."""
    there = experts_in(answer)
    if not there or not there <= {str(expert) for expert in experts}:
        raise CallError(CallFailure.REFUSED, peer_id, "answered with other experts than it was asked for")
    return answer
