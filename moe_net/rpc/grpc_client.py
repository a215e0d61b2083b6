"""ExpertTransport over gRPC: one channel per address, raw bytes through our codec.

Create it, and use it, on the event loop that shall own the channels.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar, cast

import grpc
import grpc.aio
import numpy as np
from torch import Tensor

from moe_net.errors import CheckpointError, LimitError, WireError
from moe_net.proto.v1 import expert_pb2
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.served import note_served
from moe_net.types import ExpertId, ExpertShape, PeerInfo
from moe_net.wire import codec
from moe_net.wire.exchange import ChunkReader, ExchangeHead, write_chunks
from moe_net.wire.framing import Parts
from moe_net.wire.messages import (
    BackwardAnswer,
    BackwardCall,
    CommitAnswer,
    CommitCall,
    ForwardAnswer,
    ForwardCall,
)
from moe_net.wire.pieces import IN_PIECES_BYTES, PieceReader, cut
from moe_net.wire.share import Share, ShareCall, max_share_bytes, share_from_state
from moe_net.wire.snapshot import pack, unpack
from moe_net.wire.state import check_state, experts_in, max_state_bytes
from moe_net.wire.validate import Limits

FIRST_CHUNK_S, CHUNK_STALL_S = 20.0, 5.0
"""How long a peer may take to begin sending state (it copies and digests it first), and may pause then."""
MAX_CONNECTIONS = 4
"""To a peer. Of many calls in one connection each waits for the bytes of those before it, and for a packet of theirs
that was lost; one after the other they take only one."""
IDLE_S = 120.0
"""After so long without a call a connection is let go when another address gets its first: its peer has left, or has
moved. Who trains asks every peer at each step."""
AnswerT = TypeVar("AnswerT")
SERVICE = "/moe_net.v1.ExpertService/"
UNTAKEN = "Internal error from Core"
QUEUE_US_KEY = "moe-queue-us"
"""Of the trailing metadata of a RESOURCE_EXHAUSTED: how long a call would wait just now, in decimal."""

_FAILURES = {
    grpc.StatusCode.UNAVAILABLE: CallFailure.UNREACHABLE,
    grpc.StatusCode.CANCELLED: CallFailure.UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: CallFailure.LATE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: CallFailure.BUSY,
    grpc.StatusCode.FAILED_PRECONDITION: CallFailure.INPUTS_GONE,
    grpc.StatusCode.ABORTED: CallFailure.STALE_STEP,
}


def channel_options(limits: Limits, *, window_bytes: int | None = None) -> list[tuple[str, Any]]:
    """gRPC channel arguments that clients and servers share. `window_bytes`: what may come of a call before it is read;
    by default as much as a message has at most."""
    return [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        # Windows as large as a message, so that none waits for credit half-way, and frames to match (1 MiB: 1.27 ->
        # 0.95 ms with the older poller, 0.82 with these).
        ("grpc.http2.lookahead_bytes", window_bytes or limits.max_message_bytes),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.write_buffer_size", 4 * 2**20),
        ("grpc.http2.max_frame_size", 2**20),
        # A volunteer's machine comes back within seconds more often than not.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # A peer that vanished without a word (power, cable) is noticed by unanswered pings.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Every trainer has a connection of its own to a peer, even within one process.
        ("grpc.use_local_subchannel_pool", 1),
        # `http_proxy` in the environment is for the web.
        ("grpc.enable_http_proxy", 0),
    ]


@dataclass(slots=True)
class Traffic:
    """Message bytes (HTTP/2 framing not included) and calls since the start."""

    sent_bytes: int = 0
    received_bytes: int = 0
    calls: int = 0


@dataclass(slots=True)
class _Connection:
    channel: grpc.aio.Channel
    methods: dict[str, Callable[..., Any]]
    n_calls: int = 0
    """Under way."""
    used_s: float = field(default_factory=time.monotonic)


class GrpcTransport:
    """Calls expert servers by the address in their record."""

    def __init__(self, *, run: str, shape: ExpertShape, limits: Limits | None = None) -> None:
        """`run` and `shape` are what a peer's experts must be of, when their state is fetched."""
        self._run = run
        self._shape = shape
        self._limits = limits or Limits()
        self._connections: dict[str, list[_Connection]] = {}
        self.traffic = Traffic()

    @contextmanager
    def _methods(self, address: str) -> Generator[dict[str, Callable[..., Any]]]:
        """Of the connection with the fewest calls; a new one rather than one with any, while there are few."""
        if address not in self._connections:
            self._let_go_idle()
        connections = self._connections.setdefault(address, [])
        best = min(connections, key=lambda connection: connection.n_calls, default=None)
        if best is None or (best.n_calls and len(connections) < MAX_CONNECTIONS):
            best = self._connect(address)
            connections.append(best)
        best.n_calls += 1
        try:
            yield best.methods
        except CallError as error:
            # Of several that wait before they connect again, one would fail calls to a peer that is back: the first one
            # alone may wait. (What is let go closes itself when its last call is over.)
            if error.failure is CallFailure.UNREACHABLE and best in connections[1:]:
                connections.remove(best)
            raise
        finally:
            best.n_calls -= 1
            best.used_s = time.monotonic()

    def _let_go_idle(self) -> None:
        idle_since_s = time.monotonic() - IDLE_S
        for address, connections in list(self._connections.items()):
            connections[:] = [c for c in connections if c.n_calls or c.used_s > idle_since_s]
            if not connections:
                del self._connections[address]

    def _connect(self, address: str) -> _Connection:
        channel = grpc.aio.insecure_channel(address, options=channel_options(self._limits))
        methods: dict[str, Callable[..., Any]] = {
            # No (de)serialiser: raw bytes in, raw bytes out.
            name: channel.unary_unary(SERVICE + name, None, None)
            for name in ("Forward", "Backward", "Commit", "Info")
        }
        for name in ("ForwardInPieces", "BackwardInPieces"):
            methods[name] = channel.stream_stream(SERVICE + name, None, None)
        methods["Fetch"] = channel.unary_stream(SERVICE + "Fetch", None, None)
        methods["Share"] = channel.unary_stream(SERVICE + "Share", None, None)
        methods["Exchange"] = channel.stream_stream(SERVICE + "Exchange", None, None)
        return _Connection(channel, methods)

    async def _call(
        self, peer: PeerInfo, method: str, request: Parts, read: Callable[[bytes | memoryview], AnswerT],
        timeout_s: float,
    ) -> AnswerT:  # fmt: skip
        self.traffic.calls += 1
        exchange = self._whole if sum(map(len, request)) <= IN_PIECES_BYTES else self._in_pieces
        try:
            return read(await exchange(peer, method, request, timeout_s))
        except WireError as error:
            raise CallError(CallFailure.REFUSED, peer.peer_id, f"unreadable answer to {method}: {error}") from error

    async def _whole(self, peer: PeerInfo, method: str, request: Parts, timeout_s: float) -> bytes:
        whole = b"".join(request)
        self.traffic.sent_bytes += len(whole)
        with self._methods(peer.address) as methods:
            reply = await _answer(peer, cast("Awaitable[bytes]", methods[method](whole, timeout=timeout_s)))
        self.traffic.received_bytes += len(reply)
        return reply

    async def _in_pieces(self, peer: PeerInfo, method: str, request: Parts, timeout_s: float) -> memoryview:
        """As `_whole`; WireError, too, when the pieces of the reply do not fit."""

        def pieces() -> Iterator[bytes]:
            for piece in cut(request):
                self.traffic.sent_bytes += len(piece)
                yield piece

        reader = PieceReader(self._limits)
        with self._methods(peer.address) as methods:
            stream = methods[method + "InPieces"](pieces(), timeout=timeout_s)
            try:
                while raw := await _answer(peer, cast("Awaitable[bytes]", stream.read())):  # empty: grpc.aio.EOF
                    self.traffic.received_bytes += len(raw)
                    reader.feed(raw)
                return reader.finish()
            finally:
                stream.cancel()  # nothing, unless we left before its end

    def _stream(self, peer: PeerInfo, method: str, request: bytes | AsyncIterator[bytes], timeout_s: float) -> Any:
        """Rare ones, for which no connection of their own is worth it."""
        with self._methods(peer.address) as methods:
            return methods[method](request, timeout=timeout_s)

    async def forward(self, peer: PeerInfo, call: ForwardCall, *, timeout_s: float) -> ForwardAnswer:
        request = codec.forward_call_parts(call)
        answer = await self._call(
            peer, "Forward", request, lambda data: codec.decode_forward_answer(data, self._limits), timeout_s
        )
        _same_shape(peer, answer.y_RD, call.rows.x_RD)
        _only_asked(peer, (*answer.failed_experts, *answer.versions), call.rows.expert_index_P)
        note_served(answer)
        return answer

    async def backward(self, peer: PeerInfo, call: BackwardCall, *, timeout_s: float) -> BackwardAnswer:
        request = codec.backward_call_parts(call)
        answer = await self._call(
            peer, "Backward", request, lambda data: codec.decode_backward_answer(data, self._limits), timeout_s
        )
        _same_shape(peer, answer.dx_RD, call.grad_RD)
        note_served(answer)
        return answer

    async def commit(self, peer: PeerInfo, call: CommitCall, *, timeout_s: float) -> CommitAnswer:
        return await self._call(peer, "Commit", [codec.encode_commit_call(call)], codec.decode_commit_answer, timeout_s)

    async def info(self, peer: PeerInfo, *, timeout_s: float) -> expert_pb2.InfoReply:
        """What the peer says of itself now."""
        request = expert_pb2.InfoRequest().SerializeToString()
        return await self._call(peer, "Info", [request], codec.decode_info, timeout_s)

    async def ping(self, peer: PeerInfo, *, timeout_s: float) -> None:
        await self.info(peer, timeout_s=timeout_s)

    async def fetch(
        self, peer: PeerInfo, layer: int, expert_index: Sequence[int], *, timeout_s: float
    ) -> dict[str, Tensor]:
        # An empty request is for all that the peer's record names: no more than was asked for is ever taken.
        asked = tuple(expert_index) or tuple(expert.index for expert in peer.experts if expert.layer == layer)
        request = expert_pb2.FetchRequest(layer=layer, expert_index=list(expert_index)).SerializeToString()
        self.traffic.calls += 1
        self.traffic.sent_bytes += len(request)
        stream = self._stream(peer, "Fetch", request, timeout_s)
        try:
            whole = await self._read_file(peer, stream, limit_bytes=max_state_bytes(len(asked), self._shape))
            state = await asyncio.to_thread(unpack, whole, run=self._run, shape=self._shape)
            # A peer leaves out what it has found broken.
            there = experts_in(state)
            indices = [index for index in asked if str(ExpertId(layer, index)) in there]
            check_state(state, layer=layer, indices=indices, shape=self._shape)
            if not indices:
                raise CheckpointError("none of the experts")
        except (CheckpointError, WireError) as error:
            detail = f"unusable state of layer {layer}: {error}"
            raise CallError(CallFailure.REFUSED, peer.peer_id, detail) from error
        finally:
            stream.cancel()  # nothing, unless we left before its end
        return state

    async def share(self, peer: PeerInfo, call: ShareCall, *, timeout_s: float) -> Share:
        """A replica's part of a step. CallError as everywhere; INPUTS_GONE: that step is over there."""
        request = codec.encode_share_call(call)
        self.traffic.calls += 1
        self.traffic.sent_bytes += len(request)
        stream = self._stream(peer, "Share", request, timeout_s)
        try:
            limit_bytes = max_share_bytes(len(call.experts), self._shape)
            whole = await self._read_file(peer, stream, limit_bytes=limit_bytes)
            return await asyncio.to_thread(self._read_share, whole, call.experts)
        except (CheckpointError, WireError) as error:
            detail = f"unusable share of a step: {error}"
            raise CallError(CallFailure.REFUSED, peer.peer_id, detail) from error
        finally:
            stream.cancel()  # nothing, unless we left before its end

    def _read_share(self, whole: bytes, asked: Sequence[ExpertId]) -> Share:
        state = unpack(whole, run=self._run, shape=self._shape)
        return share_from_state(state, asked=asked, shape=self._shape)

    async def _read_file(self, peer: PeerInfo, stream: Any, *, limit_bytes: int) -> bytes:
        """The chunks of a Fetch, joined. LimitError as soon as they are more than `limit_bytes`; WireError."""
        whole, claimed = bytearray(), b""
        while True:
            try:
                async with asyncio.timeout(CHUNK_STALL_S if whole else FIRST_CHUNK_S):
                    data = await _answer(peer, cast("Awaitable[bytes]", stream.read()))
            except TimeoutError:
                detail = f"sent nothing for a while, after {len(whole)} bytes"
                raise CallError(CallFailure.LATE, peer.peer_id, detail) from None
            if not data:  # grpc.aio.EOF
                break
            self.traffic.received_bytes += len(data)
            chunk, sha256 = codec.decode_fetch_chunk(data, self._limits)
            if not chunk:
                raise WireError("a chunk with nothing in it")
            if len(whole) + len(chunk) > limit_bytes:
                raise LimitError(f"more than {limit_bytes} bytes, which is more than these experts have")
            whole += chunk
            claimed = sha256 or claimed
        if hashlib.sha256(whole).digest() != claimed:
            raise WireError("it does not match its checksum")
        return bytes(whole)

    async def exchange(
        self, peer: PeerInfo, head: ExchangeHead, state: Mapping[str, Tensor], *, timeout_s: float
    ) -> dict[str, Tensor]:
        """Send our state of some experts; the mean that the partner has taken over, of the same experts.
        CallError as everywhere."""

        def limit_bytes(answer: ExchangeHead) -> int:
            if answer.layer != head.layer or set(answer.indices) != set(head.indices):
                raise WireError(f"layer, expert_index: answered layer {answer.layer}, {len(answer.indices)} experts")
            return max_state_bytes(len(head.indices), self._shape)

        data = await asyncio.to_thread(pack, state, run=self._run, shape=self._shape)

        async def chunks() -> AsyncIterator[bytes]:
            for chunk in write_chunks(head, data):
                self.traffic.sent_bytes += len(chunk)
                yield chunk

        self.traffic.calls += 1
        stream = self._stream(peer, "Exchange", chunks(), timeout_s)
        reader = ChunkReader(limit_bytes)
        try:
            while raw := await _answer(peer, cast("Awaitable[bytes]", stream.read())):  # empty: grpc.aio.EOF
                self.traffic.received_bytes += len(raw)
                reader.feed(raw)
            _, whole = await asyncio.to_thread(reader.finish)
            mean = await asyncio.to_thread(unpack, whole, run=self._run, shape=self._shape)
        except (WireError, CheckpointError) as error:
            stream.cancel()
            raise CallError(CallFailure.REFUSED, peer.peer_id, f"unreadable answer to Exchange: {error}") from error
        if experts_in(mean) != {str(ExpertId(head.layer, index)) for index in head.indices}:
            raise CallError(CallFailure.REFUSED, peer.peer_id, "answered Exchange with other experts")
        return mean

    async def close(self) -> None:
        connections, self._connections = self._connections, {}
        for connection in chain.from_iterable(connections.values()):
            await connection.channel.close(None)


async def _answer(peer: PeerInfo, call: Awaitable[bytes]) -> bytes:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        failure = _FAILURES.get(error.code(), CallFailure.REFUSED)
        # A server that has no room ends a call while its pieces are on their way. When one of them waits to be taken
        # just then, grpc.aio says only that it was not, instead of the status.
        if error.details() == UNTAKEN:
            failure = CallFailure.BUSY
        detail = f"{error.code().name}: {error.details()}"
        queue_s = _queue_s(error) if failure is CallFailure.BUSY else 0.0
        raise CallError(failure, peer.peer_id, detail, queue_s=queue_s) from error


def _queue_s(error: grpc.aio.AioRpcError) -> float:
    """The wait that a busy peer said it expects; 0 when it said nothing, or nonsense."""
    # The stubs' type of the pairs has no iterator; they are pairs all the same.
    for key, value in cast("Sequence[tuple[str, str | bytes]]", tuple(error.trailing_metadata() or ())):
        if key == QUEUE_US_KEY and isinstance(value, str) and value.isascii() and value.isdecimal():
            # Of a stranger: some hours are as good as any longer time, and a float at any rate.
            return min(int(value[:20]), 10**10) / 1e6
    return 0.0


def _same_shape(peer: PeerInfo, answer_RD: Tensor, asked_RD: Tensor) -> None:
    if answer_RD.shape != asked_RD.shape:
        detail = f"answered {tuple(answer_RD.shape)} to rows of {tuple(asked_RD.shape)}"
        raise CallError(CallFailure.REFUSED, peer.peer_id, detail)


def _only_asked(peer: PeerInfo, told: Sequence[int], asked_P: Tensor) -> None:
    asked_E = np.bincount(asked_P.numpy())  # 3 us for a small call, where torch's index_put takes 50
    strange = [expert for expert in told if expert >= asked_E.size or not asked_E[expert]]
    if strange:
        detail = f"answered for expert {strange[0]}, which was not asked"
        raise CallError(CallFailure.REFUSED, peer.peer_id, detail)
