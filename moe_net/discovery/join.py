"""From the addresses a user types to a place in the run: a coordinator's `host:port`, or any DHT member's multiaddr."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import grpc
import grpc.aio

from moe_net.discovery.listen import check_join, host_of
from moe_net.errors import JoinError
from moe_net.proto.v1 import coordinator_pb2, coordinator_pb2_grpc

log = logging.getLogger(__name__)

MAX_REPLY_BYTES = 2**20
"""A manifest has a few KiB."""
POLL_S = 0.2
"""Between two tries to connect: a coordinator may be starting this very second."""


class Joined(NamedTuple):
    """What the addresses led to."""

    manifest_json: str | None
    """Of the first coordinator (in the order given) that answered; None: ask the DHT."""
    dht_addresses: tuple[str, ...]
    """Multiaddrs to join the DHT by, those given first."""


async def resolve_join(addresses: Sequence[str], *, timeout_s: float = 10.0) -> Joined:
    """Ask every coordinator among `addresses` at once, and take multiaddrs (`/ip4/...`) as they are.

    Takes `timeout_s` at most, of which a host that refuses connections gets all: it may be starting. A coordinator that
    does not answer is no failure while there is another way in. JoinError says of each address what was tried;
    ValueError names an address that is neither form.
    """
    if not addresses:
        raise ValueError("give an address to join by: a coordinator's host:port, or the multiaddr of a DHT member")
    for address in addresses:
        check_join(address)
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
        raise JoinError(f"no way into the run: {tried}. Any peer's multiaddr is a way in too")
    return Joined(manifest_json, tuple(dht_addresses))


async def _get_run(address: str, timeout_s: float) -> coordinator_pb2.GetRunReply | str:
    """The coordinator's answer, or why there is none."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    # gRPC waits for a connection without a word of why there is none.
    failure = await _unreachable(address, deadline_s)
    if failure is not None:
        return failure
    options = [
        ("grpc.max_receive_message_length", MAX_REPLY_BYTES),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)  # type: ignore[assignment]
        left_s = max(0.1, deadline_s - loop.time())
        try:
            return await stub.GetRun(coordinator_pb2.GetRunRequest(), timeout=left_s, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            return (
                f"somebody listens there, and does not answer as a coordinator does ({error.code().name} after "
                f"{timeout_s:.0f} s at most: {error.details()})"
            )


async def _unreachable(address: str, deadline_s: float) -> str | None:
    """None as soon as somebody listens at `address` (host:port); why nobody does, at the deadline, or at once when
    there is no such host."""
    loop = asyncio.get_running_loop()
    host, port, began_s = host_of(address), int(address.rpartition(":")[2]), loop.time()
    said = False
    while True:
        try:
            async with asyncio.timeout_at(deadline_s):
                infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                failure = await _refusal([str(info[4][0]) for info in infos], port)
        except TimeoutError:
            return (
                f"nothing answers there, for {loop.time() - began_s:.0f} s (a firewall, or another machine's address?)"
            )
        except (OSError, UnicodeError) as error:
            return f"there is no host {host!r} ({getattr(error, 'strerror', None) or error}; is the name right?)"
        if failure is None:
            return None
        if loop.time() + POLL_S > deadline_s:
            return f"{failure}, for {loop.time() - began_s:.0f} s (is the coordinator running, and at this port?)"
        if not said:
            said = True
            log.warning("%s: %s; trying for %.0f s", address, failure, deadline_s - loop.time())
        await asyncio.sleep(POLL_S)


async def _refusal(hosts: Sequence[str], port: int) -> str | None:
    """None when one of the IP addresses takes a connection; else what the last one said."""
    failure = "no address"
    for host in hosts:
        try:
            _, writer = await asyncio.open_connection(host, port)
        except ConnectionRefusedError:
            failure = "connection refused: nobody listens there"
        except OSError as error:
            failure = os.strerror(error.errno) if error.errno else str(error)
        else:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            return None
    return failure
