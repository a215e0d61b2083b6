"""A member of a DHT as a process: announces itself, and prints who it sees once a second. `python dht_member.py`.

Arguments: run, host:port to announce, life of its record in seconds, multiaddr to listen on, and addresses to join by.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Sequence

from moe_net.discovery.announcer import Announcer
from moe_net.discovery.dht import DhtDiscovery
from moe_net.discovery.record import Identity
from moe_net.errors import MoeNetError
from moe_net.signals import until_signalled
from moe_net.types import ExpertId


async def stay(run: str, address: str, ttl_s: float, listen: str, join: Sequence[str]) -> None:
    async with (
        await DhtDiscovery.create(run=run, join=join, listen=listen, timeout_s=5.0) as discovery,
        Announcer(discovery, Identity.generate(), run=run, address=address, experts=[ExpertId(0, 0)], ttl_s=ttl_s),
    ):
        print(json.dumps({"event": "ready", "dht": discovery.addresses}), flush=True)
        while True:
            try:
                seen = sorted(peer.address for peer in await discovery.peers())
            except MoeNetError as error:
                seen = [str(error)]
            print(json.dumps({"event": "view", "seen": seen}), flush=True)
            await asyncio.sleep(1.0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(until_signalled(stay(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4], sys.argv[5:])))
