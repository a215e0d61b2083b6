# pyright: basic
"""What the contestants of wire.py share: sizes as tensors, one timing loop, one way to be a process."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import torch
import uvloop
from _processes import die_with_parent, serve_requests
from torch import Tensor

from moe_net.garbage import tune_collector
from moe_net.wire.allocator import tune_allocator

D_MODEL = 512
ROUND_TRIP_TIMEOUT_S = 60.0

LOST = -1
"""What a round trip returns when no reply came, and no error either."""

RoundTrip = Callable[[Tensor], Awaitable[int]]
"""Sends x [R, D] fp32, waits for it to come back as bytes or a tensor, returns how many payload bytes came back."""


def prepare_process() -> None:
    """Same in every process of every contestant: one torch thread, our allocator settings, ends with its parent."""
    die_with_parent()
    tune_allocator()
    tune_collector()
    torch.set_num_threads(1)


def rows_of(payload_bytes: int) -> Tensor:
    """Random fp32 [R, D] of that many bytes."""
    x_RD = torch.randn(payload_bytes // (4 * D_MODEL), D_MODEL, generator=torch.Generator().manual_seed(0))
    assert x_RD.nbytes == payload_bytes
    return x_RD


async def time_trips(round_trip: RoundTrip, payload_bytes: int, at_least_s: float) -> tuple[list[float], int]:
    """(seconds of each round trip after two that are not counted, how many were lost)."""
    x_RD = rows_of(payload_bytes)
    taken_s: list[float] = []
    n_lost = 0
    for _ in range(2):
        await round_trip(x_RD)
    while not taken_s or (sum(taken_s) < at_least_s and len(taken_s) < 2000):
        start_s = time.perf_counter()
        returned_bytes = await round_trip(x_RD)
        if returned_bytes == LOST:
            n_lost += 1
            continue
        taken_s.append(time.perf_counter() - start_s)
        assert returned_bytes == payload_bytes
    return taken_s, n_lost


def client_main(
    connect: Callable[[], Awaitable[Mapping[str, RoundTrip]]], more: Mapping[str, Callable[..., dict[str, Any]]]
) -> None:
    """Main of a client: connect, then measure what stdin asks for until it closes."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        trips = runner.run(_await(connect()))

        def measure(kind: str, payload_bytes: int, at_least_s: float) -> dict[str, Any]:
            taken_s, n_lost = runner.run(time_trips(trips[kind], payload_bytes, at_least_s))
            return {"seconds": taken_s, "lost": n_lost}

        serve_requests({"trips": measure, **more})


async def _await(work: Awaitable[Any]) -> Any:
    return await work


def run_side(
    serve: Callable[[], Awaitable[None]],
    connect: Callable[[str], Awaitable[Mapping[str, RoundTrip]]],
    more: Mapping[str, Callable[..., dict[str, Any]]] | None = None,
) -> None:
    """Be the server (argument `server`) or the client (`client ADDRESS`), which also answers `more` requests."""
    prepare_process()
    if sys.argv[1] == "server":
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_await(serve()))
    else:
        client_main(lambda: connect(sys.argv[2]), more or {})
