"""From typed addresses to a way in, against a real CoordinatorService."""

from __future__ import annotations

import socket

import pytest

from moe_coordinator.service import CoordinatorServicer, running_server
from moe_net.discovery.join import resolve_join
from moe_net.errors import JoinError

MEMBER, OTHER = "/ip4/127.0.0.1/tcp/1/p2p/A", "/ip4/127.0.0.1/tcp/2/p2p/B"


def coordinator(manifest: str = "{}", dht: tuple[str, ...] = (MEMBER,)) -> CoordinatorServicer:
    return CoordinatorServicer(manifest_json=manifest, dht_addresses=dht)


@pytest.fixture
def silent() -> str:
    """An address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


async def test_a_coordinator_gives_the_manifest_and_the_members() -> None:
    async with running_server(coordinator('{"name": "a"}'), "127.0.0.1:0") as address:
        assert await resolve_join([address]) == ('{"name": "a"}', (MEMBER,))


async def test_a_members_own_address_is_a_way_in_without_any_call() -> None:
    assert await resolve_join([OTHER, MEMBER]) == (None, (OTHER, MEMBER))


async def test_a_dead_coordinator_is_no_obstacle_while_there_is_another_way(silent: str) -> None:
    assert await resolve_join([silent, MEMBER], timeout_s=0.2) == (None, (MEMBER,))
    async with running_server(coordinator('{"name": "b"}'), "127.0.0.1:0") as address:
        assert await resolve_join([silent, address, OTHER], timeout_s=1.0) == ('{"name": "b"}', (OTHER, MEMBER))


async def test_no_way_in_says_what_was_tried(silent: str) -> None:
    with pytest.raises(JoinError, match=rf"{silent}: (DEADLINE_EXCEEDED|UNAVAILABLE)"):
        await resolve_join([silent], timeout_s=0.2)
    async with running_server(coordinator(dht=()), "127.0.0.1:0") as address:
        with pytest.raises(JoinError, match=f"{address} knows no DHT member"):
            await resolve_join([address])


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:x"])
async def test_an_address_that_is_neither_form_is_named(address: str) -> None:
    with pytest.raises(ValueError, match="neither host:port"):
        await resolve_join([MEMBER, address])
    with pytest.raises(ValueError, match="give an address"):
        await resolve_join([])


async def test_a_second_coordinator_gets_no_port_that_the_first_one_has() -> None:
    async with running_server(coordinator('{"name": "a"}'), "127.0.0.1:0") as address:
        with pytest.raises(ValueError, match=address):
            async with running_server(coordinator('{"name": "b"}'), address):
                pass
