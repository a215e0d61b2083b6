"""Members call each other directly, whatever proxy for the web the environment names."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from expert_calls import forward_call, serving

from moe_coordinator.service import CoordinatorServicer, running_server
from moe_net.discovery.join import resolve_join


@pytest.fixture(autouse=True)
def a_proxy_that_is_down(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{bound.getsockname()[1]}")
        yield


async def test_a_newcomer_reaches_the_coordinator() -> None:
    servicer = CoordinatorServicer(manifest_json="{}", dht_addresses=("/ip4/127.0.0.1/tcp/1/p2p/A",))
    async with running_server(servicer, "127.0.0.1:0") as address:
        assert (await resolve_join([address], timeout_s=5.0)).manifest_json == "{}"


async def test_a_trainer_reaches_a_peer() -> None:
    async with serving() as (_, client):
        answer = await client.transport.forward(client.peer, forward_call(), timeout_s=5.0)
    assert answer.y_RD.shape[0] == 5
