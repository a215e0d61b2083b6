"""From the addresses a user types to a place in the run: a coordinator's `host:port`, or any DHT member's multiaddr."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import grpc
import grpc.aio

from moe_net.errors import JoinError
from moe_net.proto.v1 import coordinator_pb2, coordinator_pb2_grpc

MAX_REPLY_BYTES = 2**20
"""A manifest has a few KiB."""


class Joined(NamedTuple):
    """What the addresses led to."""

    manifest_json: str | None
    """Of the first coordinator (in the order given) that answered; None: ask the DHT."""
    dht_addresses: tuple[str, ...]
    """Multiaddrs to join the DHT by, those given first."""


async def resolve_join(addresses: Sequence[str], *, timeout_s: float = 10.0) -> Joined:
    """Ask every coordinator among `addresses` at once, and take multiaddrs (`/ip4/...`) as they are.

    Takes `timeout_s` at most. A coordinator that does not answer is no failure while there is another way in.
    JoinError says of each address what was tried; ValueError names an address that is neither form.
    """
    if not addresses:
        raise ValueError("give an address to join by: a coordinator's host:port, or the multiaddr of a DHT member")
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not address.startswith("/") and not (host and port.isdecimal()):
            raise ValueError(f"{address!r} is neither host:port of a coordinator nor a multiaddr like /ip4/.../p2p/...")
    dht_addresses = [address for address in addresses if address.startswith("/")]
    coordinators = [address for address in addresses if not address.startswith("/")]
    answers = await asyncio.gather(*(_get_run(address, timeout_s) for address in coordinators))
    manifest_json: str | None = None
    failures: list[str] = []
    for address, answer in zip(coordinators, answers, strict=True):
        if isinstance(answer, str):
            failures.append(f"{address}: {answer}")
            continue
        manifest_json = manifest_json or answer.manifest_json or None
        dht_addresses += [a for a in answer.dht_addresses if a not in dht_addresses]
    if not dht_addresses:
        tried = "; ".join(failures) or f"{', '.join(coordinators)} knows no DHT member"
        raise JoinError(
            f"no way into the run: {tried}. Is the coordinator running? Any peer's multiaddr is a way in too"
        )
    return Joined(manifest_json, tuple(dht_addresses))


async def _get_run(address: str, timeout_s: float) -> coordinator_pb2.GetRunReply | str:
    """The coordinator's answer, or why there is none."""
    # A channel of its own that waits for the connection: a coordinator may be starting this very second.
    options = [
        ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)  # type: ignore[assignment]
        try:
            return await stub.GetRun(coordinator_pb2.GetRunRequest(), timeout=timeout_s, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name} after {timeout_s:.0f} s at most: {error.details()}"
