"""`moe-coordinator proxy` as a process of its own, in front of a small server."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from moe_coordinator.proxy import Proxy

DEADLINE_S = 30.0


async def proxy_process(*arguments: object, stdin: int = PIPE) -> Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "moe_coordinator.cli", "proxy"), *map(str, arguments),
        stdin=stdin, stdout=PIPE, stderr=PIPE,
    )  # fmt: skip


async def event(process: Process) -> dict[str, Any]:
    """Its next one."""
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        return json.loads(await process.stdout.readline())


async def ask(process: Process, **change: object) -> dict[str, Any]:
    """Its answer to this line."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(change).encode() + b"\n")
    return await event(process)


async def leave(process: Process) -> tuple[int, float]:
    """Its exit code after SIGTERM, and after how many seconds."""
    began_s = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(DEADLINE_S):
        await process.communicate()
    assert process.returncode is not None
    return process.returncode, time.perf_counter() - began_s


@asynccontextmanager
async def echo() -> AsyncIterator[str]:
    """host:port of a server that says what it hears."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
            writer.close()
            await writer.wait_closed()
        except ConnectionError:
            return  # the proxy was cut, or has ended

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def round_trip_s(address: str) -> float:
    async with asyncio.timeout(DEADLINE_S), connected(address) as (reader, writer):
        began_s = time.perf_counter()
        writer.write(b"there and back")
        await reader.readexactly(14)
        return time.perf_counter() - began_s


async def test_it_begins_as_the_file_says_changes_by_lines_and_leaves_at_once(tmp_path: Path) -> None:
    faults = tmp_path / "faults.toml"
    # A fault in the file is not its own to begin.
    faults.write_text('[network]\nround_trip_s = 0.4\n[[fault]]\nat_s = 0.0\ntarget = "peer-0"\nwhat = "cut"\n')
    async with echo() as target:
        process = await proxy_process("--listen", "127.0.0.1:0", "--target", target, "--faults", faults)
        ready = await event(process)
        assert (ready["event"], ready["target"]) == ("ready", target)
        assert await round_trip_s(ready["address"]) >= 0.4
        assert await ask(process, up={"delay_s": 0.1}, down={}) == {"event": "changed"}
        assert 0.1 <= await round_trip_s(ready["address"]) < 0.4
        async with connected(ready["address"]) as (reader, writer):
            writer.write(b"it is open")
            await reader.readexactly(10)
            assert await ask(process, cut=True) == {"event": "changed"}
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
            with pytest.raises(ConnectionRefusedError):
                await round_trip_s(ready["address"])
            assert await ask(process, cut=False) == {"event": "changed"}
            assert await round_trip_s(ready["address"]) >= 0.1, "the delay is still there"
        async with connected(ready["address"]):
            code, took_s = await leave(process)
        assert code == 0
        assert took_s < 1.0


async def test_a_line_that_says_nothing_changes_nothing_and_is_answered() -> None:
    async with echo() as target:
        process = await proxy_process("--listen", "127.0.0.1:0", "--target", target)
        address = (await event(process))["address"]
        for change, complaint in (({"cat": True}, "cat: unexpected keyword"), ({"up": {"delay_s": -1}}, "negative")):
            answer = await ask(process, **change)
            assert answer["event"] == "refused"
            assert complaint in answer["error"]
        assert await round_trip_s(address) < 1.0
        assert (await leave(process))[0] == 0


async def test_it_carries_connections_when_nobody_speaks_to_it() -> None:
    async with echo() as target:
        for stdin in (DEVNULL, PIPE):
            process = await proxy_process("--listen", "127.0.0.1:0", "--target", target, stdin=stdin)
            if process.stdin is not None:
                process.stdin.close()
            await round_trip_s((await event(process))["address"])
            assert (await leave(process))[0] == 0


async def test_it_does_not_wait_for_a_target_that_does_not_answer() -> None:
    # A queue that is full: the kernel neither accepts nor refuses the next one.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, socket.create_connection(deaf.getsockname()):
        process = await proxy_process("--listen", "127.0.0.1:0", "--target", f"127.0.0.1:{deaf.getsockname()[1]}")
        async with connected((await event(process))["address"]) as (_, writer):
            writer.write(b"is anybody there?")
            assert await ask(process) == {"event": "changed"}, "it has seen the connection by now"
            code, took_s = await leave(process)
    assert code == 0
    assert took_s < 1.0


async def test_a_port_that_another_proxy_has_is_refused_by_name() -> None:
    async with echo() as target, Proxy(target) as other:
        process = await proxy_process("--listen", other.address, "--target", target)
        async with asyncio.timeout(DEADLINE_S):
            _, stderr = await process.communicate()
        assert process.returncode == 2
        assert f"cannot listen on {other.address}".encode() in stderr


@pytest.mark.parametrize("target", ["peer-0", "peer-0:", "peer-0:0", ":7702", "peer-0:70000"])
async def test_a_target_that_is_no_address_is_refused(target: str) -> None:
    process = await proxy_process("--listen", "127.0.0.1:0", "--target", target)
    _, stderr = await process.communicate()
    assert process.returncode == 2
    assert b"is not host:port" in stderr


async def test_a_name_is_resolved_anew_for_each_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[str] = []
    loop = asyncio.get_running_loop()
    resolve = loop.getaddrinfo

    async def lookup(host: str, port: int, **how: Any) -> Any:
        if host != "peer-0":
            return await resolve(host, port, **how)
        address, _, there = where[-1].rpartition(":")
        return await resolve(address, int(there), **how)

    monkeypatch.setattr(loop, "getaddrinfo", lookup)
    async with echo() as first, echo() as second, Proxy("peer-0:7702") as proxy:
        for address in (first, second):
            where.append(address)
            await round_trip_s(proxy.address)
        where.append("127.0.0.1:1")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await round_trip_s(proxy.address)
