"""By which address others reach this machine: what a member announces when nobody says it. No grpc, no hivemind.

Nothing is sent to find out: a UDP socket that is connected has its source address from the routing table.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence

import psutil

from moe_net.discovery.listen import host_of, is_loopback, is_wildcard

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Any: connecting a UDP socket sends nothing.
_SOME_PORT = 9
_HOST_IN_MULTIADDR = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6)/([^/]+)/")


async def addresses_of(ways: Sequence[str]) -> tuple[IPAddress, ...]:
    """The IP addresses behind a coordinator's `host:port` or a member's multiaddr; names that resolve to none are left
    out."""
    found: list[IPAddress] = []
    for way in ways:
        in_multiaddr = _HOST_IN_MULTIADDR.match(way)
        host = in_multiaddr[1] if in_multiaddr else host_of(way)
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError:
            continue
        found += [address for address in dict.fromkeys(_ip(str(info[4][0])) for info in infos) if address not in found]
    return tuple(found)


def source_for(target: IPAddress) -> IPAddress | None:
    """This machine's address on the way to `target`; None when there is no way."""
    family = socket.AF_INET if target.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(target), _SOME_PORT))
            return _ip(probe.getsockname()[0])
    except OSError:
        return None


def own_addresses() -> tuple[IPAddress, ...]:
    """The addresses of this machine's interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    interfaces = psutil.net_if_addrs().values()
    return tuple(_ip(entry.address) for entries in interfaces for entry in entries if entry.family in families)


def best(addresses: Iterable[IPAddress]) -> IPAddress | None:
    """The address that most others can call: a public one, else a private one; never loopback or link-local."""
    others = [address for address in addresses if not (address.is_loopback or address.is_link_local)]
    return min(others, key=lambda address: (not address.is_global, address.version), default=None)


def default_listen(run_at: Iterable[IPAddress]) -> str:
    """`host:port` to listen on when nobody says it: every interface, or loopback when the whole run is on this machine.

    Every interface, because a line may come back with another address.
    """
    source = best(filter(None, map(source_for, run_at)))
    if source is None:
        return "127.0.0.1:0"
    return "0.0.0.0:0" if source.version == 4 else "[::]:0"


def announced_host(listen: str, run_at: Sequence[IPAddress] | None = None) -> str:
    """The host that a member announces that listens at `listen` (host:port), as it stands in `host:port`.

    `run_at` are the addresses by which it reached the run; None: it is where a run begins. ValueError, saying what to
    pass, when others could not call it.
    """
    host = host_of(listen)
    sources = own_addresses() if run_at is None else tuple(filter(None, map(source_for, run_at)))
    source = best(sources)
    if not is_wildcard(host):
        if run_at is not None and source is not None and is_loopback(host):
            raise ValueError(
                f"listen={listen!r} is for this machine only, and the run is reached from {source}: say --listen "
                f"{_in_url(source)}:0, or by --advertise how others reach this machine"
            )
        return listen.rpartition(":")[0]
    if source is None:
        if any(address.is_loopback for address in sources):
            raise ValueError(f"listen={listen!r}, but only this machine is in reach: say --listen 127.0.0.1:0")
        raise ValueError(f"listen={listen!r}, but no address of this machine was found: say one by --advertise")
    if run_at is not None and not source.is_global and any(target.is_global for target in run_at):
        raise ValueError(
            f"members elsewhere cannot call {source}, which is this machine's address on the way to the run: say by "
            "--advertise HOST[:PORT] how they can (a forwarded port), or this same address when all are near"
        )
    return _in_url(source)


def _in_url(address: IPAddress) -> str:
    return f"[{address}]" if address.version == 6 else str(address)


def _ip(text: str) -> IPAddress:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
