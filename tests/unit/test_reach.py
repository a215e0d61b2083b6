"""By which address others reach this machine, and how an address of one kind follows from one of another."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import pytest

from moe_coordinator.config import ServeOptions
from moe_net.discovery import reach
from moe_net.discovery.listen import check_multiaddr, dht_announcement, free_multiaddr
from moe_net.discovery.reach import IPAddress, addresses_of, announced_host, best, default_listen
from moe_peer.config import ServeConfig

LOOPBACK, PRIVATE, OTHER_PRIVATE = map(ipaddress.ip_address, ("127.0.0.1", "10.0.0.7", "192.168.1.2"))
PUBLIC, OTHER_PUBLIC = map(ipaddress.ip_address, ("8.8.4.4", "2001:4860:4860::8888"))
LINK_LOCAL = ipaddress.ip_address("fe80::1")


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> dict[IPAddress, IPAddress]:
    """Target -> the address of ours on the way to it; to all others there is no way."""
    routes: dict[IPAddress, IPAddress] = {LOOPBACK: LOOPBACK}
    monkeypatch.setattr(reach, "source_for", routes.get)
    return routes


@pytest.mark.parametrize(
    ("addresses", "chosen"),
    [
        ((LOOPBACK, PRIVATE, PUBLIC), PUBLIC),
        ((LINK_LOCAL, LOOPBACK, PRIVATE), PRIVATE),
        ((OTHER_PUBLIC, PUBLIC), PUBLIC),
        ((LOOPBACK, LINK_LOCAL), None),
        ((), None),
    ],
)
def test_a_public_address_is_better_than_a_private_one_and_loopback_is_none(
    addresses: tuple[IPAddress, ...], chosen: IPAddress | None
) -> None:
    assert best(addresses) == chosen


def test_a_run_on_this_machine_is_served_on_loopback_and_any_other_on_every_interface(
    routes: dict[IPAddress, IPAddress],
) -> None:
    routes[PRIVATE] = OTHER_PRIVATE
    routes[OTHER_PUBLIC] = OTHER_PUBLIC
    assert default_listen([LOOPBACK]) == "127.0.0.1:0" == default_listen([])
    assert default_listen([LOOPBACK, PRIVATE]) == "0.0.0.0:0"
    assert default_listen([OTHER_PUBLIC]) == "[::]:0"


def test_a_member_announces_the_address_from_which_it_reached_the_run(routes: dict[IPAddress, IPAddress]) -> None:
    routes[PRIVATE] = OTHER_PRIVATE
    assert announced_host("0.0.0.0:7", [LOOPBACK, PRIVATE]) == "192.168.1.2"
    assert announced_host("127.0.0.1:7", [LOOPBACK]) == "127.0.0.1"
    assert announced_host("home.example:7", [PRIVATE]) == "home.example"
    routes[OTHER_PUBLIC] = OTHER_PUBLIC
    assert announced_host("[::]:7", [OTHER_PUBLIC]) == f"[{OTHER_PUBLIC}]"


@pytest.mark.parametrize(
    ("listen", "run_at", "remedy"),
    [
        ("127.0.0.1:0", [PRIVATE], r"reached from 192\.168\.1\.2: say --listen 192\.168\.1\.2:0, or by --advertise"),
        ("localhost:0", [PRIVATE], "say --listen"),
        ("0.0.0.0:0", [LOOPBACK], r"only this machine is in reach: say --listen 127\.0\.0\.1:0"),
        ("0.0.0.0:0", [OTHER_PUBLIC], "no address of this machine was found: say one by --advertise"),
        # Behind address translation: what the run sees is not what we see.
        ("0.0.0.0:0", [PUBLIC], r"members elsewhere cannot call 192\.168\.1\.2.*--advertise HOST"),
    ],
)
def test_a_member_that_others_could_not_call_is_told_what_to_pass(
    listen: str, run_at: list[IPAddress], remedy: str, routes: dict[IPAddress, IPAddress]
) -> None:
    routes[PRIVATE] = OTHER_PRIVATE
    routes[PUBLIC] = OTHER_PRIVATE
    with pytest.raises(ValueError, match=remedy):
        announced_host(listen, run_at)


def test_who_begins_a_run_on_every_interface_announces_the_best_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "own_addresses", lambda: (LOOPBACK, LINK_LOCAL, PRIVATE, PUBLIC))
    assert announced_host("0.0.0.0:7700") == str(PUBLIC)
    monkeypatch.setattr(reach, "own_addresses", lambda: (LOOPBACK,))
    with pytest.raises(ValueError, match="only this machine is in reach"):
        announced_host("0.0.0.0:7700")


async def test_addresses_stand_in_every_form_of_a_way_in() -> None:
    ways = [
        "10.0.0.7:80",
        "[::1]:80",
        "/ip4/8.8.4.4/tcp/1/p2p/A",
        "/dns4/localhost/tcp/1/p2p/B",
        "no.such.name.invalid:1",
    ]
    found = await addresses_of([ways[0], *ways])
    assert set(found) >= {PRIVATE, ipaddress.ip_address("::1"), PUBLIC, LOOPBACK}
    assert len(found) == len(set(found))


def test_this_machines_route_to_itself_and_its_interfaces_are_known() -> None:
    assert reach.source_for(LOOPBACK) == LOOPBACK
    assert LOOPBACK in reach.own_addresses()


@pytest.mark.parametrize(
    ("advertise", "announced"),
    [
        ("home.example", "/dns/home.example/tcp/9"),
        ("home.example:7", "/dns/home.example/tcp/9"),
        ("10.0.0.7:7", "/ip4/10.0.0.7/tcp/9"),
        ("[2001:db8::1]:7", "/ip6/2001:db8::1/tcp/9"),
        ("[2001:db8::1]", "/ip6/2001:db8::1/tcp/9"),
        ("2001:db8::1", "/ip6/2001:db8::1/tcp/9"),
    ],
)
def test_the_dht_announces_the_advertised_host_with_its_own_port(advertise: str, announced: str) -> None:
    assert dht_announcement(advertise, "/ip4/0.0.0.0/tcp/9") == announced
    check_multiaddr("x", announced)


@pytest.mark.parametrize(
    "wrong", ["", "home:1", "/ip4/0.0.0.0/tcp/1", "/ip4/1.2.3.4/tcp/0", "/ip4/1.2.3.4/tcp/70000", "/ip4/1.2.3.4/udp/1"]
)
def test_an_address_that_nobody_could_dial_is_refused_by_the_options_name(wrong: str) -> None:
    with pytest.raises(ValueError, match="dht_advertise="):
        ServeConfig(dht_advertise=wrong)
    with pytest.raises(ValueError, match="dht_advertise="):
        ServeOptions(config=Path("run.toml"), dht_advertise=wrong)


async def test_a_port_that_somebody_listens_on_is_found_although_it_could_be_shared() -> None:
    with socket.socket() as taken:
        # As libp2p's daemon does.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        multiaddr = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=f"cannot listen on {multiaddr}: Address already in use"):
            await free_multiaddr(multiaddr)
    assert await free_multiaddr(multiaddr) == multiaddr
    assert not (await free_multiaddr("/ip4/127.0.0.1/tcp/0")).endswith("/0")
