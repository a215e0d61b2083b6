"""Order, bounds and endings of micro-batches in flight; their arithmetic is compared in tests/numerics."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from moe_net.errors import DivergedError, NoLiveExpertsError
from moe_net.rpc.portal import Portal
from moe_peer.pipeline import Pipeline

TIMEOUT_S = 20.0


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    with Portal() as portal, Pipeline(portal) as made:
        yield made


class Meeting:
    """A wait that ends when `n` are in it at once."""

    def __init__(self, n: int) -> None:
        self._n = n
        self.waiting = self.most = 0
        self._all = asyncio.Event()

    async def wait(self) -> None:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        if self.waiting >= self._n:
            self._all.set()
        async with asyncio.timeout(TIMEOUT_S):
            await self._all.wait()
        self.waiting -= 1


@pytest.mark.parametrize("n", [2, 64])
def test_waits_of_different_micro_batches_overlap(pipeline: Pipeline, n: int) -> None:
    meeting, taken = Meeting(n), list[int]()

    def work(i: int) -> int:
        pipeline.run(meeting.wait())
        return i

    pipeline.each(work, taken.append, n=n, in_flight=n)
    assert meeting.most == n
    assert taken == list(range(n))


def test_only_one_computes_at_any_moment(pipeline: Pipeline) -> None:
    inside, most = 0, 0

    def compute() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        for _ in range(200):
            threading.Event().wait(0)  # every one a chance for another thread
        inside -= 1

    def work(i: int) -> int:
        for _ in range(3):
            compute()
            pipeline.run(asyncio.sleep(0))
        compute()
        return i

    pipeline.each(work, lambda _: compute(), n=12, in_flight=4)
    assert most == 1


def test_results_are_taken_in_order_whatever_order_they_come_in(pipeline: Pipeline) -> None:
    """Each of the first three waits for the one after it."""
    done = [asyncio.Event() for _ in range(4)]
    finished, taken = list[int](), list[int]()

    async def after_the_next(i: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await done[i + 1].wait()

    async def tell(i: int) -> None:
        done[i].set()

    def work(i: int) -> int:
        if i < 3:
            pipeline.run(after_the_next(i))
        finished.append(i)
        pipeline.run(tell(i))
        return i

    pipeline.each(work, taken.append, n=4, in_flight=4)
    assert finished == [3, 2, 1, 0]
    assert taken == [0, 1, 2, 3]


def test_results_that_wait_for_an_older_one_are_bounded(pipeline: Pipeline) -> None:
    """The oldest stays away until all others have begun, or for 0.3 s: as if they never did."""
    begun, taken = list[int](), list[int]()
    all_begun = asyncio.Event()
    begun_by_then = 0

    async def stay_away() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await all_begun.wait()

    async def tell() -> None:
        all_begun.set()

    def work(i: int) -> int:
        nonlocal begun_by_then
        begun.append(i)
        if len(begun) == 40:
            pipeline.submit(tell())
        if i == 0:
            pipeline.run(stay_away())
            begun_by_then = len(begun)
        return i

    pipeline.each(work, taken.append, n=40, in_flight=4)
    assert 4 <= begun_by_then <= 8
    assert taken == list(range(40))


@pytest.mark.parametrize("in_flight", [1, 4])
def test_experts_lost_before_any_gradient_left_are_raised_and_nothing_is_taken(
    pipeline: Pipeline, in_flight: int
) -> None:
    forever, taken = asyncio.Event(), list[int]()

    def work(i: int) -> int:
        if i == 0 and in_flight == 1:
            raise NoLiveExpertsError("gone")
        if i == 2:
            raise NoLiveExpertsError("gone")
        pipeline.run(forever.wait())
        return i

    with pytest.raises(NoLiveExpertsError):
        pipeline.each(work, taken.append, n=4, in_flight=in_flight)
    assert taken == []
    pipeline.each(lambda i: i, taken.append, n=4, in_flight=in_flight)
    assert taken == [0, 1, 2, 3]


def test_experts_lost_later_leave_those_that_were_sending_gradients(pipeline: Pipeline) -> None:
    """0 and 3 have passed return when 2 fails; 1 has not, and its wait is cancelled."""
    meeting, forever, taken = Meeting(2), asyncio.Event(), list[int]()
    lost = threading.Event()

    async def until_lost() -> None:
        assert await asyncio.to_thread(lost.wait, TIMEOUT_S)

    def work(i: int) -> int:
        if i == 1:
            pipeline.run(forever.wait())
        elif i == 2:
            pipeline.run(meeting.wait())
            lost.set()
            raise NoLiveExpertsError("gone")
        else:
            pipeline.pass_return()
            if i == 3:
                pipeline.run(meeting.wait())
            pipeline.run(until_lost())
        return i

    pipeline.each(work, taken.append, n=9, in_flight=4)
    assert taken == [0, 3]


def test_any_other_error_cancels_all_waits_and_is_raised(pipeline: Pipeline) -> None:
    forever, everybody, taken = asyncio.Event(), Meeting(4), list[int]()

    def work(i: int) -> int:
        pipeline.run(everybody.wait())
        pipeline.pass_return()
        if i == 2:
            raise DivergedError("not finite")
        pipeline.run(forever.wait())
        return i

    with pytest.raises(DivergedError):
        pipeline.each(work, taken.append, n=8, in_flight=4)
    assert taken == []


def test_an_error_of_the_taker_is_raised(pipeline: Pipeline) -> None:
    def take(i: int) -> None:
        raise ValueError(f"no {i}")

    with pytest.raises(ValueError, match="no 0"):
        pipeline.each(lambda i: i, take, n=4, in_flight=2)


def test_an_interrupt_ends_the_step(pipeline: Pipeline) -> None:
    forever, taken = asyncio.Event(), list[int]()

    async def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        await forever.wait()

    def work(i: int) -> int:
        pipeline.run(interrupt() if i == 3 else forever.wait())
        return i

    with pytest.raises(KeyboardInterrupt):
        pipeline.each(work, taken.append, n=4, in_flight=4)
    assert taken == []


def test_its_threads_are_used_again_and_end_with_it() -> None:
    with Portal() as portal:
        before = threading.active_count()
        with Pipeline(portal) as pipeline:
            names = set[str]()

            def work(i: int) -> int:
                names.add(threading.current_thread().name)
                pipeline.run(asyncio.sleep(0))
                return i

            for _ in range(5):
                pipeline.each(work, lambda _: None, n=8, in_flight=3)
            assert len(names) <= 3
        assert threading.active_count() == before
