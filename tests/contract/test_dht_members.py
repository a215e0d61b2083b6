"""Members of the DHT as processes and machines have them: keys that last, addresses that are told, daemons that end."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import dht_member
import psutil

from moe_net.discovery.dht import DhtDiscovery
from moe_net.discovery.record import Identity, sign

RUN = "members"


async def test_a_member_that_lives_again_is_the_same_one_and_greets_those_it_knew(
    tmp_path: Path,
) -> None:
    async def begin(listen: str, known: tuple[str, ...]) -> DhtDiscovery:
        return await DhtDiscovery.create(run=RUN, listen=listen, identity=tmp_path / "key", known=known)

    first, identity = await begin("/ip4/127.0.0.1/tcp/0", ()), Identity.generate()
    # It never looks for anybody by itself.
    other = await DhtDiscovery.create(run=RUN, join=first.addresses, greet_every_s=math.inf)
    expires_at_s = time.time() + 60.0
    record = sign(identity, run=RUN, address="127.0.0.1:1", experts=[], sequence=1, expires_at_s=expires_at_s)
    await other.announce(record, peer_id=identity.peer_id, expires_at_s=expires_at_s)
    assert await first.greet_lost() is False  # nobody is lost
    await first.close()
    listen = first.addresses[0].partition("/p2p/")[0]
    async with await begin(listen, first.known_members) as again:
        assert again.addresses == first.addresses
        assert [peer.peer_id for peer in await again.peers()] == [identity.peer_id]
    await other.close()
    # Those who are gone, and a file that somebody has damaged, are no obstacle.
    async with await begin(listen, (*again.known_members, "\ufffd", "/ip4/127.0.0.1/tcp/1/p2p/A")) as alone:
        assert await alone.peers() == ()


async def test_members_of_other_machines_are_told_what_is_advertised_and_never_loopback() -> None:
    for advertise, announced in (("192.0.2.7", "/ip4/192.0.2.7/tcp/"), ("home.example:7", "/dns/home.example/tcp/")):
        async with await DhtDiscovery.create(run=RUN, listen="/ip4/0.0.0.0/tcp/0", advertise=advertise) as member:
            assert [address.startswith(announced) for address in member.addresses] == [True]
    exact = "/dns4/home.example/tcp/7"
    async with await DhtDiscovery.create(
        run=RUN, listen="/ip4/0.0.0.0/tcp/0", advertise="192.0.2.7", announce=exact
    ) as member:
        assert [address.rpartition("/p2p/")[0] for address in member.addresses] == [exact]


async def test_a_daemon_ends_with_its_process_and_the_port_is_free_at_once() -> None:
    # Who is killed cannot clear up: its sockets go with this folder.
    with tempfile.TemporaryDirectory(prefix="m-") as folder:
        process = await asyncio.create_subprocess_exec(
            sys.executable, dht_member.__file__, RUN, "127.0.0.1:1", "30", "/ip4/127.0.0.1/tcp/0",
            stdout=asyncio.subprocess.PIPE, env={**os.environ, "TMPDIR": folder},
        )  # fmt: skip
        assert process.stdout is not None
        (address,) = json.loads(await process.stdout.readline())["dht"]
        daemons = psutil.Process(process.pid).children(recursive=True)
        assert daemons
        process.kill()
        await process.communicate()
        async with await DhtDiscovery.create(run=RUN, listen=address.partition("/p2p/")[0]):
            assert not any(daemon.is_running() and daemon.status() != psutil.STATUS_ZOMBIE for daemon in daemons)
