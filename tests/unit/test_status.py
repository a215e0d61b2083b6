"""What a peer says of itself now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from moe_peer.status import Served, describe_served, say_what_is_served

START = Served(0, 0, {1: {0: 5, 2: 5}})


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (START, None),
        (Served(3, 40, {1: {0: 5, 2: 5}}), "in 30 s: 3 calls, 40 rows, 0 steps; the experts are at step 5"),
        (Served(3, 40, {1: {0: 9, 2: 7}}), "in 30 s: 3 calls, 40 rows, 4 steps; the experts are at step 7..9"),
        # Taken over from another replica: no call was answered, and there is something to say.
        (Served(0, 0, {1: {0: 8, 2: 8}}), "in 30 s: 0 calls, 0 rows, 3 steps; the experts are at step 8"),
    ],
)
def test_a_line_says_what_happened_and_nothing_when_nothing_did(now: Served, line: str | None) -> None:
    assert describe_served(START, now, 30.0) == line


async def test_an_idle_peer_is_silent_and_a_busy_one_says_a_line_each_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    over = asyncio.Event()

    def counts() -> Iterator[Served]:
        for calls in (0, 0, 0, 7, 7, 9):
            yield Served(calls, calls, {1: {0: 0}})
        over.set()
        while True:
            yield Served(9, 9, {1: {0: 0}})

    saying = asyncio.create_task(say_what_is_served(counts().__next__, every_s=0.001))
    await asyncio.wait_for(over.wait(), 10)
    saying.cancel()
    await asyncio.wait([saying])
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "7 calls, 7 rows, 0 steps; the experts are at step 0",
        "2 calls, 2 rows, 0 steps; the experts are at step 0",
    ]
