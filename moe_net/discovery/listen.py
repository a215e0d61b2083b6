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
