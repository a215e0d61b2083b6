"""Several micro-batches of a step at once: while one waits for its experts, another computes.

Each micro-batch in flight has a thread, for its autograd graph is walked by whoever asked for its gradient (on the CPU;
on a GPU one thread of autograd's walks all graphs, and waits in them one by one). One *turn* goes round: who has it
computes, who waits for the network has given it back. So the trunk's work stays serial, and torch's own threads are
not fought over; it goes to the oldest micro-batch that asks, whose graph is the next that can be freed.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar

from moe_net.errors import NoLiveExpertsError
from moe_net.model.remote_moe import Runner
from moe_net.rpc.served import noting_served

ResultT = TypeVar("ResultT")
PartT = TypeVar("PartT")

# How long an interrupt may go unnoticed at worst.
SIGNAL_CHECK_S = 0.5


class _Stopped(BaseException):
    """Ends a micro-batch because another one failed. Not an Exception: nothing on the way may take it for one."""


@dataclass(slots=True, kw_only=True)
class Waits:
    """What was waited for, since the pipeline was made."""

    idle_s: float = 0.0
    """Nobody computed: every micro-batch in flight waited for its experts."""
    network_s: list[float] = field(default_factory=list[float])
    """Of each wait, what the servers did not spend on it; empty unless `Pipeline.keep_waits`."""


class _Turn:
    """A baton, handed over directly: to the waiting lane of the oldest micro-batch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._asking: list[tuple[int, threading.Lock]] = []
        self._free_since_s = 0.0
        self.idle_s = 0.0

    def begin(self) -> None:
        """From here on, a turn that nobody has is idle time."""
        self._free_since_s = time.perf_counter()

    def ask(self, rank: int, wake: threading.Lock) -> None:
        """`wake`, which its owner holds, is released when it has the turn; any thread may ask for it."""
        with self._lock:
            if self._taken:
                heapq.heappush(self._asking, (rank, wake))
                return
            self._taken = True
            self.idle_s += time.perf_counter() - self._free_since_s
        wake.release()

    def give_back(self) -> None:
        with self._lock:
            if not self._asking:
                self._taken = False
                self._free_since_s = time.perf_counter()
                return
            _, wake = heapq.heappop(self._asking)
        wake.release()


@dataclass(slots=True, eq=False)
class _Lane:
    """A thread's micro-batch."""

    step: _Step[Any]
    turn: _Turn
    rank: int
    wake: threading.Lock
    waiting_for: Future[Any] | None = None
    past_return: bool = False
    stopped: bool = False

    def take_turn(self) -> None:
        self.turn.ask(self.rank, self.wake)
        self.wake.acquire()

    def wait(self, runner: Runner, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Start `work`, let others compute, and come back with its result and the turn."""
        with self.step.lock:
            if self.stopped:
                work.close()
                raise _Stopped
            future = self.waiting_for = runner.submit(work)
        # From the loop's thread, and not by this one after it woke: one wake-up instead of two.
        future.add_done_callback(lambda _: self.turn.ask(self.rank, self.wake))
        self.turn.give_back()
        self.wake.acquire()
        self.waiting_for = None
        return future.result()


class _Step(Generic[PartT]):
    """The micro-batches of one step: which are to do, under way, done, and taken."""

    def __init__(self, n: int, in_flight: int, take: Callable[[PartT], None]) -> None:
        self.lock = threading.Lock()
        self._room = threading.Condition(self.lock)
        self._n, self._in_flight, self._take = n, in_flight, take
        self._next = self._next_to_take = 0
        self._done: dict[int, PartT] = {}
        self._lanes: list[_Lane] = []
        self._any_past_return = False
        self._closed = False
        self.lost: NoLiveExpertsError | None = None
        self.fatal: BaseException | None = None

    def start(self, turn: _Turn, wake: threading.Lock) -> _Lane | None:
        """The next micro-batch, or None when there is none, or the step is at its end."""
        with self.lock:
            # Results that wait for an older one hold a gradient of the whole trunk each: there are bounds.
            self._room.wait_for(lambda: self._closed or len(self._done) < self._in_flight)
            if self._closed or self._next == self._n:
                return None
            lane = _Lane(self, turn, self._next, wake)
            self._next += 1
            self._lanes.append(lane)
            return lane

    def pass_return(self, lane: _Lane) -> None:
        with self.lock:
            if lane.stopped:
                raise _Stopped
            lane.past_return = self._any_past_return = True

    def finish(self, lane: _Lane, part: PartT) -> None:
        """Note a result and take what is due in the order of micro-batches. The lane has the turn: takers are alone."""
        with self.lock:
            self._lanes.remove(lane)
            self._done[lane.rank] = part
            due: list[PartT] = []
            while self._next_to_take in self._done:
                due.append(self._done.pop(self._next_to_take))
                self._next_to_take += 1
            if due:
                self._room.notify_all()
        for one in due:
            self._take(one)

    def fail(self, lane: _Lane, error: BaseException) -> None:
        with self.lock:
            self._lanes = [other for other in self._lanes if other is not lane]
        if not (lane.stopped and isinstance(error, _Stopped | CancelledError)):
            self.stop(error)

    def stop(self, error: BaseException) -> None:
        """Begin no more. After NoLiveExpertsError those past return go on, after anything else nobody does."""
        with self.lock:
            self._closed = True
            self._room.notify_all()
            soft = isinstance(error, NoLiveExpertsError)
            if isinstance(error, NoLiveExpertsError):
                self.lost = self.lost or error
            else:
                self.fatal = self.fatal or error
            stopped = [lane for lane in self._lanes if not (soft and lane.past_return)]
            for lane in stopped:
                lane.stopped = True
            waits = [lane.waiting_for for lane in stopped if lane.waiting_for is not None]
        for future in waits:
            future.cancel()

    def end(self) -> None:
        """With all lanes at their end: raise what went wrong, or take what is whole."""
        if self.fatal is not None:
            raise self.fatal
        if self.lost is not None and not self._any_past_return:
            raise self.lost
        for rank in sorted(self._done):
            self._take(self._done.pop(rank))


class Pipeline:
    """Runs micro-batches, and is the `Runner` of the layers they go through. A context manager that owns its threads.

    On a thread that has no micro-batch in flight it runs coroutines as the given runner does.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._here = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_size = 0
        self.waits = Waits()
        self.keep_waits = False
        """Note each wait's network time; for the choice of how many to have in flight."""

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads. Idempotent; the next `each` that needs some makes new ones."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool, self._pool_size = None, 0

    # Runner -----------------------------------------------------------------------------------------------

    def submit(self, work: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        return self._runner.submit(work)

    def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run `work` on the event loop; other micro-batches compute meanwhile."""
        lane: _Lane | None = getattr(self._here, "lane", None)
        started_s = time.perf_counter()
        with noting_served() as served:
            if lane is None:
                result = self._runner.run(work)
                self.waits.idle_s += time.perf_counter() - started_s
            else:
                result = lane.wait(self._runner, work)
        if self.keep_waits:
            self.waits.network_s.append(max(0.0, time.perf_counter() - started_s - served.slowest_s))
        return result

    # Micro-batches ----------------------------------------------------------------------------------------

    def pass_return(self) -> None:
        """A micro-batch says that from here on it leaves traces elsewhere (gradients at the peers)."""
        lane: _Lane | None = getattr(self._here, "lane", None)
        if lane is not None:
            lane.step.pass_return(lane)
        else:
            self._here.past_return = True

    def each(self, work: Callable[[int], PartT], take: Callable[[PartT], None], *, n: int, in_flight: int) -> None:
        """`take(work(i))` for i in 0..n-1: `take` in this order, up to `in_flight` of `work` at once.

        With `in_flight=1` on the caller's thread, one after the other. Otherwise `work` and `take` run on threads of
        the pipeline, one of them at any moment, apart from `run`; at most `2 * in_flight` results wait for an older
        one.

        NoLiveExpertsError out of a `work` ends it early: when none has passed return (`pass_return`), it is raised;
        else those past return are finished and taken, and the rest is left out. Anything else is raised as soon as all
        have stopped, their waits cancelled.
        """
        if min(n, in_flight) <= 1:
            self._one_by_one(work, take, n)
            return
        step = _Step(n, min(n, in_flight), take)
        turn = _Turn()
        turn.begin()
        threads, lanes = self._threads(in_flight), list[Future[None]]()
        try:
            for _ in range(min(n, in_flight)):
                lanes.append(threads.submit(self._lane, step, turn, work))
            # A signal between a look for signals and the wait itself would be seen only after it.
            while wait_for(lanes, timeout=SIGNAL_CHECK_S).not_done:
                pass
        except BaseException as error:  # An interrupt of the thread that waits here.
            step.stop(error)
            wait_for(lanes)
            raise
        self.waits.idle_s += turn.idle_s
        step.end()
        for lane in lanes:
            lane.result()  # A bug of ours, outside any micro-batch.

    def _one_by_one(self, work: Callable[[int], PartT], take: Callable[[PartT], None], n: int) -> None:
        self._here.past_return = False
        for i in range(n):
            try:
                part = work(i)
            except NoLiveExpertsError:
                if not self._here.past_return:
                    raise
                return
            take(part)

    def _threads(self, n: int) -> ThreadPoolExecutor:
        if self._pool is None or n > self._pool_size:
            self.close()
            self._pool, self._pool_size = ThreadPoolExecutor(n, thread_name_prefix="micro-batch"), n
        return self._pool

    def _lane(self, step: _Step[PartT], turn: _Turn, work: Callable[[int], PartT]) -> None:
        wake = threading.Lock()
        wake.acquire()
        while (lane := step.start(turn, wake)) is not None:
            lane.take_turn()
            self._here.lane = lane
            try:
                step.finish(lane, work(lane.rank))
            except (NoLiveExpertsError, _Stopped, CancelledError) as error:
                step.fail(lane, error)
            except BaseException as error:
                step.fail(lane, error)
                raise
            finally:
                self._here.lane = None
                turn.give_back()
