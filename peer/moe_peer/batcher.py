"""Merges the calls of many trainers: while the device works, calls of the same layer and kind gather and run together.

No call waits for company: a device that has room for a batch is given whatever is there. Queues are taken in the order
of their oldest call, so a busy layer cannot starve another. A call that would wait past its deadline is refused on
arrival: its caller learns at once what the wait is, and the queue holds only what may still be of use.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any, Self, cast

from moe_net.errors import BusyError
from moe_net.wire.messages import BackwardAnswer, BackwardCall, ForwardAnswer, ForwardCall
from moe_peer.device import DeviceThread, Later

Call = ForwardCall | BackwardCall
Answer = ForwardAnswer | BackwardAnswer
Handler = Callable[[Sequence[Any]], Sequence[Any] | Later[Sequence[Any]]]


class Kind(StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"


FAR_LARGER = 8
SMOOTHING = 0.2
"""Weight of the newest batch in what a row takes: the last ten batches are nine tenths of it."""
LARGEST_SURPRISE = 4.0
"""A batch counts as at most so many times as slow as expected. One that stood still for 20 s (the machine slept) must
not make the next hundred calls be refused; a machine that has become slow is believed after a few batches."""


@dataclass(slots=True)
class RowTime:
    """What a row of one kind of call takes, from the batches of late."""

    mean_s: float = 0.0
    mean_rows: float = 0.0
    largest_rows: float = 0.0
    """Of the batches of late."""

    @property
    def s_per_row(self) -> float:
        """0 before the first batch: nothing is refused on a guess. Of means, not a mean of ratios: a batch of one row
        is all overhead, and says little of a full one."""
        return self.mean_s / self.mean_rows if self.mean_rows else 0.0

    def counted_rows(self, n_rows: int) -> float:
        """Rows of a call for which the pace holds. Of one far larger than any before nothing is known: the time of five
        rows is all overhead, and 50 000 times it would refuse for half a minute what takes half a second."""
        return min(float(n_rows), FAR_LARGER * self.largest_rows)

    def note(self, n_rows: int, took_s: float) -> None:
        """A batch of `n_rows` took `took_s`."""
        self.largest_rows = max(float(n_rows), (1 - SMOOTHING) * self.largest_rows)
        if not self.mean_s:  # nothing yet, or nothing that a clock could tell
            self.mean_s, self.mean_rows = took_s, float(n_rows)
            return
        took_s = min(took_s, LARGEST_SURPRISE * self.s_per_row * n_rows)
        self.mean_s += SMOOTHING * (took_s - self.mean_s)
        self.mean_rows += SMOOTHING * (n_rows - self.mean_rows)


@dataclass(slots=True, kw_only=True, eq=False)
class _Job:
    call: Call
    n_rows: int
    counted_rows: float
    """See `RowTime`."""
    n_bytes: int
    arrived_s: float
    deadline_s: float
    flight_key: tuple[object, ...]
    waiters: list[asyncio.Future[Answer]] = field(default_factory=list["asyncio.Future[Answer]"])
    """One for each request that waits, so that one who goes away takes nothing from the others; none left: do not
    compute."""

    def settle(self, result: Answer | BaseException) -> None:
        for waiter in self.waiters:
            if waiter.done():
                continue
            if isinstance(result, BaseException):
                waiter.set_exception(result)
            else:
                waiter.set_result(result)


@dataclass(slots=True, eq=False)
class _Running:
    given_s: float
    expected_s: float
    """From the end of the one before."""


class _Stamped(Later[tuple[Sequence[Any], float]]):
    """A later result, and when it was there: the loop may hear of two at once."""

    def __init__(self, later: Later[Sequence[Any]], clock: Callable[[], float]) -> None:
        self._later, self._clock = later, clock

    def ready(self) -> bool:
        return self._later.ready()

    def result(self) -> tuple[Sequence[Any], float]:
        return self._later.result(), self._clock()


@dataclass(slots=True)
class _Queue:
    kind: Kind
    jobs: deque[_Job] = field(default_factory=deque["_Job"])


class Batcher:
    """Owns the queues and feeds the device. Use as an async context manager.

    Callbacks of the loop, no task of its own: a call to an idle device crosses to its thread and back, and waits for
    nothing else (4 KiB and no work, from bytes to bytes: 0.41 -> 0.29 ms).
    """

    def __init__(
        self,
        device: DeviceThread,
        *,
        forward_many: Handler,
        backward_many: Handler,
        max_batch_rows: int = 2048,
        max_queue_rows: int = 65_536,
        max_queue_bytes: int = 256 * 2**20,
        max_running: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`forward_many` and `backward_many` answer calls of one layer: each by its answer, or an error.

        `max_queue_*` bound what waits, not what runs; one call always fits an empty queue. `max_running` batches are
        with the device at once, which makes them one after another.

        `max_batch_rows`: merging saves passes over the weights and costs the pre-activations (see `ExpertHost`).
        Forward and backward of 4 calls, one by one / merged, in ms on one core: D 128, F 128, 8 experts: 4 x 16 rows
        6.7 / 3.3, 4 x 256 19 / 14, 4 x 1024 48 / 48; D 512, F 1024: 4 x 16 107 / 51, 4 x 256 273 / 287.
        """
        self._device = device
        self._handlers: dict[Kind, Handler] = {
            Kind.FORWARD: forward_many,
            Kind.BACKWARD: backward_many,
        }
        self._max_batch_rows = max_batch_rows
        self._max_queue_rows = max_queue_rows
        self._max_queue_bytes = max_queue_bytes
        self._clock = clock
        self._queues: OrderedDict[tuple[int, Kind], _Queue] = OrderedDict()
        self._flights: dict[tuple[object, ...], _Job] = {}
        self._max_running = max_running
        self._running: deque[_Running] = deque()
        self._finished_s = 0.0
        """When the last batch was, by the clock."""
        self._stopped = False
        self._row_times = {kind: RowTime() for kind in Kind}
        self._waiting_rows = dict.fromkeys(Kind, 0.0)
        self.queue_rows = 0
        """Rows waiting now."""
        self.answered_calls = 0
        self.answered_rows = 0
        """Rows of the calls that were answered since the start."""
        self.queue_bytes = 0
        """Bytes of their tensors."""
        self.reserved_bytes = 0
        """Of messages that still come in pieces, wait to be decoded, or are."""
        self._coming_bytes = 0
        """Of those among them that come in pieces."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopped = True
        for job in list(self._flights.values()):
            job.settle(BusyError("this peer is stopping"))
        self._flights.clear()
        self._queues.clear()

    async def forward(self, call: ForwardCall, *, timeout_s: float | None = None) -> ForwardAnswer:
        """The host's answer. Raises what the host answered instead, BusyError (queue full, or longer than `timeout_s`),
        TimeoutError (waited too long to be worth computing)."""
        rows = call.rows
        n_bytes = rows.x_RD.nbytes + rows.experts_per_row_R.nbytes + 2 * rows.expert_index_P.nbytes
        answer = await self._join(Kind.FORWARD, call, rows.x_RD.shape[0], n_bytes, False, timeout_s)
        assert isinstance(answer, ForwardAnswer)
        return answer

    async def backward(self, call: BackwardCall, *, timeout_s: float | None = None) -> BackwardAnswer:
        """As `forward`."""
        n_bytes = call.grad_RD.nbytes + (0 if call.rows is None else call.rows.x_RD.nbytes)
        has_inputs = call.rows is not None
        answer = await self._join(Kind.BACKWARD, call, call.grad_RD.shape[0], n_bytes, has_inputs, timeout_s)
        assert isinstance(answer, BackwardAnswer)
        return answer

    @property
    def expected_wait_s(self) -> float:
        """What a call that came now would wait: the rest of what runs, and every row that waits."""
        wait_s = sum(rows * self._row_times[kind].s_per_row for kind, rows in self._waiting_rows.items())
        for running in self._running:
            wait_s += running.expected_s
        if self._running:  # the first of them has begun: not more than is left of it
            head = self._running[0]
            wait_s -= min(head.expected_s, max(0.0, self._clock() - max(head.given_s, self._finished_s)))
        return wait_s

    def check_room(self, n_bytes: int, n_rows: int = 0, *, timeout_s: float | None = None) -> None:
        """BusyError when a call of this size and deadline would not be admitted."""
        wait_s = self.expected_wait_s
        rows_over = self.queue_rows + n_rows > self._max_queue_rows
        held_bytes = self.queue_bytes + self.reserved_bytes
        bytes_over = held_bytes + n_bytes > self._max_queue_bytes
        if held_bytes and (rows_over or bytes_over):
            raise BusyError(
                f"{self.queue_rows} rows ({held_bytes / 2**20:.1f} MiB) wait, at most {self._max_queue_rows} rows"
                f" and {self._max_queue_bytes / 2**20:.0f} MiB may; this call has {n_rows} rows, {n_bytes} bytes",
                queue_s=wait_s,
            )
        if timeout_s is not None and wait_s > timeout_s:
            raise BusyError(
                f"{self.queue_rows} rows wait, for {wait_s:.3f} s by the pace of late; this call's deadline is in "
                f"{timeout_s:.3f} s",
                queue_s=wait_s,
            )

    @contextmanager
    def reserving(self, n_bytes: int, *, timeout_s: float | None = None, coming: bool = False) -> Generator[None]:
        """Room for a message until it is read, and joins the queue as a call; BusyError as `check_room`.

        `coming`: its sender takes the time it likes. All of those hold at most half of the queue's bytes, so that the
        slowest of them leave room for calls that are there.
        """
        if coming and self._coming_bytes and self._coming_bytes + n_bytes > self._max_queue_bytes // 2:
            raise BusyError(
                f"{self._coming_bytes / 2**20:.1f} MiB are coming in pieces, at most half of "
                f"{self._max_queue_bytes / 2**20:.0f} MiB may; this call has {n_bytes} bytes",
                queue_s=self.expected_wait_s,
            )
        self.check_room(n_bytes, timeout_s=timeout_s)
        self.reserved_bytes += n_bytes
        self._coming_bytes += n_bytes * coming
        try:
            yield
        finally:
            self.reserved_bytes -= n_bytes
            self._coming_bytes -= n_bytes * coming

    async def _join(
        self, kind: Kind, call: Call, n_rows: int, n_bytes: int, has_inputs: bool, timeout_s: float | None
    ) -> Answer:
        now_s = self._clock()
        deadline_s = float("inf") if timeout_s is None else now_s + timeout_s
        # Not the id alone: a message that contradicts another, or brings the inputs the other lacked, is its own call.
        flight_key = (kind, call.call_id, call.trainer, call.step, call.layer, n_rows, has_inputs)
        if self._stopped:
            raise BusyError("this peer is stopping")
        job = self._flights.get(flight_key)
        if job is None or not job.waiters:
            self.check_room(n_bytes, n_rows, timeout_s=timeout_s)
            job = _Job(
                call=call,
                n_rows=n_rows,
                counted_rows=self._row_times[kind].counted_rows(n_rows),
                n_bytes=n_bytes,
                arrived_s=now_s,
                deadline_s=deadline_s,
                flight_key=flight_key,
            )
            self._flights[flight_key] = job
            self._queues.setdefault((call.layer, kind), _Queue(kind)).jobs.append(job)
            self._waiting_rows[kind] += job.counted_rows
            self.queue_rows += n_rows
            self.queue_bytes += n_bytes
        job.deadline_s = max(job.deadline_s, deadline_s)
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        job.waiters.append(waiter)
        self._pump()
        try:
            answer = await waiter
        finally:
            job.waiters.remove(waiter)
        # Each request said how it wants its own answer encoded.
        if answer.encoding is not call.reply_encoding:
            answer = replace(answer, encoding=call.reply_encoding)
        return answer

    def _next_batch(self) -> tuple[Kind, list[_Job]]:
        """Live jobs of the queue whose head is oldest, up to max_batch_rows; empty when nothing waits."""
        while self._queues:
            queue_key = min(self._queues, key=lambda k: self._queues[k].jobs[0].arrived_s)
            queue = self._queues[queue_key]
            batch: list[_Job] = []
            n_rows = 0
            now_s = self._clock()
            while queue.jobs and (not batch or n_rows + queue.jobs[0].n_rows <= self._max_batch_rows):
                job = queue.jobs.popleft()
                self._waiting_rows[queue.kind] -= job.counted_rows
                self.queue_rows -= job.n_rows
                self.queue_bytes -= job.n_bytes
                if not job.waiters or job.deadline_s <= now_s:
                    self._drop(job, now_s)
                else:
                    batch.append(job)
                    n_rows += job.n_rows
            if not queue.jobs:
                del self._queues[queue_key]
            if batch:
                return queue.kind, batch
        return Kind.FORWARD, []

    def _land(self, job: _Job) -> None:
        if self._flights.get(job.flight_key) is job:
            del self._flights[job.flight_key]

    def _drop(self, job: _Job, now_s: float) -> None:
        self._land(job)
        waited_s = now_s - job.arrived_s
        job.settle(TimeoutError(f"the deadline passed after {waited_s:.3f} s in the queue; nothing was computed"))

    def _pump(self) -> None:
        """Give the device the next batches, if it has too few and something waits."""
        while len(self._running) < self._max_running and not self._stopped:
            kind, batch = self._next_batch()
            if not batch:
                return
            given_s = self._clock()
            counted_rows = sum(job.counted_rows for job in batch)
            running = _Running(given_s, counted_rows * self._row_times[kind].s_per_row)
            self._running.append(running)
            work = self._device.submit(self._make, kind, [job.call for job in batch])
            work.add_done_callback(partial(self._finished, kind=kind, batch=batch, running=running))

    def _make(
        self, kind: Kind, calls: Sequence[Call]
    ) -> tuple[Sequence[Any], float] | Later[tuple[Sequence[Any], float]]:
        """On the device's thread."""
        results = self._handlers[kind](calls)
        return _Stamped(results, self._clock) if isinstance(results, Later) else (results, self._clock())

    def _finished(
        self, work: asyncio.Future[tuple[Sequence[Any], float]], *, kind: Kind, batch: list[_Job], running: _Running
    ) -> None:
        self._running.remove(running)
        started_s = max(running.given_s, self._finished_s)  # it had to wait for the one before it
        compute_us = 0
        if work.cancelled():
            results: Sequence[Any] = [BusyError("this peer is stopping")] * len(batch)
        elif (error := work.exception()) is not None:
            # A bug of ours; it goes to those who asked and the queue goes on.
            results = [error] * len(batch)
        else:
            results, self._finished_s = work.result()
            took_s = self._finished_s - started_s
            compute_us = _microseconds(took_s)
            self._row_times[kind].note(sum(job.n_rows for job in batch), took_s)
        for job, result in zip(batch, results, strict=True):
            self._land(job)
            if not isinstance(result, BaseException):
                queue_us = _microseconds(started_s - job.arrived_s)
                result = replace(cast(Answer, result), queue_us=queue_us, compute_us=compute_us)
                self.answered_calls += 1
                self.answered_rows += job.n_rows
            job.settle(result)
        self._pump()


def _microseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e6))
