"""Replicas make each step together: every one steps on the gradients of all, so they stay one expert.

A trainer's commit reaches all replicas at about the same time. Each that closes a batch by it sets its sums apart, asks
those that close the same one (the same commits) for theirs, and steps on all of them, added in one order: replicas
that were equal are equal again, to the bit, and equal to one peer that had got all rows. Averaging afterwards cannot
do that: AdamW that sees half of the rows sees more noise and makes smaller steps for it (a learning rate divided by
sqrt(2) costs as much). And a replica that dies takes no learning with it.

Replicas that count from different commits (one has missed some) would never close the same batch again. Who asks names
its commits; who has ended a step within those says how many tokens it had after the last of them, and the one with the
larger id goes on from there.

Nobody waits for long: who does not answer soon is left out, and asked again some steps later. Then one side has stepped
on more than the other; their lineages say so, and their next meeting (gossip.py) mends it. Replicas on a CPU and on a
GPU round differently, and are equal but for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any, Protocol

from moe_net.errors import BusyError, InputsGoneError
from moe_net.experts.host import Closed, ExpertHost
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure
from moe_net.types import ExpertId, PeerInfo
from moe_net.wire.messages import CommitAnswer, CommitCall
from moe_net.wire.share import MAX_COMMITS, Share, ShareCall, commit_key
from moe_peer.streams import Places

log = logging.getLogger(__name__)

MIN_WAIT_S, MAX_WAIT_S = 0.2, 1.0
"""For a replica's part of a step. At most half of a commit's shortest deadline, `CallPolicy.min_timeout_s`."""
STEP_SHARE = 0.5
"""Of the time between steps, at most, for waiting."""
PATIENCE = 4.0
"""Times the longest of a replica's last answers."""
MAX_SKIPPED = 63
"""Steps made without asking one that does not answer."""
REMEMBERED = 64
"""Batches that are over: their shares are gone, and nobody has to wait for them."""
KNOWN_BATCHES = 8
"""Of the last ones, which commits closed them."""
MAX_WAITING_SHARES = 32
"""Replicas that ask for a share which is not there yet, or never will be: a name of a batch says nothing."""
FILES_FACTOR = 4
"""Times the experts of a share, that those of the files may be which are there at once. One that is sent to all is made
once; replicas that host other experts each want another."""
STRANGERS_FACTOR, PARTS_FACTOR = 8, 16
"""Times the experts of a host, that the answers may have which are on their way to it at once: those of replicas that
it does not know to answer, and all. Each is as large as its sender likes, up to what those experts have: 24 that sent
junk took 24 times a host's gradients. Eight others that have all of its experts are in its step from the first on."""
MAX_WAITING_COMMITS = 32
"""With the one that is made: half of the calls that a server takes at once, so that there is room for others."""


class Ask(Protocol):
    """`GrpcTransport.share`."""

    async def __call__(self, peer: PeerInfo, call: ShareCall, *, timeout_s: float) -> Share: ...


@dataclass(slots=True)
class _Partner:
    waits_s: deque[float] = field(default_factory=lambda: deque[float](maxlen=16))
    failures: int = 0
    """In a row."""
    skip: int = 0
    """Steps to be made without it."""
    asked: int = 0
    """The number of the last question."""

    @property
    def trusted(self) -> bool:
        return bool(self.waits_s) and not self.failures

    def answered(self, waited_s: float) -> None:
        self.waits_s.append(waited_s)
        self.failures = 0

    def failed(self) -> None:
        self.failures += 1
        self.skip = min(MAX_SKIPPED, 2 ** min(self.failures, 16) - 1)


def choose(partners: Mapping[str, _Partner], n_shared: Mapping[str, int], n_mine: int) -> set[str]:
    """Whom to ask for their part of a step, of those that share `n_shared` experts with a host of `n_mine`: as many as
    there is room for. Those that answer come first, the longest known at their head; of the others those that were
    asked longest ago, so that newcomers without end keep nobody out for long."""
    room, strangers_room = PARTS_FACTOR * n_mine, STRANGERS_FACTOR * n_mine
    chosen: set[str] = set()
    for peer_id, partner in sorted(partners.items(), key=lambda item: (not item[1].trusted, item[1].asked)):
        if partner.skip or n_shared[peer_id] > (room if partner.trusted else min(room, strangers_room)):
            continue
        chosen.add(peer_id)
        room -= n_shared[peer_id]
        strangers_room -= n_shared[peer_id] * (not partner.trusted)
    return chosen


@dataclass(slots=True, eq=False)
class _Waiting:
    """Asks for a share that is not there yet."""

    caller: str
    news: asyncio.Event = field(default_factory=asyncio.Event)
    displaced: bool = False


class Sharing:
    """The commits of one host. Lives on the loop; what touches experts runs by `run`, on their device's thread."""

    def __init__(self, host: ExpertHost, run: Callable[..., Awaitable[Any]], *, peer_id: str) -> None:
        self._host = host
        self._run = run
        self._peer_id = peer_id
        self._mine = frozenset(host.experts)
        self._ask: Ask | None = None
        self._view: Callable[[], View] = lambda: View(())
        self._partners: dict[str, _Partner] = {}
        """In the order in which we heard of them."""
        self._questions = 0
        self._turn = asyncio.Lock()
        self._places = Places("Commit", MAX_WAITING_COMMITS)
        self._making: asyncio.Task[CommitAnswer] | None = None
        """The commit whose turn it is."""
        self._layers: asyncio.Task[None] | None = None
        """Makes the steps of layers that are due."""
        self._batch = b""
        self._share: Share | None = None
        self._pending: dict[int, int] = {}
        """Commits towards the next step -> tokens committed after each."""
        self._ended: deque[dict[int, int]] = deque(maxlen=KNOWN_BATCHES)
        """Those of the last steps."""
        self._over: deque[bytes] = deque(maxlen=REMEMBERED)
        self._waiting: list[_Waiting] = []
        """Who came first is first."""
        self._ended_s: float | None = None
        self._between_s: deque[float] = deque(maxlen=8)

    def begin(self, ask: Ask, view: Callable[[], View]) -> None:
        """From now on steps are made together with the replicas in `view`. An origin is needed for that."""
        assert self._host.origin, "replicas are told apart by their origins"
        self._ask, self._view = ask, view

    async def commit(self, call: CommitCall) -> CommitAnswer:
        """As `ExpertHost.commit`. Once begun it is done whole, whether or not the caller stays; a caller that goes
        before its turn takes its call along. BusyError: too many wait."""
        with self._places.one():
            # Not in the task: whoever hung up would leave it there to wait, and nothing would bound those.
            await self._turn.acquire()
            self._making = asyncio.create_task(self._commit(call), name="commit")
            self._making.add_done_callback(lambda _: self._turn.release())
            return await asyncio.shield(self._making)

    async def _commit(self, call: CommitCall) -> CommitAnswer:
        partners = self._replicas()
        shared = {expert for peer in partners for expert in self._mine.intersection(peer.experts)}
        answer, closed, share = await self._run(self._close, call, shared)
        if call.tokens and not answer.repeated:
            self._pending[commit_key(call)] = answer.committed_tokens
            if len(self._pending) > MAX_COMMITS:
                del self._pending[next(iter(self._pending))]
        if closed is not None:
            self._ended.append(self._pending)
            self._over.append(self._batch)
            self._batch, self._share, self._pending = closed.batch, share, {}
        for waiting in self._waiting:
            waiting.news.set()
        if closed is None:
            return answer
        now_s = asyncio.get_running_loop().time
        if self._ended_s is not None:
            self._between_s.append(now_s() - self._ended_s)
        asked = self._to_ask(partners)
        asking = [self._part_of(peer, closed, tuple(self._ended[-1])) for peer in asked]
        # Whatever a partner's answer led to: our own sums are set apart, and must be stepped on.
        parts = await asyncio.gather(*asking, return_exceptions=True)
        shares = {peer.peer_id: part for peer, part in zip(asked, parts, strict=True) if isinstance(part, Share)}
        if shared:
            await self._run(self._host.finish_commit, closed, list(shares.values()))
        else:
            self._begin_making()
        first = min(shares, default=self._peer_id)
        if first < self._peer_id and (there := shares[first].committed_tokens) is not None:
            log.info("steps end at other commits at %s: going on from its %d tokens", first, there)
            await self._run(self._host.continue_at, there)
        for part in parts:
            if isinstance(part, BaseException):
                log.error("a step without a replica", exc_info=part)
        self._ended_s = now_s()
        return answer

    def _close(
        self, call: CommitCall, shared: Collection[ExpertId]
    ) -> tuple[CommitAnswer, Closed | None, Share | None]:
        """With nobody to share with, the step is made layer by layer while other calls run."""
        answer, closed = self._host.begin_commit(call)
        if closed is None:
            return answer, None, None
        with ExitStack() as alone:  # also when there is no share to be had: a step that has begun must end
            alone.callback(self._host.finish_commit, closed)
            share = self._host.share(closed, shared)
            alone.pop_all()
        if not shared:
            self._host.defer(closed)
        return answer, closed, share

    def _begin_making(self) -> None:
        """The steps of layers that are due, one after another: calls that come meanwhile go in between."""
        if self._layers is None or self._layers.done():
            self._layers = asyncio.create_task(self._make_due(), name="steps of layers")

    async def _make_due(self) -> None:
        more = True
        while more:
            try:
                more = await self._run(self._host.make_next)
            except RuntimeError:  # of the device; that layer's step is over, and the others' come
                log.exception("a layer's step failed")

    def _replicas(self) -> Sequence[PeerInfo]:
        if self._ask is None:
            return ()
        peers = self._view().peers
        replicas = [p for i, p in peers.items() if i != self._peer_id and not self._mine.isdisjoint(p.experts)]
        known = {peer.peer_id for peer in replicas}
        self._partners = {peer_id: partner for peer_id, partner in self._partners.items() if peer_id in known}
        return replicas

    def _to_ask(self, replicas: Sequence[PeerInfo]) -> list[PeerInfo]:
        for peer in replicas:
            self._partners.setdefault(peer.peer_id, _Partner())
        n_shared = {peer.peer_id: len(self._mine.intersection(peer.experts)) for peer in replicas}
        chosen = choose(self._partners, n_shared, len(self._mine))
        self._questions += 1
        for peer_id, partner in self._partners.items():
            partner.skip = max(0, partner.skip - 1)
            if peer_id in chosen and not partner.trusted:
                partner.asked = self._questions
        return [peer for peer in replicas if peer.peer_id in chosen]

    def limit_s(self, peer_id: str) -> float:
        """How long to wait for that replica now."""
        most_s = MAX_WAIT_S
        if self._between_s:
            most_s = min(most_s, max(MIN_WAIT_S, STEP_SHARE * mean(self._between_s)))
        partner = self._partners.get(peer_id)
        if partner is None or not partner.waits_s:
            return most_s
        return min(most_s, max(MIN_WAIT_S, PATIENCE * max(partner.waits_s)))

    async def _part_of(self, peer: PeerInfo, closed: Closed, commits: tuple[int, ...]) -> Share | None:
        """None when it has none, or does not say in time."""
        assert self._ask is not None, "there are no replicas before `begin`"
        partner = self._partners[peer.peer_id]
        now_s, limit_s = asyncio.get_running_loop().time, self.limit_s(peer.peer_id)
        began_s = now_s()
        shared = tuple(sorted(self._mine.intersection(peer.experts)))
        try:
            async with asyncio.timeout(limit_s):
                call = ShareCall(batch=closed.batch, experts=shared, commits=commits)
                share = await self._ask(peer, call, timeout_s=limit_s)
        except TimeoutError:
            self._without(peer, partner, f"no answer in {limit_s:.2f} s")
            return None
        except CallError as error:
            # One that is past this step, or busy, says so at once.
            at_once = now_s() - began_s < MIN_WAIT_S
            if at_once and error.failure in (CallFailure.INPUTS_GONE, CallFailure.BUSY):
                log.debug("a step without %s: %s", peer.peer_id, error)
            else:
                self._without(peer, partner, str(error))
            return None
        partner.answered(now_s() - began_s)
        return share

    def _without(self, peer: PeerInfo, partner: _Partner, why: str) -> None:
        partner.failed()
        log.info("a step without %s, and %d more: %s", peer.peer_id, partner.skip, why)

    async def answer(self, call: ShareCall, *, limit_s: float | None = None, caller: str = "") -> Share:
        """Our part of a step, once we have closed it too, or where we are when we shall not. InputsGoneError: it is
        over, or none of ours; TimeoutError: not in time; BusyError: too many of `caller` wait."""
        async with asyncio.timeout(MAX_WAIT_S if limit_s is None else min(limit_s, MAX_WAIT_S)):
            share = self._answer_now(call)
            if share is not None:
                return share
            with self._place(caller) as waiting:
                while share is None:
                    await waiting.news.wait()
                    if waiting.displaced:
                        raise BusyError(f"Share: {MAX_WAITING_SHARES} wait for a step to end, most of them from there")
                    waiting.news.clear()
                    share = self._answer_now(call)
                return share

    @contextmanager
    def _place(self, caller: str) -> Generator[_Waiting]:
        """Among those that wait. In the place of the first of whoever has most of them, if too many do: nobody knows
        which of their batches is real, and a stranger who names many must not keep replicas out."""
        if len(self._waiting) >= MAX_WAITING_SHARES:
            n_of = Counter(waiting.caller for waiting in (*self._waiting, _Waiting(caller)))
            first = max(self._waiting, key=lambda waiting: n_of[waiting.caller])
            first.displaced = True
            first.news.set()
            self._waiting.remove(first)
        mine = _Waiting(caller)
        self._waiting.append(mine)
        try:
            yield mine
        finally:
            if not mine.displaced:
                self._waiting.remove(mine)

    def _answer_now(self, call: ShareCall) -> Share | None:
        """None: not yet, as far as we know."""
        if self._share is not None and call.batch == self._batch:
            experts = {expert: self._share.experts[expert] for expert in call.experts if expert in self._share.experts}
            return replace(self._share, experts=experts)
        if call.batch in self._over:
            raise InputsGoneError("batch: that step is over here")
        tokens = self._tokens_after(call.commits)
        if self._share is not None and tokens is not None:
            return replace(self._share, experts={}, committed_tokens=tokens)
        return None

    def _tokens_after(self, commits: Sequence[int]) -> int | None:
        """Committed here after the last of `commits`, when a step has ended among them, so that theirs is none of ours;
        None as long as it may be, or we have not heard of the last one.

        InputsGoneError when we have not heard just these, one after another: commits that crossed on their way will
        still come, there or here, and must not be counted twice.
        """
        if not any(commit in batch for batch in self._ended for commit in commits):
            return None
        tokens_after = {commit: tokens for batch in (*self._ended, self._pending) for commit, tokens in batch.items()}
        if commits[-1] not in tokens_after:
            return None
        heard, named = list(tokens_after), set(commits)
        places = [place for place, commit in enumerate(heard) if commit in named]
        if len(named) != len(places) or places[-1] - places[0] >= len(places):
            raise InputsGoneError("batch: other commits came in between here")
        return tokens_after[heard[places[-1]]]

    async def close(self) -> None:
        """Finish what has begun."""
        async with self._turn:
            if self._layers is not None:
                await self._layers


@dataclass(slots=True, eq=False)
class _File:
    made: asyncio.Task[tuple[bytes, bytes]]
    n_experts: int
    users: int = 0


class ShareFiles:
    """Shares as files, each made once for all who are sent it at the same time."""

    def __init__(self, make: Callable[[Share], Awaitable[tuple[bytes, bytes]]], *, n_experts: int) -> None:
        """`make`: (file, digest); `n_experts`: of the host."""
        self._make = make
        self._limit = FILES_FACTOR * n_experts
        self._files: dict[tuple[object, ...], _File] = {}

    @asynccontextmanager
    async def of(self, batch: bytes, share: Share) -> AsyncGenerator[tuple[bytes, bytes]]:
        """(file, digest) while within. BusyError: too many others are there."""
        key = (batch, share.clock, share.committed_tokens, *share.experts)
        file = self._files.get(key)
        if file is None:
            n_there = sum(file.n_experts for file in self._files.values())
            if n_there + len(share.experts) > self._limit:
                raise BusyError(f"Share: {n_there} experts are on their way, at most {self._limit} may be")
            made = asyncio.create_task(self._made(share), name="share file")
            file = self._files[key] = _File(made, len(share.experts))
            made.add_done_callback(lambda _: self._forget(key))
        file.users += 1
        try:
            yield await asyncio.shield(file.made)
        finally:
            file.users -= 1
            self._forget(key)

    async def _made(self, share: Share) -> tuple[bytes, bytes]:
        return await self._make(share)

    def _forget(self, key: tuple[object, ...]) -> None:
        """Not while it is being made: whoever asks and leaves must not have it made again beside that."""
        file = self._files.get(key)
        if file is not None and not file.users and file.made.done():
            del self._files[key]
