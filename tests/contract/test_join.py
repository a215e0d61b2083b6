"""From typed addresses to a way in, against a real CoordinatorService."""

from __future__ import annotations

import asyncio
import socket

import pytest

from moe_coordinator.service import CoordinatorServicer, running_server
from moe_net.discovery.join import resolve_join
from moe_net.discovery.listen import check_join
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
    with pytest.raises(JoinError, match=rf"{silent}: connection refused: nobody listens there"):
        await resolve_join([silent], timeout_s=0.2)
    async with running_server(coordinator(dht=()), "127.0.0.1:0") as address:
        with pytest.raises(JoinError, match=f"{address} knows no DHT member"):
            await resolve_join([address])


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("host", "neither host:port"),
        ("host:", "neither host:port"),
        (":1", "neither host:port"),
        ("host:x", "'x' is no port"),
        ("host:-1", "'-1' is no port"),
        ("host:7700/", "'7700/' is no port"),
        ("http://host:7700", "is a URL: give host:port alone, as in host:7700"),
        ("grpc://host:7700/", "is a URL: give host:port alone, as in host:7700"),
        (" host:7700", "has a space"),
        ("host: 7700", "has a space"),
        ("host:7700\n", "has a space"),
        ("host:7700,other:7700", "has a comma: give --join once for each address"),
        ("127.0.0.1:107929", r"a port is in 1\.\.65535, not 107929"),  # gRPC joins port 42393
        ("host:0", r"a port is in 1\.\.65535, not 0"),
        ("2001:db8::1:7700", "stands in brackets"),
        ("me@host:7700", "'me@host' is no host"),
        ("0.0.0.0:7700", "nothing to call"),
        ("/ip4/127.0.0.1/tcp/107929/p2p/A", "a port is in"),
        ("/ip4/127.0.0.1/tcp/4001", "is no multiaddr"),
        ("/ip4/1270.0.1/tcp/4001/p2p/A", "is no multiaddr"),
    ],
)
async def test_what_is_wrong_with_an_address_is_said(address: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        await resolve_join([MEMBER, address])
    with pytest.raises(ValueError, match="give an address"):
        await resolve_join([])


@pytest.mark.parametrize(
    "address", ["host:7700", "10.0.0.1:1", "[::1]:7700", "coordinator_1:65535", "/dns/run.example/udp/1/quic/p2p/Qm1"]
)
def test_what_is_right_is_taken(address: str) -> None:
    check_join(address)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 64 + ".invalid"])
async def test_a_host_that_is_not_there_is_said_at_once(host: str) -> None:
    with pytest.raises(JoinError, match=f"there is no host '{host}'"):
        await asyncio.wait_for(resolve_join([f"{host}:7700"], timeout_s=600), 60)


async def test_a_coordinator_that_starts_meanwhile_is_waited_for(silent: str, caplog: pytest.LogCaptureFixture) -> None:
    joining = asyncio.create_task(resolve_join([silent], timeout_s=60))
    while not caplog.messages:  # noqa: ASYNC110  a log has no event
        await asyncio.sleep(0.01)
    assert caplog.messages == [f"{silent}: connection refused: nobody listens there; trying for 60 s"]
    async with running_server(coordinator(), silent):
        assert (await joining).dht_addresses == (MEMBER,)


async def test_somebody_who_answers_nothing_is_no_refused_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(JoinError, match=f"{address}: somebody listens there, and does not answer as a coordinator"):
            await resolve_join([address], timeout_s=0.5)


async def test_a_second_coordinator_gets_no_port_that_the_first_one_has() -> None:
    async with running_server(coordinator('{"name": "a"}'), "127.0.0.1:0") as address:
        with pytest.raises(ValueError, match=address):
            async with running_server(coordinator('{"name": "b"}'), address):
                pass
