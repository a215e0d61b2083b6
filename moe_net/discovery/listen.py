"""Where a server listens and how others address it. No grpc, no hivemind: `--help`."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import re
import socket

MAX_PORT = 65_535
# A daemon that was just killed holds its port for some milliseconds more.
_RELEASE_S = 1.0
_LOOK_S = 0.05
_MULTIADDR = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/(\d{1,5})")


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


def check_multiaddr(name: str, multiaddr: str) -> None:
    """ValueError when the option `name` is no host and TCP port (1 or more) that others could be told."""
    parts = _MULTIADDR.fullmatch(multiaddr)
    if parts is None or not 1 <= int(parts[3]) <= MAX_PORT or is_wildcard(parts[2]):
        raise ValueError(f"{name}={multiaddr!r} is not like /ip4/203.0.113.7/tcp/4001 or /dns/example.org/tcp/4001")


def host_of(address: str) -> str:
    """The host of `host:port`, without brackets."""
    return address.rpartition(":")[0].strip("[]")


def is_wildcard(host: str) -> bool:
    """Whether `host` is every address of a machine."""
    return host in ("0.0.0.0", "::", "")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def dht_multiaddr(listen: str) -> str:
    """A free TCP port of the host of `listen`; ValueError when that host is not an IP address."""
    host = host_of(listen)
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ValueError(f"listen={listen!r} names no IP address: say --dht-listen as well") from None
    return f"/ip{address.version}/{address}/tcp/0"


def dht_announcement(advertise: str, dht_listen: str) -> str:
    """What the DHT node announces that listens at `dht_listen` (its port chosen) on a machine that is called by
    `advertise` (a host, or host:port of another server there)."""
    bare = advertise.strip("[]")
    host = host_of(advertise) if _has_port(advertise) else bare
    parts = _MULTIADDR.fullmatch(dht_listen)
    if parts is None:
        raise ValueError(f"dht_listen={dht_listen!r} is no IP address and TCP port: say --dht-advertise as well")
    try:
        kind = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        kind = "dns"
    return f"/{kind}/{host}/tcp/{parts[3]}"


async def free_multiaddr(multiaddr: str) -> str:
    """`multiaddr` with a free port in the place of port 0. OSError, with the reason and the address, when nobody can
    listen there: also when somebody else does.

    The libp2p daemon says no more than that it did not start, which might be for want of somebody to join as well; and
    two daemons share a port in silence.
    """
    parts = re.fullmatch(r"(/ip([46])/([^/]+)/tcp/)(\d+)", multiaddr)
    if parts is None:
        return multiaddr  # QUIC, a name: what else the daemon can do
    prefix, version, host, port = parts.groups()
    deadline_s = asyncio.get_running_loop().time() + _RELEASE_S
    while True:
        with socket.socket(socket.AF_INET if version == "4" else socket.AF_INET6, socket.SOCK_STREAM) as probe:
            # Connections that ended do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port)))
                return f"{prefix}{probe.getsockname()[1]}"
            except OSError as error:
                if error.errno != errno.EADDRINUSE or asyncio.get_running_loop().time() > deadline_s:
                    raise OSError(error.errno, f"cannot listen on {multiaddr}: {error.strerror}") from None
        await asyncio.sleep(_LOOK_S)


def advertised_address(advertise: str | None, listening: str) -> str:
    """What others are told when a server listens at `listening` (host:port): that, or what `advertise` says.

    `advertise` is a host, which keeps the port, or `host:port`; ValueError when its port is none.
    """
    if advertise is None:
        return listening
    if not _has_port(advertise):
        return f"{advertise}:{listening.rpartition(':')[2]}"
    host, _, port = advertise.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= MAX_PORT:
        raise ValueError(f"advertise={advertise!r} is neither a host nor host:port")
    return advertise


def _has_port(advertise: str) -> bool:
    host, colon, _ = advertise.rpartition(":")
    # A colon more is an IPv6 address without brackets, and no port.
    return bool(colon) and not (":" in host and not host.endswith("]")) and not advertise.endswith("]")
