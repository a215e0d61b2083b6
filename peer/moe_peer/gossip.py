"""Replicas average: this peer answers the Exchange of others, and on a timer asks those whose id is larger.

A layer is in at most one exchange at a time. While that lasts others are refused with BusyError, never made to wait:
two peers that wait for each other would wait for ever, and what happened to the weights meanwhile must be our own
steps only (see `replicate.rebase`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from moe_net.errors import BusyError, CheckpointError, WireError
from moe_net.experts.host import ExpertHost
from moe_net.experts.replicate import average, divergence, rebase
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.types import ExpertId, PeerInfo
from moe_net.wire.exchange import ChunkReader, ExchangeHead, write_chunks
from moe_net.wire.snapshot import pack, unpack
from moe_net.wire.state import experts_in, max_state_bytes
from moe_peer.device import DeviceThread

log = logging.getLogger(__name__)

MAX_QUIET_S = 30.0
"""Between two meetings of replicas at which nothing happens. (What a peer learns from others than us it has from who
made the steps; this is for what got lost on the way.)"""
TIME_SHARE = 0.1
"""Of a peer's time, for meetings that it begins: replicas that meet seldom learn apart. At 50 steps between meetings
two that share the calls of one trainer had 5 % more loss than one."""

MAX_ANSWERS = 2
"""At once: each holds its experts' state four times, as theirs, ours, mean and file."""
PATIENCE_S, SLOWEST_MIB_S = 10.0, 0.5
"""An exchange may take that long, and at that rate what it sends and gets; a partner that stalls costs no more."""


def patience_s(n_bytes: int) -> float:
    """How long an exchange of a state of that size may take."""
    return PATIENCE_S + 2 * n_bytes / 2**20 / SLOWEST_MIB_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """One exchange as the side that answered saw it: it alone had both states."""

    partner: str
    layer: int
    experts: int
    divergence: float
    """Before averaging, the largest of all experts."""
    n_bytes: int
    """Both ways."""
    took_s: float


class Replicator:
    """The meetings of one host's experts. Lives on the loop; what touches experts runs on their device's thread."""

    def __init__(
        self,
        host: ExpertHost,
        device: DeviceThread,
        *,
        run: str,
        peer_id: str,
        on_meeting: Callable[[Meeting], None] = lambda _: None,
    ) -> None:
        """`on_meeting` hears of every exchange that this side answered."""
        self._host = host
        self._device = device
        self._run = run
        self._peer_id = peer_id
        self._on_meeting = on_meeting
        self._in_flight: set[int] = set()
        self._answering = 0

    @contextmanager
    def _layer(self, layer: int) -> Generator[None]:
        if layer in self._in_flight:
            raise BusyError(f"layer {layer} is in an exchange already")
        self._in_flight.add(layer)
        try:
            yield
        finally:
            self._in_flight.discard(layer)

    async def answer(
        self, chunks: AsyncIterator[bytes], write: Callable[[bytes], Awaitable[None]], *, limit_s: float | None
    ) -> None:
        """Read a partner's state, take over the mean, and send it back. BusyError, WireError, LimitError,
        UnknownExpertError and TimeoutError before anything is changed."""
        if self._answering >= MAX_ANSWERS:
            raise BusyError(f"{self._answering} exchanges are on their way, at most {MAX_ANSWERS} may be")
        self._answering += 1
        try:
            async with asyncio.timeout(PATIENCE_S):
                first = await anext(chunks, b"")
            reader = ChunkReader(self._limit_bytes)
            reader.feed(first)
            assert reader.head is not None, "fed"
            patient_s = patience_s(self._limit_bytes(reader.head))
            with self._layer(reader.head.layer):
                async with asyncio.timeout(patient_s if limit_s is None else min(limit_s, patient_s)):
                    await self._answer(reader, len(first), chunks, write)
        finally:
            self._answering -= 1

    def _limit_bytes(self, head: ExchangeHead) -> int:
        if head.peer_id == self._peer_id:
            raise WireError("peer_id: it is our own")
        self._host.check_hosted(head.layer, head.indices)
        return max_state_bytes(len(head.indices), self._host.shape)

    async def _answer(
        self,
        reader: ChunkReader,
        n_bytes: int,
        chunks: AsyncIterator[bytes],
        write: Callable[[bytes], Awaitable[None]],
    ) -> None:
        clock_s = asyncio.get_running_loop().time
        began_s = clock_s()
        async for raw in chunks:
            reader.feed(raw)
            n_bytes += len(raw)
        head, data = await asyncio.to_thread(reader.finish)
        theirs = await asyncio.to_thread(self._unpack, head, data)
        del data
        mean, apart = await self._device.run(self._average, head, theirs)
        del theirs
        packed = await asyncio.to_thread(pack, mean, run=self._run, shape=self._host.shape)
        del mean
        answer = ExchangeHead(peer_id=self._peer_id, layer=head.layer, indices=head.indices)
        for chunk in write_chunks(answer, packed):
            await write(chunk)
            n_bytes += len(chunk)
        meeting = Meeting(
            partner=head.peer_id,
            layer=head.layer,
            experts=len(head.indices),
            divergence=apart,
            n_bytes=n_bytes,
            took_s=clock_s() - began_s,
        )
        log.log(
            logging.INFO if apart else logging.DEBUG,
            "averaged %d experts of layer %d with %s: %.3g apart",
            len(head.indices),
            head.layer,
            head.peer_id,
            apart,
        )
        self._on_meeting(meeting)

    def _unpack(self, head: ExchangeHead, data: bytes) -> dict[str, Tensor]:
        try:
            theirs = unpack(data, run=self._run, shape=self._host.shape)
            self._host.check_state(head.layer, theirs)
        except CheckpointError as error:
            raise WireError(f"data: {error}") from error
        if experts_in(theirs) != {str(ExpertId(head.layer, index)) for index in head.indices}:
            raise WireError("data: not of the experts that expert_index names")
        return theirs

    def _average(self, head: ExchangeHead, theirs: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        ours = self._host.fetch(head.layer, head.indices, with_sums=False)
        mean = average(ours, theirs, own=self._host.origin)
        try:
            self._replace(head.layer, ours, mean)
        except CheckpointError as error:  # finite values can be so large that their mean is not
            raise WireError(f"data: no mean: {error}") from error
        return mean, divergence(ours, theirs)

    def _replace(self, layer: int, old: dict[str, Tensor], new: dict[str, Tensor]) -> bool:
        # Other weights cost what calls have left to be used again: not for nothing.
        changed = old.keys() != new.keys() or not all(torch.equal(value, new[name]) for name, value in old.items())
        if changed:
            self._host.replace_state(layer, new)
        return changed

    async def meet(self, transport: GrpcTransport, partner: PeerInfo, layer: int, indices: Sequence[int]) -> bool:
        """Average some experts with `partner`, on our initiative; whether that changed ours. CallError, and nothing
        changed here, when it does not answer, or badly; BusyError when the layer is in an exchange."""
        with self._layer(layer):
            head = ExchangeHead(peer_id=self._peer_id, layer=layer, indices=tuple(indices))
            sent = await self._device.run(self._host.fetch, layer, head.indices, with_sums=False)
            limit_s = patience_s(sum(value.nbytes for value in sent.values()))
            mean = await transport.exchange(partner, head, sent, timeout_s=limit_s)
            try:
                return await self._device.run(self._adopt, head, sent, mean)
            except CheckpointError as error:
                raise CallError(CallFailure.REFUSED, partner.peer_id, f"a mean that is no state: {error}") from error

    def _adopt(self, head: ExchangeHead, sent: dict[str, Tensor], mean: dict[str, Tensor]) -> bool:
        self._host.check_state(head.layer, mean)
        now = self._host.fetch(head.layer, head.indices, with_sums=False)
        return self._replace(head.layer, now, rebase(mean, now, sent, own=self._host.origin))


@dataclass(frozen=True, slots=True)
class _Quiet:
    """A partner and layer that had nothing new for us."""

    versions: tuple[int, ...]
    """Of our experts, then."""
    pause_s: float
    until_s: float


class Gossip:
    """Every `every_s` seconds one partner, in turn, and every layer shared with it; seldomer where meeting takes long,
    so that it has no more than `TIME_SHARE` of the time, and where nothing happens: a layer that a meeting left as it
    was waits for twice as long each time, until our experts make a step. Use with `async with`."""

    def __init__(
        self,
        replicator: Replicator,
        transport: GrpcTransport,
        host: ExpertHost,
        view: Callable[[], View],
        *,
        peer_id: str,
        every_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicator = replicator
        self._transport = transport
        self._mine = frozenset(host.experts)
        self._view = view
        self._peer_id = peer_id
        self._every_s = every_s
        self._clock_s = clock_s
        self._host = host
        self._quiet: dict[tuple[str, int], _Quiet] = {}
        self._last_partner = ""
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="gossip")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            started_s = loop.time()
            await self.turn()
            await asyncio.sleep(max(self._every_s, (loop.time() - started_s) / TIME_SHARE))

    def next_partner(self) -> PeerInfo | None:
        """The peer after the last one, in the order of ids, of those that share experts and have larger ids."""
        sharing = [
            peer
            for peer_id, peer in self._view().peers.items()
            if peer_id > self._peer_id and not self._mine.isdisjoint(peer.experts)
        ]
        later = [peer for peer in sharing if peer.peer_id > self._last_partner]
        return (later or sharing or [None])[0]

    async def turn(self) -> None:
        """Meet the next partner, if there is one. What fails is logged, and tried again when its turn comes."""
        partner = self.next_partner()
        if partner is None:
            return
        self._last_partner = partner.peer_id
        shared = self._mine & set(partner.experts)
        for layer in sorted({expert.layer for expert in shared}):
            try:
                indices = sorted(expert.index for expert in shared if expert.layer == layer)
                await self._meet(partner, layer, indices)
            except BusyError as error:
                log.debug("no exchange with %s: %s", partner.peer_id, error)
            except CallError as error:
                log.log(logging.DEBUG if error.failure is CallFailure.BUSY else logging.WARNING, "exchange: %s", error)
                if error.failure is not CallFailure.BUSY:
                    return

    async def _meet(self, partner: PeerInfo, layer: int, indices: Sequence[int]) -> None:
        """Unless nothing has happened here since it had nothing new, and that is not long ago."""
        now_s = self._clock_s()
        versions = tuple(self._host.versions[layer][index] for index in indices)
        key = (partner.peer_id, layer)
        quiet = self._quiet.pop(key, None)
        if quiet is not None and quiet.versions == versions and now_s < quiet.until_s:
            self._quiet[key] = quiet
            return
        if not await self._replicator.meet(self._transport, partner, layer, indices):
            before_s = quiet.pause_s if quiet is not None and quiet.versions == versions else self._every_s / 2
            pause_s = min(2 * before_s, MAX_QUIET_S)
            self._quiet[key] = _Quiet(versions, pause_s, now_s + pause_s)
