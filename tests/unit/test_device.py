"""The thread that all tensors are worked on: order, errors, callers that leave, results that come later."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from moe_peer.device import DeviceThread, Later


class Number(Later[int]):
    """Comes when told; a negative one is an error, which may show as soon as somebody looks."""

    def __init__(self, value: int, *, fails_at_a_look: bool = False) -> None:
        self.value, self.fails_at_a_look = value, fails_at_a_look
        self.done = threading.Event()

    def ready(self) -> bool:
        if self.fails_at_a_look:
            raise RuntimeError("the GPU is gone")
        return self.done.is_set()

    def result(self) -> int:
        assert self.fails_at_a_look or self.done.wait(60)
        if self.value < 0:
            raise RuntimeError(f"number {self.value}")
        return self.value


async def test_the_device_runs_one_thing_at_a_time_on_one_thread_in_order() -> None:
    seen: list[tuple[int, int]] = []
    async with DeviceThread("test-device") as device:
        await asyncio.gather(*(device.run(lambda n: seen.append((n, threading.get_ident())), n) for n in range(20)))
        with pytest.raises(KeyError, match="no such"):
            await device.run({}.__getitem__, "no such")
    assert [number for number, _ in seen] == list(range(20))
    assert len({thread for _, thread in seen} | {threading.get_ident()}) == 2
    with pytest.raises(RuntimeError):
        device.submit(print)


async def test_work_whose_caller_left_is_run_whole_or_not_at_all() -> None:
    gate, entered, done = threading.Event(), threading.Event(), list[str]()

    def work(name: str) -> None:
        entered.set()
        assert gate.wait(60)
        done.append(name)

    async with DeviceThread("test-device") as device:
        running = asyncio.create_task(device.run(work, "running"))
        assert await asyncio.to_thread(entered.wait, 60)
        waiting = asyncio.create_task(device.run(work, "waiting"))
        await asyncio.sleep(0)
        running.cancel()
        waiting.cancel()
        await asyncio.wait([running, waiting])
        gate.set()
        await device.run(work, "later")
    assert done == ["running", "later"]


async def test_the_thread_goes_on_while_a_result_is_made_elsewhere() -> None:
    numbers = [Number(0), Number(1), Number(-2)]
    async with DeviceThread("test-device") as device:
        futures = [device.submit(lambda number=number: number) for number in numbers]
        assert await device.run(lambda: "meanwhile") == "meanwhile"
        numbers[1].done.set()
        assert await device.run(lambda: "still") == "still"
        assert not any(future.done() for future in futures), "in their order"
        numbers[0].done.set()
        assert [await future for future in futures[:2]] == [0, 1]
        numbers[2].done.set()
        with pytest.raises(RuntimeError, match="number -2"):
            await futures[2]


async def test_an_error_that_shows_at_a_look_belongs_to_its_caller() -> None:
    async with DeviceThread("test-device") as device:
        with pytest.raises(RuntimeError, match="number -1"):
            await device.run(lambda: Number(-1, fails_at_a_look=True))
        assert await device.run(lambda: 3) == 3


async def test_the_end_waits_for_what_has_begun() -> None:
    number, entered = Number(7), threading.Event()
    device = DeviceThread("test-device")

    def begin() -> Later[int]:
        entered.set()
        return number

    future = device.submit(begin)
    assert await asyncio.to_thread(entered.wait, 60)
    closing = asyncio.create_task(device.close())
    await asyncio.sleep(0)
    assert not closing.done()
    number.done.set()
    await closing
    assert await future == 7


async def test_what_work_that_failed_was_given_goes_with_its_error() -> None:
    class Message:
        pass

    def fails(_: Message) -> None:
        raise ValueError("malformed")

    message = Message()
    gone = weakref.ref(message)
    gc.disable()
    try:
        async with DeviceThread("test-device") as device:
            with pytest.raises(ValueError, match="malformed"):
                await device.run(fails, message)
            del message
            await device.run(lambda: None)  # the thread has let go of it
            assert gone() is None
    finally:
        gc.enable()
