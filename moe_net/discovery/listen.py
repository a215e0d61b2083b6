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
# Of a member that is dialled; the transport may be another one than TCP.
_MEMBER = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/]+)/(?:tcp|udp)/(\d+)(?:/[^/]+)*/p2p/[A-Za-z0-9]+")


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


def check_join(address: str) -> None:
    """ValueError, saying what is wrong with it, when `address` is no way into a run."""
    what = f"join={address!r}"
    if not address.strip():
        raise ValueError(f"{what} is empty: give a coordinator's host:port, or the multiaddr of a DHT member")
    if any(character.isspace() or not character.isprintable() for character in address):
        raise ValueError(f"{what} has a space or another character in it that no address has")
    if "," in address:
        raise ValueError(f"{what} has a comma: give --join once for each address")
    if "://" in address:
        rest = address.partition("://")[2].rstrip("/")
        raise ValueError(f"{what} is a URL: give host:port alone, as in {rest or 'host:7700'}")
    if address.startswith("/"):
        parts = _MEMBER.fullmatch(address)
        if parts is None or (parts[1].startswith("ip") and not _is_ip(parts[2], version=int(parts[1][2]))):
            raise ValueError(f"{what} is no multiaddr of a DHT member, like /ip4/203.0.113.7/tcp/4001/p2p/12D3Koo...")
        _check_port(what, parts[3])
        return
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port:
        raise ValueError(f"{what} is neither host:port of a coordinator nor a multiaddr like /ip4/.../p2p/...")
    if not (port.isascii() and port.isdecimal()):
        raise ValueError(f"{what} is neither host:port of a coordinator nor a multiaddr: {port!r} is no port")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if ":" in bare and (bare == host or not _is_ip(bare, version=6)):
        raise ValueError(f"{what}: an IPv6 address stands in brackets, as in [2001:db8::1]:7700")
    if "/" in host or "@" in host or bare != bare.strip("[]"):
        raise ValueError(f"{what}: {host!r} is no host")
    if is_wildcard(bare):
        raise ValueError(f"{what}: {host} is where a server listens, and nothing to call: give its own address")
    _check_port(what, port)


def _check_port(what: str, port: str) -> None:
    # gRPC would take the number modulo 65536, and call somebody else.
    if not 1 <= int(port[:7]) <= MAX_PORT:
        raise ValueError(f"{what}: a port is in 1..{MAX_PORT}, not {port}")


def _is_ip(text: str, *, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False


def check_unused(listen: str) -> None:
    """OSError when nobody can listen at `listen` (host:port), also when somebody else does."""
    host, _, port = listen.rpartition(":")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {listen}: {error.strerror}") from None


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
