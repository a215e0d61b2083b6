"""What runs together, in which order, what is refused and what is dropped. The device is real, its work is gated."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_net.errors import BusyError, MoeNetError, WireError
from moe_net.types import Encoding
from moe_net.wire.messages import BackwardAnswer, BackwardCall, ForwardAnswer, ForwardCall, RoutedRows
from moe_peer.batcher import LARGEST_SURPRISE, Batcher, Kind, RowTime
from moe_peer.device import DeviceThread, Later

NUMBERS = itertools.count()
WIDTH = 2


class Work:
    """Handlers that record what ran; while `gate` is cleared, the device stands still in whatever it began."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)
        self.batches: list[tuple[str, int, list[int]]] = []
        self.refuse: dict[int, MoeNetError] = {}
        self.bug: Exception | None = None

    def _run(self, kind: str, calls: Sequence[ForwardCall | BackwardCall]) -> None:
        self.batches.append((kind, calls[0].layer, [call.step for call in calls]))
        self.begun.release()
        assert self.gate.wait(60)
        if self.bug is not None:
            raise self.bug

    def forward_many(self, calls: Sequence[ForwardCall]) -> list[ForwardAnswer | MoeNetError]:
        self._run("forward", calls)
        return [self.refuse.get(c.step) or ForwardAnswer(y_RD=c.rows.x_RD, encoding=c.reply_encoding) for c in calls]

    def backward_many(self, calls: Sequence[BackwardCall]) -> list[BackwardAnswer | MoeNetError]:
        self._run("backward", calls)
        return [BackwardAnswer(dx_RD=c.grad_RD, gate_grad_P=torch.zeros(0)) for c in calls]


class Made(Later[Any]):
    """What a GPU has been asked for, until `done`."""

    def __init__(self, answers: Sequence[Any]) -> None:
        self.answers = answers
        self.done = threading.Event()

    def ready(self) -> bool:
        return self.done.is_set()

    def result(self) -> Sequence[Any]:
        assert self.done.wait(60)
        return self.answers


class WorkOfAGpu(Work):
    """Is given batches at once, and makes them when told."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Made] = []

    def forward_many(self, calls: Sequence[ForwardCall]) -> Any:
        made = Made(())
        self.made.append(made)  # first: who hears that it has begun looks for it here
        made.answers = super().forward_many(calls)
        return made


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        # Every look is later than the one before, so that "oldest" is never a tie.
        self.now_s += 1e-6
        return self.now_s


@asynccontextmanager
async def batching(
    work: Work,
    clock: Clock | None = None,
    *,
    batch_rows: int = 100,
    queue_rows: int = 1000,
    queue_bytes: int = 1 << 20,
    max_running: int = 1,
) -> AsyncIterator[Batcher]:
    async with (
        DeviceThread("test-device") as device,
        Batcher(
            device,
            forward_many=work.forward_many,
            backward_many=work.backward_many,
            max_batch_rows=batch_rows,
            max_queue_rows=queue_rows,
            max_queue_bytes=queue_bytes,
            max_running=max_running,
            clock=clock or Clock(),
        ) as batcher,
    ):
        try:
            yield batcher
        finally:
            work.gate.set()
            for made in work.made if isinstance(work, WorkOfAGpu) else ():
                made.done.set()


def forward_call(number: int, *, layer: int = 0, n_rows: int = 1, call_id: bytes | None = None) -> ForwardCall:
    rows = RoutedRows(
        x_RD=torch.full((n_rows, WIDTH), float(number)),
        experts_per_row_R=torch.ones(n_rows, dtype=torch.int32),
        expert_index_P=torch.zeros(n_rows, dtype=torch.int32),
        gate_P=torch.ones(n_rows),
    )
    call_id = call_id or next(NUMBERS).to_bytes(16, "big")
    return ForwardCall(call_id=call_id, trainer="t", step=number, layer=layer, rows=rows)


def backward_call(number: int, *, layer: int = 0) -> BackwardCall:
    call_id = next(NUMBERS).to_bytes(16, "big")
    return BackwardCall(call_id=call_id, trainer="t", step=number, layer=layer, grad_RD=torch.zeros(1, WIDTH))


async def begun(work: Work) -> None:
    """The device has entered its next batch."""
    assert await asyncio.to_thread(work.begun.acquire, timeout=60)


async def queued(batcher: Batcher, n_rows: int) -> None:
    """The tasks made so far have run up to their waiting: each needs one turn of the loop."""
    await asyncio.sleep(0)
    assert batcher.queue_rows == n_rows


async def test_calls_that_arrive_while_the_device_works_run_together_by_layer_and_kind() -> None:
    work = Work()
    work.gate.clear()
    async with batching(work) as batcher, asyncio.TaskGroup() as group:
        tasks = [group.create_task(batcher.forward(forward_call(0)))]
        await begun(work)
        for number, layer in [(1, 0), (2, 1), (3, 0), (4, 1)]:
            tasks.append(group.create_task(batcher.forward(forward_call(number, layer=layer))))
        others = [group.create_task(batcher.backward(backward_call(number))) for number in (5, 6)]
        await queued(batcher, 6)
        work.gate.set()
        answers = [await task for task in tasks]
        await asyncio.gather(*others)
    assert work.batches == [
        ("forward", 0, [0]),
        ("forward", 0, [1, 3]),
        ("forward", 1, [2, 4]),
        ("backward", 0, [5, 6]),
    ]
    assert [float(answer.y_RD[0, 0]) for answer in answers] == [0, 1, 2, 3, 4], "everybody gets their own rows"


async def test_an_idle_device_starts_at_once_on_a_single_call() -> None:
    work = Work()
    async with batching(work) as batcher:
        for number in range(3):
            await batcher.forward(forward_call(number))
    assert [steps for _, _, steps in work.batches] == [[0], [1], [2]]


async def test_a_batch_stops_at_its_rows_and_one_larger_call_runs_alone() -> None:
    work = Work()
    work.gate.clear()
    async with batching(work, batch_rows=10) as batcher, asyncio.TaskGroup() as group:
        group.create_task(batcher.forward(forward_call(0)))
        await begun(work)
        for number, n_rows in enumerate([4, 6, 1, 30, 2], start=1):
            group.create_task(batcher.forward(forward_call(number, n_rows=n_rows)))
        await queued(batcher, 43)
        work.gate.set()
    assert [steps for _, _, steps in work.batches] == [[0], [1, 2], [3], [4], [5]]


async def test_the_layer_whose_call_is_oldest_goes_first_however_busy_another_is() -> None:
    work = Work()
    work.gate.clear()
    async with batching(work, batch_rows=2) as batcher, asyncio.TaskGroup() as group:
        group.create_task(batcher.forward(forward_call(0)))
        await begun(work)
        for number, layer in enumerate([0, 0, 1, 0, 0, 0, 0], start=1):
            group.create_task(batcher.forward(forward_call(number, layer=layer)))
        await queued(batcher, 7)
        work.gate.set()
    assert [steps for _, _, steps in work.batches] == [[0], [1, 2], [3], [4, 5], [6, 7]]


@pytest.mark.parametrize("limit", ["rows", "bytes"])
async def test_a_full_queue_refuses_and_says_how_much_waits(limit: str) -> None:
    work = Work()
    work.gate.clear()
    queue_rows, queue_bytes = (8, 1 << 20) if limit == "rows" else (1000, 8 * (4 * WIDTH + 4 + 8))
    async with (
        batching(work, queue_rows=queue_rows, queue_bytes=queue_bytes) as batcher,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(batcher.forward(forward_call(0, n_rows=50)))
        await begun(work)
        group.create_task(batcher.forward(forward_call(1, n_rows=6)))
        await queued(batcher, 6)
        with pytest.raises(BusyError, match=r"6 rows .* wait"):
            await batcher.forward(forward_call(2, n_rows=3))
        group.create_task(batcher.forward(forward_call(3, n_rows=2)))
        await queued(batcher, 8)
        work.gate.set()
    assert (batcher.queue_rows, batcher.queue_bytes) == (0, 0)
    assert [steps for _, _, steps in work.batches] == [[0], [1, 3]]


async def paced(work: Work, clock: Clock, batcher: Batcher, s_per_row: float) -> None:
    """One batch of ten rows that took that long for each."""
    work.gate.clear()
    running = asyncio.create_task(batcher.forward(forward_call(0, n_rows=10)))
    await begun(work)
    clock.now_s += 10 * s_per_row
    work.gate.set()
    await running
    work.gate.clear()


async def test_a_call_that_would_wait_past_its_deadline_is_refused_at_once_and_told_the_wait() -> None:
    work, clock = Work(), Clock()
    async with batching(work, clock) as batcher, asyncio.TaskGroup() as group:
        await paced(work, clock, batcher, 0.1)
        assert batcher.expected_wait_s == 0
        group.create_task(batcher.forward(forward_call(1, n_rows=20), timeout_s=0.5))  # nothing waits: taken
        await begun(work)
        assert batcher.expected_wait_s == pytest.approx(2, rel=1e-3)
        group.create_task(batcher.forward(forward_call(2, n_rows=30), timeout_s=2.5))
        await queued(batcher, 30)
        assert batcher.expected_wait_s == pytest.approx(5, rel=1e-3)
        with pytest.raises(BusyError, match="30 rows wait, for 5") as caught:
            await batcher.forward(forward_call(3), timeout_s=4.9)
        assert caught.value.queue_s == pytest.approx(5, rel=1e-3)
        group.create_task(batcher.forward(forward_call(4), timeout_s=5.1))
        group.create_task(batcher.forward(forward_call(5)))
        await queued(batcher, 32)
        # As what runs gets done, there is room for less patient ones; what runs too long counts as nearly done.
        clock.now_s += 1
        assert batcher.expected_wait_s == pytest.approx(1 + 3.2, rel=1e-3)
        clock.now_s += 0.3
        work.gate.set()
    assert (batcher.queue_rows, batcher.expected_wait_s) == (0, 0)
    assert [steps for _, _, steps in work.batches] == [[0], [1], [2, 4, 5]], "in the order of arrival"


async def test_a_refusal_for_room_says_the_wait_as_well() -> None:
    work, clock = Work(), Clock()
    async with batching(work, clock, queue_rows=5) as batcher, asyncio.TaskGroup() as group:
        await paced(work, clock, batcher, 0.1)
        group.create_task(batcher.forward(forward_call(1)))
        await begun(work)
        group.create_task(batcher.forward(forward_call(2, n_rows=4)))
        await queued(batcher, 4)
        with pytest.raises(BusyError, match="at most 5 rows") as caught:
            await batcher.forward(forward_call(3, n_rows=2))
        assert caught.value.queue_s == pytest.approx(0.5, rel=1e-2)
        work.gate.set()


async def test_forward_and_backward_have_their_own_pace_and_nothing_is_refused_on_a_guess() -> None:
    work, clock = Work(), Clock()
    async with batching(work, clock) as batcher, asyncio.TaskGroup() as group:
        await paced(work, clock, batcher, 0.1)
        group.create_task(batcher.backward(backward_call(1), timeout_s=1))
        await begun(work)
        group.create_task(batcher.backward(backward_call(2), timeout_s=1e-2))
        await queued(batcher, 1)
        assert batcher.expected_wait_s == 0, "no backward has been seen"
        group.create_task(batcher.forward(forward_call(3), timeout_s=1e-2))
        await queued(batcher, 2)
        assert batcher.expected_wait_s == pytest.approx(0.1, rel=1e-3)
        work.gate.set()


async def test_an_equal_call_in_flight_is_joined_however_long_the_queue_is() -> None:
    work, clock = Work(), Clock()
    async with batching(work, clock) as batcher, asyncio.TaskGroup() as group:
        await paced(work, clock, batcher, 0.1)
        group.create_task(batcher.forward(forward_call(1, n_rows=50)))
        await begun(work)
        call = forward_call(2)
        group.create_task(batcher.forward(call))
        await queued(batcher, 1)
        again = group.create_task(batcher.forward(call, timeout_s=0.001))
        await queued(batcher, 1)
        work.gate.set()
        assert (await again).y_RD is call.rows.x_RD


def test_one_batch_that_stood_still_is_not_believed_and_a_slower_machine_is() -> None:
    pace = RowTime()
    pace.note(100, 1.0)
    assert pace.s_per_row == pytest.approx(0.01)
    pace.note(100, 20.0)
    assert pace.s_per_row <= 0.01 * (1 + 0.2 * (LARGEST_SURPRISE - 1)) + 1e-9
    for _ in range(10):
        pace.note(100, 1.0)
    assert pace.s_per_row < 0.0115
    for _ in range(15):
        pace.note(100, 10.0)
    assert pace.s_per_row > 0.08
    pace = RowTime()
    pace.note(1000, 1.0)
    pace.note(1, 0.1)
    assert pace.s_per_row < 0.0013, "a batch of one row says little of a full one"


def test_a_first_batch_too_fast_for_the_clock_sets_no_pace() -> None:
    pace = RowTime()
    pace.note(3, 0.0)
    pace.note(3, 0.3)
    assert pace.s_per_row == pytest.approx(0.1)


async def test_a_call_larger_than_the_queue_is_taken_when_nothing_waits() -> None:
    work = Work()
    async with batching(work, queue_rows=5) as batcher:
        assert (await batcher.forward(forward_call(0, n_rows=9))).y_RD.shape[0] == 9


async def test_calls_whose_deadline_passed_or_whose_caller_left_are_not_computed() -> None:
    work, clock = Work(), Clock()
    work.gate.clear()
    async with batching(work, clock) as batcher, asyncio.TaskGroup() as group:
        group.create_task(batcher.forward(forward_call(0)))
        await begun(work)
        late = asyncio.create_task(batcher.forward(forward_call(1), timeout_s=5))
        left = asyncio.create_task(batcher.forward(forward_call(2)))
        patient = group.create_task(batcher.forward(forward_call(3), timeout_s=50))
        await queued(batcher, 3)
        left.cancel()
        clock.now_s += 10
        work.gate.set()
        with pytest.raises(TimeoutError, match="nothing was computed"):
            await late
        assert (await patient).queue_us >= 10_000_000
        assert left.cancelled()
    assert [steps for _, _, steps in work.batches] == [[0], [3]]


async def test_equal_calls_in_flight_share_one_result_and_outlive_the_one_who_left() -> None:
    work = Work()
    work.gate.clear()
    async with batching(work) as batcher, asyncio.TaskGroup() as group:
        call = forward_call(0)
        first = asyncio.create_task(batcher.forward(call))
        await begun(work)
        second = group.create_task(batcher.forward(call))
        other = forward_call(0, n_rows=2, call_id=call.call_id)
        contradicts = group.create_task(batcher.forward(other))
        await queued(batcher, 2)
        first.cancel()
        work.gate.set()
        assert (await second).y_RD is call.rows.x_RD
        assert (await contradicts).y_RD is other.rows.x_RD
        again = await batcher.forward(call)
        assert again.y_RD is call.rows.x_RD
    assert len(work.batches) == 3, "shared while in flight, not afterwards"
    assert first.cancelled()


async def test_each_of_those_who_share_gets_the_encoding_it_asked_for() -> None:
    work = Work()
    work.gate.clear()
    async with batching(work) as batcher, asyncio.TaskGroup() as group:
        call_id = b"c" * 16
        wanted = [Encoding.FP32, Encoding.INT8]
        calls = [replace(forward_call(0, call_id=call_id), reply_encoding=encoding) for encoding in wanted]
        tasks = [group.create_task(batcher.forward(call)) for call in calls]
        await begun(work)
        work.gate.set()
        assert [(await task).encoding for task in tasks] == wanted
    assert len(work.batches) == 1


async def test_refusals_reach_their_own_call_only_and_a_bug_reaches_its_batch_only() -> None:
    work = Work()
    async with batching(work) as batcher:
        work.refuse[1] = WireError("bad")
        results = await asyncio.gather(
            *(batcher.forward(forward_call(number)) for number in range(3)), return_exceptions=True
        )
        assert [type(result) for result in results] == [ForwardAnswer, WireError, ForwardAnswer]
        work.bug = ZeroDivisionError("ours")
        with pytest.raises(ZeroDivisionError):
            await batcher.forward(forward_call(7))
        work.bug = None
        assert isinstance(await batcher.forward(forward_call(8)), ForwardAnswer)


async def test_stopping_answers_those_who_wait() -> None:
    work = Work()
    work.gate.clear()
    async with batching(work) as batcher:
        running = asyncio.create_task(batcher.forward(forward_call(0)))
        await begun(work)
        waiting = asyncio.create_task(batcher.forward(forward_call(1)))
        await queued(batcher, 1)
    for task in (running, waiting):
        with pytest.raises(BusyError, match="stopping"):
            await task


def test_a_call_far_larger_than_any_before_is_not_refused_by_the_pace_of_small_ones() -> None:
    pace = RowTime()
    for _ in range(20):
        pace.note(5, 0.01)
    assert pace.s_per_row * pace.counted_rows(50_000) == pytest.approx(0.08)
    pace.note(50_000, 0.5)
    assert pace.counted_rows(50_000) == 50_000
    assert 0.1 < pace.s_per_row * pace.counted_rows(50_000) < 5.0


async def test_a_gpu_has_the_next_batch_before_it_has_done_one_and_the_third_gathers() -> None:
    work = WorkOfAGpu()
    async with batching(work, max_running=2) as batcher, asyncio.TaskGroup() as group:
        tasks = [group.create_task(batcher.forward(forward_call(number, layer=number))) for number in (0, 1)]
        await begun(work)
        await begun(work)
        tasks += [group.create_task(batcher.forward(forward_call(number, layer=2))) for number in (2, 3)]
        await queued(batcher, 2)
        assert not any(task.done() for task in tasks)
        work.made[0].done.set()
        await tasks[0]
        await begun(work)
        work.made[1].done.set()
        work.made[2].done.set()
    assert work.batches == [("forward", 0, [0]), ("forward", 1, [1]), ("forward", 2, [2, 3])]
    assert [float(task.result().y_RD[0, 0]) for task in tasks] == [0, 1, 2, 3]


async def test_what_waits_behind_another_batch_on_a_gpu_is_queueing_not_computing() -> None:
    work, clock = WorkOfAGpu(), Clock()
    async with batching(work, clock, max_running=2) as batcher:
        first, second = (asyncio.create_task(batcher.forward(forward_call(n, layer=n))) for n in (0, 1))
        await begun(work)
        await begun(work)
        clock.now_s += 3.0
        work.made[0].done.set()
        await first
        clock.now_s += 0.5
        work.made[1].done.set()
        answer = await second
        assert (await first).compute_us == pytest.approx(3_000_000, abs=100)
        assert answer.queue_us == pytest.approx(3_000_000, abs=100)
        assert answer.compute_us == pytest.approx(500_000, abs=100)
        # By that pace, of one row each: 3 s, then a fifth of the way to 0.5 s.
        third, fourth = (asyncio.create_task(batcher.forward(forward_call(n, layer=n))) for n in (2, 3))
        await begun(work)
        await begun(work)
        assert batcher.expected_wait_s == pytest.approx(2 * 2.5, abs=0.01)
        work.made[2].done.set()
        work.made[3].done.set()
        await asyncio.gather(third, fourth)


async def test_batches_that_end_early_leave_no_wait_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    work, clock = WorkOfAGpu(), Clock()
    monkeypatch.setattr(RowTime, "s_per_row", 1.0)  # whatever was seen
    async with batching(work, clock, max_running=2) as batcher:
        batcher._row_times[Kind.FORWARD].largest_rows = 1.0
        tasks = [asyncio.create_task(batcher.forward(forward_call(n, layer=n))) for n in range(2)]
        for number in range(20):  # never idle, each done at once
            await begun(work)
            tasks.append(asyncio.create_task(batcher.forward(forward_call(number + 2, layer=number + 2))))
            await asyncio.sleep(0)
            work.made[number].done.set()
            await tasks[number]
        await begun(work)
        await begun(work)
        assert len(batcher._running) == 2
        assert batcher.expected_wait_s == pytest.approx(2.0, abs=0.01)
        clock.now_s += 1.5
        assert batcher.expected_wait_s == pytest.approx(1.0, abs=0.01), "the first overruns, the second has not begun"
        for made in work.made:
            made.done.set()
        await asyncio.gather(*tasks)
