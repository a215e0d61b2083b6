"""The proxy on real sockets, under both event loops it is used with."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_coordinator.proxy import Proxy
from moe_coordinator.shaping import MIB, PERFECT, WINDOW_BYTES, Conditions

DEADLINE_S = 20.0
# Nothing that can be awaited says that nothing comes: this long nothing must come.
SILENCE_S = 0.05
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


Test = Callable[..., Coroutine[Any, Any, None]]


def on_both_loops(test: Test) -> Callable[..., None]:
    """The test under asyncio's own event loop, which tests run on, and under uvloop, which the launcher runs on."""

    def runs(loop: Callable[[Coroutine[Any, Any, None]], None], **arguments: Any) -> None:
        loop(test(**arguments))

    runs.__name__ = test.__name__
    own = inspect.signature(test).parameters.values()
    first = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)
    runs.__signature__ = inspect.Signature([*own, first])  # type: ignore[attr-defined]
    return pytest.mark.parametrize("loop", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])(runs)


class Server:
    """Answers every byte with itself, or hands the streams over."""

    def __init__(self) -> None:
        self.echoes = True
        self.address = ""
        self.streams: asyncio.Queue[Streams] = asyncio.Queue()
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        self.streams.put_nowait((reader, writer))
        if not self.echoes:
            return
        try:
            while data := await reader.read(1 << 18):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # the proxy was cut or left
        await hang_up(writer)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        await writer.wait_closed()
    except ConnectionError:
        return


@asynccontextmanager
async def server(*, echoes: bool = True) -> AsyncIterator[Server]:
    state = Server()
    state.echoes = echoes
    listener = await asyncio.start_server(state.serve, "127.0.0.1", 0)
    state.address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield state
    finally:
        listener.close()
        for writer in state.writers:
            writer.transport.abort()
            await hang_up(writer)
        await listener.wait_closed()


@asynccontextmanager
async def client(proxy: Proxy) -> AsyncIterator[Streams]:
    host, _, port = proxy.address.rpartition(":")
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(host, int(port), limit=4 * MIB)
        try:
            yield reader, writer
        finally:
            await hang_up(writer)


@asynccontextmanager
async def connected(**how: Any) -> AsyncIterator[tuple[Proxy, Server, Streams]]:
    async with server() as echo, Proxy(echo.address, **how) as proxy, client(proxy) as streams:
        yield proxy, echo, streams


async def there_and_back(streams: Streams, data: bytes) -> tuple[bytes, float]:
    """What came back, and after how many seconds."""
    reader, writer = streams
    began_s = time.perf_counter()
    writer.write(data)
    answer = await reader.readexactly(len(data))
    return answer, time.perf_counter() - began_s


async def nothing_comes(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(SILENCE_S):
            return not await reader.read(1)
    except TimeoutError:
        return True


async def is_held_back(writer: asyncio.StreamWriter) -> bool:
    """Whether what was written stays where it is."""
    try:
        async with asyncio.timeout(0.3):
            await writer.drain()
    except TimeoutError:
        return True
    return False


@on_both_loops
async def test_without_conditions_it_is_a_pipe_with_two_ends() -> None:
    async with connected() as (proxy, _, (reader, writer)):
        data = random.Random(0).randbytes(5 * MIB)
        answer, _ = await there_and_back((reader, writer), data)
        assert answer == data
        writer.write(b"the last words")
        writer.write_eof()
        assert await reader.read() == b"the last words", "what was sent before the end arrives, and then the end"
        assert proxy.bytes_up == proxy.bytes_down == len(data) + 14
        assert proxy.accepted == 1


@on_both_loops
async def test_half_a_close_leaves_the_other_half_open() -> None:
    async with server(echoes=False) as silent, Proxy(silent.address) as proxy, client(proxy) as (reader, writer):
        writer.write_eof()
        at_reader, at_writer = await silent.streams.get()
        assert await at_reader.read() == b""
        at_writer.write(b"still here")
        assert await reader.readexactly(10) == b"still here"
        await hang_up(at_writer)
        assert await reader.read() == b""


@on_both_loops
async def test_a_round_trip_takes_the_delays_of_both_directions() -> None:
    async with connected(up=Conditions(delay_s=0.06), down=Conditions(delay_s=0.04)) as (_, _, streams):
        took_s = [(await there_and_back(streams, b"x" * n))[1] for n in (1, 1000, MIB)]
        assert min(took_s) >= 0.1
        assert min(took_s) < 0.2


@on_both_loops
async def test_delayed_bytes_travel_together_and_not_one_after_another() -> None:
    async with connected(up=Conditions(delay_s=0.1)) as (_, _, (reader, writer)):
        began_s = time.perf_counter()
        for _ in range(50):
            writer.write(b"x" * 100)
            await asyncio.sleep(0)
        await reader.readexactly(5000)
        assert time.perf_counter() - began_s < 1.0, "not 50 x 0.1 s"


@on_both_loops
async def test_a_delay_that_ends_does_not_let_later_bytes_overtake() -> None:
    async with connected(up=Conditions(delay_s=0.1)) as (proxy, _, (reader, writer)):
        writer.write(b"first")
        await asyncio.sleep(0.01)
        proxy.up = PERFECT
        writer.write(b"second")
        assert await reader.readexactly(11) == b"firstsecond"


async def carry(pieces: list[bytes], seed: int, conditions: Conditions) -> bytes:
    async with connected(seed=seed, up=conditions, down=conditions) as (_, _, (reader, writer)):
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)
        writer.write_eof()
        return await reader.read()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@settings(max_examples=15, deadline=None)
@given(
    pieces=st.lists(st.integers(0, 200_000), max_size=12),
    seed=st.integers(0, 99),
    jitter_s=st.floats(0, 0.02),
    bandwidth_mib_s=st.none() | st.floats(20, 200),
)
def test_bytes_keep_their_order_and_their_values_under_any_delay(
    run: Callable[[Coroutine[Any, Any, bytes]], bytes],
    pieces: list[int],
    seed: int,
    jitter_s: float,
    bandwidth_mib_s: float | None,
) -> None:
    conditions = Conditions(
        delay_s=0.001, jitter_s=jitter_s, tail_probability=0.1, tail_s=0.01, bandwidth_mib_s=bandwidth_mib_s
    )
    data = [random.Random(seed + i).randbytes(n) for i, n in enumerate(pieces)]
    assert run(carry(data, seed, conditions)) == b"".join(data)


@on_both_loops
async def test_damage_is_where_the_seed_says_and_nowhere_else() -> None:
    data = bytes(4 * MIB)
    up = Conditions(corrupt_per_mib=4.0)

    async def damage(seed: int) -> list[int]:
        async with connected(seed=seed, up=up) as (_, _, streams):
            answer, _ = await there_and_back(streams, data)
        return [position for position, byte in enumerate(answer) if byte]

    first, again, other = await damage(1), await damage(1), await damage(2)
    assert first == again != other
    assert 4 <= len(first) <= 40


@on_both_loops
async def test_the_bandwidth_is_kept_and_shared() -> None:
    async with connected(up=Conditions(bandwidth_mib_s=8.0)) as (proxy, _, one), client(proxy) as other:
        began_s = time.perf_counter()
        await asyncio.gather(there_and_back(one, bytes(MIB)), there_and_back(other, bytes(MIB)))
        assert 0.25 <= time.perf_counter() - began_s < 1.0
        proxy.up = PERFECT
        assert (await there_and_back(one, bytes(MIB)))[1] < 0.2


@on_both_loops
async def test_a_sender_that_nobody_reads_from_is_held_back() -> None:
    async with server(echoes=False) as deaf, Proxy(deaf.address) as proxy, client(proxy) as (_, writer):
        (at_reader, _) = await deaf.streams.get()
        total = 0
        while not await is_held_back(writer):
            writer.write(bytes(MIB))
            total += MIB
            assert total < 64 * MIB
        received = 0
        writer.write_eof()
        while data := await at_reader.read(MIB):
            received += len(data)
        assert received == total, "nothing of it was lost"


@on_both_loops
async def test_what_waits_in_a_blackhole_is_bounded() -> None:
    async with connected() as (proxy, _, (reader, writer)):
        await there_and_back((reader, writer), b"x")
        proxy.blackhole()
        writer.write(bytes(4 * WINDOW_BYTES))
        assert await is_held_back(writer)
        proxy.end_blackhole()
        await reader.readexactly(4 * WINDOW_BYTES)


@on_both_loops
async def test_a_blackhole_keeps_connections_accepts_more_and_carries_nothing_until_it_ends() -> None:
    async with connected() as (proxy, echo, (reader, writer)):
        await there_and_back((reader, writer), b"before")
        proxy.blackhole()
        writer.write(b"into the dark")
        async with client(proxy) as (late_reader, late_writer):
            late_writer.write(b"me too")
            assert await nothing_comes(reader)
            assert await nothing_comes(late_reader)
            assert proxy.bytes_up == 6
            assert echo.streams.qsize() == 1, "the server has not heard of the second connection"
            proxy.end_blackhole()
            assert await reader.readexactly(13) == b"into the dark"
            assert await late_reader.readexactly(6) == b"me too"


@on_both_loops
async def test_a_blackhole_ends_by_itself() -> None:
    async with connected() as (proxy, _, streams):
        proxy.blackhole(0.1)
        answer, took_s = await there_and_back(streams, b"patience")
        assert answer == b"patience"
        assert took_s >= 0.09


@on_both_loops
async def test_the_end_of_a_connection_does_not_leave_a_blackhole_either() -> None:
    async with server(echoes=False) as other_side, Proxy(other_side.address) as proxy, client(proxy) as (reader, _):
        _, at_writer = await other_side.streams.get()
        proxy.blackhole()
        await hang_up(at_writer)
        assert await nothing_comes(reader)
        assert not reader.at_eof()
        proxy.end_blackhole()
        assert await reader.read() == b""


@pytest.mark.parametrize("direction", ["up", "down"])
@on_both_loops
async def test_half_open_is_silence_in_one_direction(direction: str) -> None:
    async with server(echoes=False) as other_side, Proxy(other_side.address) as proxy, client(proxy) as here:
        there = await other_side.streams.get()
        setattr(proxy, direction, Conditions(silent=True))
        (silent_reader, _), (_, silent_writer) = (there, here) if direction == "up" else (here, there)
        (open_reader, _), (_, open_writer) = (here, there) if direction == "up" else (there, here)
        silent_writer.write(b"lost?")
        open_writer.write(b"heard")
        assert await open_reader.readexactly(5) == b"heard"
        assert await nothing_comes(silent_reader)
        setattr(proxy, direction, PERFECT)
        assert await silent_reader.readexactly(5) == b"lost?"


@on_both_loops
async def test_a_cut_resets_both_ends_and_refuses_until_it_is_over() -> None:
    async with server(echoes=False) as other_side, Proxy(other_side.address) as proxy, client(proxy) as (reader, _):
        at_reader, _ = await other_side.streams.get()
        proxy.cut(3600)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        with pytest.raises(ConnectionResetError):
            await at_reader.read()
        with pytest.raises(ConnectionRefusedError):
            async with client(proxy):
                pass
        proxy.end_cut()
        async with client(proxy) as (_, writer):
            writer.write(b"again")
            at_reader, _ = await other_side.streams.get()
            assert await at_reader.readexactly(5) == b"again"


@on_both_loops
async def test_a_cut_ends_by_itself_and_one_without_duration_refuses_nobody() -> None:
    async with connected() as (proxy, _, (reader, _)):
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        async with client(proxy) as streams:
            await there_and_back(streams, b"x")
        proxy.cut(0.05)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    async with client(proxy) as streams:
                        await there_and_back(streams, b"x")
                        break
                except ConnectionRefusedError:
                    await asyncio.sleep(0)


@on_both_loops
async def test_a_connection_that_waits_in_a_blackhole_can_be_cut() -> None:
    async with server() as echo, Proxy(echo.address) as proxy:
        proxy.blackhole()
        async with client(proxy) as (reader, writer):
            writer.write(b"x")
            await nothing_comes(reader)
            proxy.cut()
            with pytest.raises(ConnectionResetError):
                await reader.read()


@on_both_loops
async def test_a_reset_by_the_server_reaches_the_client_and_the_other_way_round() -> None:
    async with server(echoes=False) as other_side, Proxy(other_side.address) as proxy:
        async with client(proxy) as (reader, _):
            _, at_writer = await other_side.streams.get()
            reset(at_writer)
            with pytest.raises(ConnectionResetError):
                await reader.read()
        async with client(proxy) as (_, writer):
            at_reader, _ = await other_side.streams.get()
            reset(writer)
            with pytest.raises(ConnectionResetError):
                await at_reader.read()


def reset(writer: asyncio.StreamWriter) -> None:
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()


@on_both_loops
async def test_who_calls_for_a_server_that_is_not_there_is_reset() -> None:
    async with Proxy() as proxy:
        for target in (None, "127.0.0.1:1"):
            proxy.target = target
            async with client(proxy) as (reader, _):
                with pytest.raises(ConnectionResetError):
                    await reader.read()


@on_both_loops
async def test_a_new_target_is_for_new_connections() -> None:
    async with server() as other, connected() as (proxy, _, streams):
        await there_and_back(streams, b"x")
        proxy.target = other.address
        async with client(proxy) as late:
            await there_and_back(late, b"x")
        await there_and_back(streams, b"x")
        assert other.streams.qsize() == 1


@pytest.mark.parametrize("conditions", [PERFECT, Conditions(delay_s=5.0), Conditions(silent=True)])
@on_both_loops
async def test_leaving_closes_whatever_is_open_and_leaves_nothing(conditions: Conditions) -> None:
    tasks = asyncio.all_tasks()
    async with server() as echo:
        async with Proxy(echo.address) as proxy, asyncio.timeout(DEADLINE_S):
            address = proxy.address.rpartition(":")
            streams = [await asyncio.open_connection(address[0], int(address[2])) for _ in range(3)]
            await there_and_back(streams[0], b"x")
            proxy.shape(conditions)
            streams[1][1].write(b"on its way")
            streams.append(await asyncio.open_connection(address[0], int(address[2])))
        for reader, writer in streams:
            try:
                assert await reader.read() in (b"", b"on its way")
            except ConnectionResetError:
                assert writer.transport.is_closing()
            await hang_up(writer)
        assert proxy.connections == 0
    while asyncio.all_tasks() - tasks:
        await asyncio.wait(asyncio.all_tasks() - tasks, timeout=DEADLINE_S)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(address[0], int(address[2]))
