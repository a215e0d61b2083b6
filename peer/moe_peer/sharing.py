"""Replicas make each step together: every one steps on the gradients of all, so they stay one expert (DESIGN, D5, D6).

A trainer's commit reaches all replicas at about the same time. Each that closes a batch by it sets its sums apart, asks
those that close the same one (the same commits) for theirs, and steps on all of them, added in one order: replicas
that were equal are equal again, to the bit, and equal to one peer that had got all rows. Averaging afterwards cannot
do that: AdamW that sees half of the rows sees more noise and makes smaller steps for it (a learning rate divided by
sqrt(2) costs as much). And a replica that dies takes no learning with it.

Replicas that count from different commits (one has missed some) would never close the same batch again. Who asks names
its commits; who has ended a step within those says how many tokens it had after the last of them, and the one with the
larger id goes on from there.

Nobody waits for long: who does not answer soon is left out, and asked again some steps later. Then one side has stepped
on more than the other; their lineages say so, and their next meeting (gossip.py) mends it. A gradient that was voided
before the step is out of the sums before these are set apart, so it is in no share. Replicas on a CPU and on a GPU
round differently, and are equal but for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any, Protocol

from moe_net.errors import InputsGoneError
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

    def answered(self, waited_s: float) -> None:
        self.waits_s.append(waited_s)
        self.failures = 0

    def failed(self) -> None:
        self.failures += 1
        self.skip = min(MAX_SKIPPED, 2 ** min(self.failures, 16) - 1)


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
        self._turn = asyncio.Lock()
        self._places = Places("Commit", MAX_WAITING_COMMITS)
        self._making: asyncio.Task[CommitAnswer] | None = None
        """The commit whose turn it is."""
        self._batch = b""
        self._share: Share | None = None
        self._pending: dict[int, int] = {}
        """Commits towards the next step -> tokens committed after each."""
        self._ended: deque[dict[int, int]] = deque(maxlen=KNOWN_BATCHES)
        """Those of the last steps."""
        self._over: deque[bytes] = deque(maxlen=REMEMBERED)
        self._news = asyncio.Event()
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
        self._news.set()
        self._news = asyncio.Event()
        if closed is None:
            return answer
        now_s = asyncio.get_running_loop().time
        if self._ended_s is not None:
            self._between_s.append(now_s() - self._ended_s)
        asked = [self._part_of(peer, closed, tuple(self._ended[-1])) for peer in partners]
        # Whatever a partner's answer led to: our own sums are set apart, and must be stepped on.
        parts = await asyncio.gather(*asked, return_exceptions=True)
        shares = {peer.peer_id: part for peer, part in zip(partners, parts, strict=True) if isinstance(part, Share)}
        if partners:
            await self._run(self._host.finish_commit, closed, list(shares.values()))
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
        """With nobody to share with, the step is made at once."""
        answer, closed = self._host.begin_commit(call, detach=bool(shared))
        if closed is None:
            return answer, None, None
        with ExitStack() as alone:  # also when there is no share to be had: a step that has begun must end
            alone.callback(self._host.finish_commit, closed)
            share = self._host.share(closed, shared)
            if shared:
                alone.pop_all()
        return answer, closed, share

    def _replicas(self) -> Sequence[PeerInfo]:
        if self._ask is None:
            return ()
        peers = self._view().peers
        self._partners = {peer_id: partner for peer_id, partner in self._partners.items() if peer_id in peers}
        return [p for i, p in peers.items() if i != self._peer_id and not self._mine.isdisjoint(p.experts)]

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
        partner = self._partners.setdefault(peer.peer_id, _Partner())
        if partner.skip > 0:
            partner.skip -= 1
            return None
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
            # One that is past this step, or busy, said so at once.
            if error.failure in (CallFailure.INPUTS_GONE, CallFailure.BUSY):
                log.debug("a step without %s: %s", peer.peer_id, error)
            else:
                self._without(peer, partner, str(error))
            return None
        partner.answered(now_s() - began_s)
        return share

    def _without(self, peer: PeerInfo, partner: _Partner, why: str) -> None:
        partner.failed()
        log.info("a step without %s, and %d more: %s", peer.peer_id, partner.skip, why)

    async def answer(self, call: ShareCall, *, limit_s: float | None = None) -> Share:
        """Our part of a step, once we have closed it too, or where we are when we shall not. InputsGoneError: it is
        over, or none of ours; TimeoutError: not in time."""
        async with asyncio.timeout(MAX_WAIT_S if limit_s is None else min(limit_s, MAX_WAIT_S)):
            while self._share is None or call.batch != self._batch:
                if call.batch in self._over:
                    raise InputsGoneError("batch: that step is over here")
                tokens = self._tokens_after(call.commits)
                if self._share is not None and tokens is not None:
                    return replace(self._share, experts={}, committed_tokens=tokens)
                await self._news.wait()
        share = self._share
        experts = {expert: share.experts[expert] for expert in call.experts if expert in share.experts}
        return replace(share, experts=experts)

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
            pass
