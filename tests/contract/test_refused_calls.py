"""A server that refuses calls keeps nothing of them: not even until Python's collector comes, which looks rarely."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from expert_calls import D, forward_call, serving

from moe_net.errors import BusyError
from moe_net.rpc.base import CallError
from moe_net.wire.messages import ForwardCall
from moe_peer.server import ExpertServer

N_ROWS, N_CALLS = 20_000, 10
MESSAGE_BYTES = N_ROWS * D * 4


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.enable()


def matrices() -> int:
    """Matrices of a call's size that are alive, wherever they are."""
    return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor and tuple(o.shape) == (N_ROWS, D))


def full(server: ExpertServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def forward(call: ForwardCall, *, timeout_s: float | None) -> None:
        raise BusyError(f"no room for {call.rows.x_RD.shape[0]} rows")

    monkeypatch.setattr(server._batcher, "forward", forward)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("reason", ["a full queue", "an unknown layer", "a bug of ours"])
async def test_a_refused_call_leaves_neither_its_rows_nor_its_message(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    call = forward_call(n_rows=N_ROWS)
    async with serving() as (server, client):
        if reason == "a full queue":
            full(server, monkeypatch)
        elif reason == "a bug of ours":
            monkeypatch.setattr(server._batcher, "forward", None)
            monkeypatch.setattr("moe_peer.server.log.disabled", True)  # pytest keeps what is logged
        else:
            call = replace(call, layer=9)

        async def refused() -> None:
            with pytest.raises(CallError):
                await client.transport.forward(client.peer, call, timeout_s=20.0)

        await refused()
        before, before_bytes = matrices(), tracemalloc.get_traced_memory()[0]
        for _ in range(N_CALLS):
            await refused()
        assert matrices() == before
        assert tracemalloc.get_traced_memory()[0] - before_bytes < 2 * MESSAGE_BYTES
