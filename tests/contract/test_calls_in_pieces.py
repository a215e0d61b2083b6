"""Forward and Backward in pieces: the answers of the calls in one piece, and all that holds for those."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from expert_calls import (
    ENCODINGS,
    RUN,
    Gated,
    backward_call,
    begun,
    forward_call,
    refused,
    serving,
    stock_backward,
    stock_forward,
    values,
    waiting_rows,
)

from moe_net.proto.v1 import expert_pb2
from moe_net.rpc import grpc_client
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.types import Encoding, PeerInfo
from moe_net.wire.validate import Limits
from moe_peer.batcher import Kind
from moe_peer.server import SERVICE, ExpertServer

ROWS = 9000
"""Of 32 bytes, and as much again of routing: several pieces of a stock client."""


@pytest.fixture
def everything_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_client, "IN_PIECES_BYTES", 0)


def stock_pieces(message: Any, n_bytes: int = 70_000) -> Iterator[expert_pb2.Piece]:
    data = message.SerializeToString()
    for start in range(0, len(data), n_bytes):
        yield expert_pb2.Piece(total_bytes=0 if start else len(data), data=data[start : start + n_bytes])


async def stock_answer(pieces: Any, kind: Any) -> Any:
    got = [piece async for piece in pieces]
    assert got[0].total_bytes == sum(len(piece.data) for piece in got)
    return kind.FromString(b"".join(piece.data for piece in got))


@pytest.mark.usefixtures("everything_in_pieces")
@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_in_pieces_a_stock_client_and_ours_get_the_answers_of_one_piece(encoding: Encoding) -> None:
    call = forward_call(encoding=encoding, n_rows=ROWS)
    back = backward_call(call, resend=True)
    async with serving() as (_, ours), serving() as (_, stock), serving() as (_, whole):
        reply = await whole.stub.Forward(stock_forward(call), timeout=30)
        gradient = await whole.stub.Backward(stock_backward(back), timeout=30)
        answer = await ours.transport.forward(ours.peer, call, timeout_s=30)
        result = await ours.transport.backward(ours.peer, back, timeout_s=30)
        assert torch.equal(answer.y_RD, values(reply.y_data, reply.y))
        assert (list(answer.failed_experts), answer.versions) == ([3], {0: 0, 1: 0, 2: 0})
        assert torch.equal(result.dx_RD, values(gradient.dx_data, gradient.dx))
        got = await stock_answer(
            stock.stub.ForwardInPieces(stock_pieces(stock_forward(call)), timeout=30), expert_pb2.ForwardReply
        )
        assert (got.y_data, got.y, got.failed_expert) == (reply.y_data, reply.y, reply.failed_expert)
        back_pieces = stock_pieces(stock_backward(back))
        got = await stock_answer(stock.stub.BackwardInPieces(back_pieces, timeout=30), expert_pb2.BackwardReply)
        assert (got.dx_data, got.gate_grad) == (gradient.dx_data, gradient.gate_grad)


async def test_only_large_messages_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noting(way: Any) -> Any:
        def call(*arguments: Any) -> Any:
            asked.append(way.__name__)
            return way(*arguments)

        return call

    for way in (GrpcTransport._whole, GrpcTransport._in_pieces):
        monkeypatch.setattr(GrpcTransport, way.__name__, noting(way))
    async with serving() as (_, client):
        for n_rows in (5, 60_000):
            await client.transport.forward(client.peer, forward_call(n_rows=n_rows), timeout_s=30)
        with pytest.raises(CallError, match="OUT_OF_RANGE: x: 150000 rows"):
            await client.transport.forward(client.peer, forward_call(n_rows=150_000), timeout_s=30)
    assert asked == ["_whole", "_whole", "_in_pieces"]
    assert client.transport.traffic.calls == 3


@pytest.mark.usefixtures("everything_in_pieces")
async def test_refusals_in_pieces_have_the_statuses_of_those_in_one() -> None:
    async with serving() as (_, client):
        bad = forward_call()
        bad = replace(bad, rows=replace(bad.rows, x_RD=bad.rows.x_RD * float("nan")))
        with pytest.raises(CallError, match="INVALID_ARGUMENT: x: holds an infinity or NaN"):
            await client.transport.forward(client.peer, bad, timeout_s=10)
        with pytest.raises(CallError, match="send them along") as caught:
            await client.transport.backward(client.peer, backward_call(forward_call()), timeout_s=10)
        assert caught.value.failure is CallFailure.INPUTS_GONE


PIECES: dict[str, tuple[Sequence[expert_pb2.Piece], grpc.StatusCode, str]] = {
    "none": ([], grpc.StatusCode.INVALID_ARGUMENT, "no piece came"),
    "without a total": ([expert_pb2.Piece(data=b"x")], grpc.StatusCode.INVALID_ARGUMENT, "total_bytes: missing"),
    "more than a message may have": (
        [expert_pb2.Piece(total_bytes=2**40, data=b"x")], grpc.StatusCode.OUT_OF_RANGE, "the limit is",
    ),
    "less than said": ([expert_pb2.Piece(total_bytes=9, data=b"x")], grpc.StatusCode.INVALID_ARGUMENT, "only the last"),
    "no message": ([expert_pb2.Piece(total_bytes=1, data=b"x")], grpc.StatusCode.INVALID_ARGUMENT, "x_data: the"),
}  # fmt: skip


@pytest.mark.parametrize("what", PIECES)
async def test_malformed_pieces_are_refused_with_the_reason(what: str) -> None:
    pieces, code, reason = PIECES[what]
    async with serving() as (server, client):
        got, details = await refused(client.stub.ForwardInPieces(iter(pieces), timeout=10).read())
        assert got is code
        assert reason in details
        assert server._batcher.reserved_bytes == 0


@pytest.mark.usefixtures("everything_in_pieces")
async def test_a_busy_server_refuses_the_first_piece_and_says_what_the_wait_is() -> None:
    host = Gated()
    host.gate.set()
    async with serving(host) as (server, client):
        await client.transport.forward(client.peer, forward_call(), timeout_s=30)
        await begun(host)
        host.gate.clear()
        pace = server._batcher._row_times[Kind.FORWARD]
        pace.mean_s = pace.mean_rows = 10.0
        running = client.stub.Forward(stock_forward(forward_call()), timeout=60)
        await begun(host)
        waiting = client.stub.Forward(stock_forward(forward_call()), timeout=60)
        await waiting_rows(server, 5)
        with pytest.raises(CallError) as caught:
            await client.transport.forward(client.peer, forward_call(), timeout_s=2)
        assert caught.value.failure is CallFailure.BUSY
        assert 5 < caught.value.queue_s <= 10
        first = expert_pb2.Piece(total_bytes=2**20, data=bytes(2**16))
        stream = client.stub.ForwardInPieces(timeout=2)
        await stream.write(first)  # the rest never comes, and is not waited for
        assert (await refused(stream.read()))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        host.gate.set()
        assert (await running).y.rows == (await waiting).y.rows == 5


async def reserved(server: ExpertServer, n_bytes: int) -> None:
    async with asyncio.timeout(30):
        while server._batcher.reserved_bytes != n_bytes:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def leave(server: ExpertServer, stream: Any, rest: Sequence[expert_pb2.Piece]) -> None:
    stream.cancel()


async def end_early(server: ExpertServer, stream: Any, rest: Sequence[expert_pb2.Piece]) -> None:
    await stream.done_writing()
    assert (await refused(stream.read()))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def send_nonsense(server: ExpertServer, stream: Any, rest: Sequence[expert_pb2.Piece]) -> None:
    await stream.write(expert_pb2.Piece(data=b"x"))
    assert (await refused(stream.read()))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def fall_silent(server: ExpertServer, stream: Any, rest: Sequence[expert_pb2.Piece]) -> None:
    server._chunk_timeout_s = 0.1
    await stream.write(rest[0])
    assert (await refused(stream.read()))[0] is grpc.StatusCode.DEADLINE_EXCEEDED


async def send_the_rest(server: ExpertServer, stream: Any, rest: Sequence[expert_pb2.Piece]) -> None:
    for piece in rest:
        await stream.write(piece)
    await stream.done_writing()
    assert (await stream.read()).total_bytes


@pytest.mark.parametrize("way_out", [leave, end_early, send_nonsense, fall_silent, send_the_rest])
async def test_what_will_come_in_pieces_is_counted_once_from_the_first_one_until_it_is_read(way_out: Any) -> None:
    first, *rest = stock_pieces(stock_forward(forward_call(n_rows=ROWS)))
    host = Gated()
    host.gate.set()
    async with serving(host, max_queue_bytes=first.total_bytes + 1000) as (server, client):
        stream = client.stub.ForwardInPieces(timeout=30)
        await stream.write(first)
        await reserved(server, first.total_bytes)
        for late in (
            client.stub.ForwardInPieces(iter([first]), timeout=30).read(),
            client.stub.Forward(stock_forward(forward_call(n_rows=99)), timeout=30),
        ):
            code, details = await refused(late)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "this call has 0 rows" in details or "are coming in pieces" in details, "refused before it is read"
        assert host.calls == 0
        await way_out(server, stream, rest)
        await reserved(server, 0)
        assert host.calls == (way_out is send_the_rest)
        # As large a one again has room, alone.
        await client.transport.forward(client.peer, forward_call(n_rows=ROWS), timeout_s=30)


async def test_what_comes_slowly_in_pieces_leaves_room_for_calls_that_are_there() -> None:
    first, *_ = stock_pieces(stock_forward(forward_call(n_rows=ROWS)))
    async with serving(max_queue_bytes=4 * first.total_bytes) as (server, client):
        coming = [client.stub.ForwardInPieces(timeout=30) for _ in range(2)]
        for stream in coming:
            await stream.write(first)
        await reserved(server, 2 * first.total_bytes)
        third = client.stub.ForwardInPieces(iter([first]), timeout=30)
        code, details = await refused(third.read())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "are coming in pieces, at most half of" in details
        whole = await client.stub.Forward(stock_forward(forward_call(n_rows=ROWS)), timeout=30)
        assert whole.y.rows == ROWS
        for stream in coming:
            stream.cancel()
        await reserved(server, 0)


@pytest.mark.usefixtures("everything_in_pieces")
async def test_a_busy_server_is_busy_also_to_whom_it_refuses_while_pieces_are_on_their_way() -> None:
    large = forward_call(n_rows=60_000)
    first, *_ = stock_pieces(stock_forward(forward_call(n_rows=ROWS)))
    async with serving(max_queue_bytes=2 * first.total_bytes, sparing=True) as (server, client):
        coming = client.stub.ForwardInPieces(timeout=60)
        await coming.write(first)
        await reserved(server, first.total_bytes)
        for _ in range(10):
            with pytest.raises(CallError) as caught:
                await client.transport.forward(client.peer, large, timeout_s=30)
            assert caught.value.failure is CallFailure.BUSY, caught.value
        coming.cancel()


@pytest.mark.usefixtures("everything_in_pieces")
async def test_a_call_in_pieces_whose_client_left_is_not_computed() -> None:
    host = Gated()
    async with serving(host) as (server, client):
        running = asyncio.create_task(client.transport.forward(client.peer, forward_call(), timeout_s=30))
        await begun(host)
        leaving = asyncio.create_task(client.transport.forward(client.peer, forward_call(), timeout_s=30))
        await waiting_rows(server, 5)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        async with asyncio.timeout(30):
            while any(job.waiters for queue in server._batcher._queues.values() for job in queue.jobs):  # noqa: ASYNC110
                await asyncio.sleep(0)
        host.gate.set()
        assert (await running).y_RD.shape[0] == 5
        await client.transport.forward(client.peer, forward_call(), timeout_s=30)
    assert host.calls == 2


@pytest.mark.usefixtures("everything_in_pieces")
async def test_a_late_answer_in_pieces_is_late() -> None:
    host = Gated()
    async with serving(host) as (_, client):
        with pytest.raises(CallError) as caught:
            await client.transport.forward(client.peer, forward_call(), timeout_s=0.3)
        host.gate.set()
    assert caught.value.failure is CallFailure.LATE


async def test_who_sends_no_piece_loses_the_place() -> None:
    async with serving(chunk_timeout_s=0.2) as (_, client):
        code, details = await refused(client.stub.ForwardInPieces().read())
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no piece came" in details


@pytest.mark.usefixtures("everything_in_pieces")
@pytest.mark.parametrize(
    "pieces", [[], [expert_pb2.Piece(total_bytes=3, data=b"abc")], [expert_pb2.Piece(total_bytes=2**50, data=b"a")]]
)
async def test_a_peer_whose_pieces_do_not_fit_has_answered_nonsense(pieces: Sequence[expert_pb2.Piece]) -> None:
    async def answer(requests: Any, context: Any) -> None:
        async for _ in requests:
            pass
        for piece in pieces:
            await context.write(piece.SerializeToString())

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handlers = {"ForwardInPieces": grpc.stream_stream_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    transport = GrpcTransport(run=RUN.name, shape=RUN.model.expert_shape, limits=Limits(max_message_bytes=2**20))
    try:
        peer = PeerInfo(peer_id="p", address=f"127.0.0.1:{port}", experts=())
        with pytest.raises(CallError, match="unreadable answer to Forward") as caught:
            await transport.forward(peer, forward_call(), timeout_s=10)
    finally:
        await transport.close()
        await server.stop(None)
    assert caught.value.failure is CallFailure.REFUSED
