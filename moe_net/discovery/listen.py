"""From the `host:port` a user listens on to the multiaddr of a DHT node beside it. No grpc, no hivemind: `--help`."""

from __future__ import annotations

import ipaddress


def check_listen(listen: str) -> None:
    """ValueError when `listen` is not `host:port`."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"listen={listen!r} is not host:port")
    # gRPC would take the number modulo 65536, and listen somewhere else.
    if int(port) > 65_535:
        raise ValueError(f"listen={listen!r}: a port is 65535 at most")


def dht_multiaddr(listen: str) -> str:
    """A free TCP port of the host of `listen`; ValueError when that host is not an IP address."""
    host = listen.rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ValueError(f"listen={listen!r} names no IP address: say --dht-listen as well") from None
    return f"/ip{address.version}/{address}/tcp/0"


def advertised_address(advertise: str | None, listening: str) -> str:
    """What others are told when a server listens at `listening` (host:port): that, or what `advertise` says.

    `advertise` is a host, which keeps the port, or `host:port`; ValueError when its port is none.
    """
    if advertise is None:
        return listening
    host, colon, port = advertise.rpartition(":")
    # A colon more is an IPv6 address without brackets, and no port.
    if not colon or (":" in host and not host.endswith("]")) or advertise.endswith("]"):
        return f"{advertise}:{listening.rpartition(':')[2]}"
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65_535:
        raise ValueError(f"advertise={advertise!r} is neither a host nor host:port")
    return advertise
