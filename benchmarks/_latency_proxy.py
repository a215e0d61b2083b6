# pyright: basic
"""The network of `latency.py`: a proxy in front of each server, in a process of their own. Arguments: addresses.

A request sets the line: `{"do": "line", "rtt_s": 0.2, "jitter": 0.1}`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack

import uvloop
from _processes import die_with_parent, say

from moe_coordinator.proxy import Proxy
from moe_coordinator.shaping import Conditions


def line(rtt_s: float, jitter: float) -> Conditions:
    """Half the round trip each way, and an exponential delay besides, in the mean this share of it."""
    return Conditions(delay_s=rtt_s / 2, jitter_s=jitter * rtt_s / 2)


async def carry(addresses: list[str]) -> None:
    async with AsyncExitStack() as stack:
        proxies = [
            await stack.enter_async_context(Proxy(address, seed=number)) for number, address in enumerate(addresses)
        ]
        say(event="ready", addresses=[proxy.address for proxy in proxies])
        while text := await asyncio.to_thread(sys.stdin.readline):
            request = json.loads(text)
            for proxy in proxies:
                proxy.shape(line(request["rtt_s"], request["jitter"]))
            say(rtt_s=request["rtt_s"])


def main() -> None:
    die_with_parent()
    uvloop.run(carry(sys.argv[1:]))


if __name__ == "__main__":
    main()
