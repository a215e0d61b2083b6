"""Where members of the DHT were last seen, so that those who were parted find each other again. Pure; no hivemind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MAX_MET = 64
"""Members remembered beside those that were given: any one of them that lives leads to the others."""
A_TIME = 4
"""Members of those that are looked for at a time."""

_MEMBER = re.compile(r"(/.+)/p2p/([1-9A-HJ-NP-Za-km-z]+)")
_TCP = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/(\d+)")


class AddressBook:
    """Member -> the multiaddrs at which it was last seen. Those given stay; of the others the longest unseen leave."""

    def __init__(self, given: Iterable[str]) -> None:
        """`given`: multiaddrs with a member's id at the end."""
        self._given: dict[str, tuple[str, ...]] = {}
        self._met: dict[str, tuple[str, ...]] = {}
        self._turn = 0
        for multiaddr in given:
            address, member = split(multiaddr)
            self._given[member] = (*self._given.get(member, ()), address)

    def note(self, member: str, addresses: Sequence[str]) -> None:
        """`member` is there now, at these addresses."""
        if addresses:
            self._met.pop(member, None)
            self._met[member] = tuple(addresses)
            if len(self._met) > MAX_MET:
                del self._met[next(iter(self._met))]

    def addresses(self, member: str) -> tuple[str, ...]:
        """Where `member` may be, as given first: a name stays right when its address changes."""
        return tuple(dict.fromkeys((*self._given.get(member, ()), *self._met.get(member, ()))))

    def next_lost(self, present: Iterable[str]) -> list[str]:
        """Whom to look for now: all of those given that are not `present`, and some of the others, in turn."""
        there = set(present)
        others = [member for member in self._met if member not in there and member not in self._given]
        self._turn += A_TIME
        start = self._turn % len(others) if others else 0
        return [m for m in self._given if m not in there] + (others[start:] + others[:start])[:A_TIME]

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """Every address of every member, with its id at the end."""
        members = dict.fromkeys((*self._given, *self._met))
        return tuple(f"{address}/p2p/{member}" for member in members for address in self.addresses(member))


def split(multiaddr: str) -> tuple[str, str]:
    """The address and the member's id of a multiaddr; ValueError when it has not both."""
    parts = _MEMBER.fullmatch(multiaddr)
    if parts is None:
        raise ValueError(
            f"{multiaddr!r} is not the libp2p address of a member, like /ip4/203.0.113.7/tcp/4001/p2p/12D3Koo..."
        )
    return parts[1], parts[2]


def tcp_of(address: str) -> tuple[str, int] | None:
    """Host and port of a multiaddr of TCP; None of any other."""
    parts = _TCP.match(address)
    return None if parts is None else (parts[1], int(parts[2]))
