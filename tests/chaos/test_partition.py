"""Two sites that were apart find each other again. Real processes on networks of their own."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dht_member
import pytest
from networks import Sites, two_sites

from moe_coordinator.supervisor import Child, ChildSpec, Event, Supervisor

READY_S = 60.0
RECORD_S = 30.0
"""Life of a member's record: a run's default."""
SITE_A, SITE_B = (0, 1), (2, 3)


@pytest.fixture
def sites() -> Iterator[Sites]:
    with two_sites(4) as sites:
        yield sites


class Members:
    """One member on each host, and who sees whom."""

    def __init__(self, sites: Sites, folder: Path) -> None:
        self.sites = sites
        self.there: dict[int, Child] = {}
        self.supervisor = Supervisor(folder, on_event=self._on_event)
        self._changed = asyncio.Event()

    def _on_event(self, child: Child, event: Event) -> None:
        self._changed.set()

    async def start(self, host: int, *join: str) -> str:
        """A member on `host`; the multiaddr to join it by."""
        address = self.sites.address(host)
        arguments = ("parted", f"{address}:1", str(RECORD_S), f"/ip4/{address}/tcp/4001", *join)
        argv = self.sites.on(host, (sys.executable, dht_member.__file__, *arguments))
        self.there[host] = await self.supervisor.start(ChildSpec(name=f"member-{host}", argv=argv))
        return str((await self.there[host].ready(READY_S))["dht"][0])

    async def start_on_all(self) -> None:
        """A member on each host, joined by that on host 0; all see all when this returns."""
        way_in = await self.start(0)
        for host in (1, 2, 3):
            await self.start(host, way_in)
        await self.see((0, 1, 2, 3), (0, 1, 2, 3), RECORD_S)

    async def see(self, seers: tuple[int, ...], seen: tuple[int, ...], timeout_s: float) -> float:
        """Wait until each of `seers` sees exactly `seen`; the seconds that it took."""
        wanted = [f"{self.sites.address(host)}:1" for host in seen]
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                while any(self.there[host].last.get("view", {}).get("seen") != wanted for host in seers):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            views = {host: child.last.get("view") for host, child in self.there.items()}
            raise AssertionError(f"not {wanted} after {timeout_s} s, but {views}") from None
        return time.monotonic() - began_s


@pytest.mark.timeout(300)
async def test_two_sites_that_were_apart_for_a_minute_see_each_other_within_a_records_life(
    sites: Sites, tmp_path: Path
) -> None:
    members = Members(sites, tmp_path)
    async with members.supervisor:
        await members.start_on_all()
        sites.part()
        parted_s = time.monotonic()
        await members.see(SITE_A, SITE_A, 2 * RECORD_S)
        await members.see(SITE_B, SITE_B, 2 * RECORD_S)
        await asyncio.sleep(60.0 - (time.monotonic() - parted_s))  # the length of the outage is what is tested
        sites.rejoin()
        await members.see((0, 1, 2, 3), (0, 1, 2, 3), RECORD_S)


@pytest.mark.timeout(300)
async def test_two_sites_find_each_other_without_the_member_that_all_had_joined_by(
    sites: Sites, tmp_path: Path
) -> None:
    members = Members(sites, tmp_path)
    async with members.supervisor:
        await members.start_on_all()
        sites.part()
        members.there[0].kill()
        await members.see(SITE_B, SITE_B, 2 * RECORD_S)
        sites.rejoin()
        await members.see((1, 2, 3), (1, 2, 3), RECORD_S)
