"""From the `host:port` a user listens on to the multiaddr of a DHT node beside it. No grpc, no hivemind: `--help`."""

from __future__ import annotations

import ipaddress
import re
import socket

MAX_PORT = 65_535


def check_listen(listen: str) -> None:
    """ValueError when `listen` is not `host:port`."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"listen={listen!r} is not host:port")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"listen={listen!r}: an IPv6 address stands in brackets, as in [::1]:0")
    # gRPC would take the number modulo 65536, and listen somewhere else.
    if int(port) > MAX_PORT:
        raise ValueError(f"listen={listen!r}: a port is {MAX_PORT} at most")


def dht_multiaddr(listen: str) -> str:
    """A free TCP port of the host of `listen`; ValueError when that host is not an IP address."""
    host = listen.rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ValueError(f"listen={listen!r} names no IP address: say --dht-listen as well") from None
    return f"/ip{address.version}/{address}/tcp/0"


def check_free(multiaddr: str) -> None:
    """OSError, with the reason and the address, when nobody can listen on an IP address and TCP port of this machine.

    The libp2p daemon says no more than that it did not start, which might be for want of somebody to join as well.
    """
    parts = re.fullmatch(r"/ip([46])/([^/]+)/tcp/(\d+)", multiaddr)
    if parts is None:
        return  # QUIC, a name: what else the daemon can do
    family = socket.AF_INET if parts[1] == "4" else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the daemon does: connections that ended, and a daemon that is just ending, do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            probe.bind((parts[2], int(parts[3])))
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {multiaddr}: {error.strerror}") from None


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
    if not host or not port.isdecimal() or not 1 <= int(port) <= MAX_PORT:
        raise ValueError(f"advertise={advertise!r} is neither a host nor host:port")
    return advertise
