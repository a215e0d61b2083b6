"""Commits, and the way back of peers that were away: both off the path of a step.

A step waits for the commits of peers that answer; not for one that is overdue while replicas of all its experts have
answered, and never for one that is suspended. Those are asked in the background,
each by a task of its own: once its backoff is over a probe, or first of all the commits it has missed, in order. When
it has heard of them all it gets rows again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any

from moe_net.placement.health import ProbeFailed
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure, Failed
from moe_net.rpc.caller import Caller
from moe_net.rpc.ledger import Ledger, Owed
from moe_net.rpc.outlook import CallKind
from moe_net.rpc.policy import CallPolicy, Move, after_commit, pause_s
from moe_net.trace import FaultEvent
from moe_net.types import PeerInfo
from moe_net.wire.messages import CommitAnswer

Sleep = Callable[[float], Awaitable[None]]


class Commits:
    """Owned by one swarm, used on its loop; `close` ends its tasks."""

    def __init__(
        self, caller: Caller, ledger: Ledger, directory: Callable[[], View], policy: CallPolicy, sleep: Sleep
    ) -> None:
        """`directory`: the latest snapshot, whoever is suspended."""
        self._caller = caller
        self._ledger = ledger
        self._directory = directory
        self._policy = policy
        self._sleep = sleep
        self._tasks: set[asyncio.Task[None]] = set()
        self._saying: set[str] = set()
        self._recovering: set[str] = set()

    async def commit(self, step: int, tokens: int) -> None:
        """Tell every peer that this step's gradients are complete. Returns when those that answer have answered."""
        known = self._directory().peers
        concerned = self._ledger.close_step(step, tokens, list(known.values()))
        usable = [peer for peer_id, peer in concerned.items() if self._caller.outlook.usable(peer_id)]
        # Who is on its way back already hears of this step there.
        saying = {
            peer.peer_id: self._spawn(self._say_or_recover(peer), f"commit {step} {peer.peer_id[:8]}")
            for peer in usable
            if peer.peer_id not in self._recovering and peer.peer_id not in self._saying
        }
        self._saying |= saying.keys()
        await self._heard_enough(saying)
        self._caller.outlook.forget(concerned.keys())
        for peer_id in concerned:
            if peer_id in self._ledger.owing and peer_id in known and peer_id not in self._saying:
                self.recover(peer_id)

    async def _heard_enough(self, saying: Mapping[str, asyncio.Task[None]]) -> None:
        """Wait for all; but not for one that is overdue while others that have heard host the same experts: it goes on
        hearing of the step in the background, and gets rows again when it has."""
        started_s = self._caller.now_s()
        try:
            while left := {p: task for p, task in saying.items() if not task.done()}:
                covered = self._covered(left.keys())
                overdue_s = [self._caller.outlook.overdue_after_s(p, CallKind.COMMIT, 1) for p in covered]
                if len(covered) == len(left) and all(s is not None for s in overdue_s):
                    left_s = max(s for s in overdue_s if s is not None) - (self._caller.now_s() - started_s)
                    if left_s <= 0:
                        return
                    await asyncio.wait(left.values(), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await asyncio.wait(left.values(), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            for task in saying.values():
                task.cancel()
            raise
        for task in saying.values():
            task.result()

    def _covered(self, peer_ids: Collection[str]) -> list[str]:
        """Those of these peers whose experts all have a replica that may be called and is none of them."""
        view = self._caller.outlook.filtered(self._directory(), self._ledger.owing)
        peers = self._directory().peers
        return [p for p in peer_ids if p in peers and all(view.replicas(expert) for expert in peers[p].experts)]

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _say_or_recover(self, peer: PeerInfo) -> None:
        try:
            heard = await self._say(peer)
        finally:
            # Here and not in a callback of the task, which comes a turn of the loop too late: a commit in between would
            # leave the peer to a task that is over.
            self._saying.discard(peer.peer_id)
        if not heard and peer.peer_id in self._directory().peers:
            self.recover(peer.peer_id)

    def recover(self, peer_id: str) -> None:
        """See to it that this peer is asked until it is back."""
        if peer_id not in self._recovering:
            self._recovering.add(peer_id)
            self._spawn(self._recover(peer_id), f"recover {peer_id[:8]}")

    async def close(self) -> None:
        """Ask nobody any more."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _say(self, peer: PeerInfo) -> bool:
        """The commits that the peer has not heard of, in order; whether it knows all now."""
        deadline_s = self._caller.now_s() + self._policy.commit_timeout_s
        outlook, attempt, began_s = self._caller.outlook, 0, self._caller.now_s()
        while (owed := self._ledger.next_commit(peer.peer_id)) is not None:
            attempt += 1
            self._caller.stats.retries += attempt > 1
            timeout_s = min(outlook.late_after_s(peer.peer_id, CallKind.COMMIT, 1), deadline_s - self._caller.now_s())
            answer = await self._caller.commit(peer, owed.commit, timeout_s=max(0.001, timeout_s))
            if not isinstance(answer, Failed):
                self._ledger.heard(peer.peer_id, owed)
                self._note_lost(peer, owed, answer)
                attempt, began_s = 0, self._caller.now_s()
                continue
            if answer.error.failure is CallFailure.REFUSED:
                self._ledger.heard(peer.peer_id, owed)  # It would be refused again for ever.
                nothing = CommitAnswer(repeated=False, stepped=False, committed_tokens=0, missing=owed.commit.calls)
                self._note_lost(peer, owed, nothing)
            outlook.blame(peer, CallKind.COMMIT, 1, answer)
            left_s = deadline_s - self._caller.now_s()
            busy_s = self._caller.now_s() - began_s
            busy = answer.error.failure is CallFailure.BUSY
            if busy:
                left_s = min(left_s, self._policy.min_timeout_s - busy_s)
            usable = outlook.usable(peer.peer_id)
            move = after_commit(
                answer.error.failure, attempt=attempt, left_s=left_s, policy=self._policy, usable=usable
            )
            outlook.report(peer, CallKind.COMMIT, answer, action=move.value)
            if move is Move.GIVE_UP:
                if busy:
                    # A commit takes no room to speak of: who has none for so long holds up every step, and is asked in
                    # the background like one that does not answer.
                    late = CallError(CallFailure.LATE, peer.peer_id, f"busy for {busy_s:.1f} s: {answer.error.detail}")
                    outlook.blame(peer, CallKind.COMMIT, 1, Failed(error=late, waited_s=busy_s))
                return False
            queue_s = answer.error.queue_s
            await self._sleep(pause_s(attempt=attempt, left_s=left_s, policy=self._policy, queue_s=queue_s))
        return True

    def _note_lost(self, peer: PeerInfo, owed: Owed, answer: CommitAnswer) -> None:
        for what, pairs in zip(("gradient_gone", "gradient_not_finite"), owed.lost_pairs(answer), strict=True):
            if pairs:
                self._caller.stats.lost_gradient_pairs += pairs
                self._caller.outlook.event(FaultEvent(what=what, peer=peer.peer_id, pairs=pairs, action="left_out"))

    async def _recover(self, peer_id: str) -> None:
        try:
            await self._ask_until_back(peer_id)
        finally:
            self._recovering.discard(peer_id)

    async def _ask_until_back(self, peer_id: str) -> None:
        outlook, began_s, tries = self._caller.outlook, self._caller.now_s(), 0
        while True:
            tries += 1
            due_s = outlook.probe_due_s(peer_id)
            pause = self._policy.retry_pause_s * 2 ** min(tries - 1, 8)
            await self._sleep(pause if due_s is None else max(0.0, due_s - self._caller.now_s()))
            peer = self._directory().peers.get(peer_id)
            if peer is None:
                return  # it has left; should it come back, the next commit sees what it owes
            timeout_s = outlook.late_after_s(peer_id, CallKind.COMMIT, 1)
            answers = await self._caller.ping(peer, timeout_s=timeout_s)
            if not answers or not await self._say(peer):
                outlook.note(ProbeFailed(peer_id=peer_id))
                continue
            if self._ledger.next_commit(peer_id) is None:
                away_s = self._caller.now_s() - began_s
                outlook.back(peer_id, away_s=away_s)
                outlook.event(FaultEvent(what="peer_back", peer=peer_id, action="unmasked", cost_s=away_s))
                return
