"""ExpertService over grpc.aio: raw bytes through our codec, every check before compute, a status for every refusal.

    refusal                                  status                 a caller should
    WireError: malformed, not finite         INVALID_ARGUMENT       fix its call
    LimitError: claims more than allowed     OUT_OF_RANGE           send less at once
    UnknownExpertError                       NOT_FOUND              ask another peer
    InputsGoneError                          FAILED_PRECONDITION    send the inputs along
    StaleStepError                           ABORTED                drop these gradients
    BusyError                                RESOURCE_EXHAUSTED     ask another replica, or later; the trailing metadata
                                                                    `moe-queue-us` says what the wait is just now
    the deadline passed in the queue         DEADLINE_EXCEEDED      ask another replica, or later
    a bug of ours (logged with traceback)    INTERNAL               tell us

A LimitError is not RESOURCE_EXHAUSTED: that means "not now", and the same call would be refused tomorrow. (gRPC itself
answers RESOURCE_EXHAUSTED to messages over `Limits.max_message_bytes`, before we see them.)
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, ParamSpec, Self, TypeVar

import grpc
import grpc.aio
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from torch import Tensor

from moe_net.config import RunConfig
from moe_net.errors import (
    BusyError,
    InputsGoneError,
    LimitError,
    StaleStepError,
    UnknownExpertError,
    WireError,
)
from moe_net.experts.host import ExpertHost
from moe_net.kernels.dispatch import matrices_on
from moe_net.proto.v1 import expert_pb2
from moe_net.rpc.grpc_client import QUEUE_US_KEY, channel_options
from moe_net.types import Encoding
from moe_net.wire import codec
from moe_net.wire.compress import payload_bytes
from moe_net.wire.exchange import CHUNK_BYTES
from moe_net.wire.framing import Parts
from moe_net.wire.matrices import INLINE_BYTES, ON_CPU, Matrices
from moe_net.wire.messages import BackwardAnswer, BackwardCall, ForwardAnswer, ForwardCall, RoutedRows
from moe_net.wire.pieces import PieceReader, cut
from moe_net.wire.share import Share
from moe_net.wire.snapshot import pack
from moe_net.wire.validate import Limits, check_rows
from moe_peer.batcher import Batcher
from moe_peer.device import DeviceThread
from moe_peer.gossip import Meeting, Replicator
from moe_peer.landing import LandedCalls
from moe_peer.memory import check_device
from moe_peer.sharing import ShareFiles, Sharing
from moe_peer.status import Served
from moe_peer.streams import FewReflections, FewWatches, Places

log = logging.getLogger(__name__)

SERVICE = "moe_net.v1.ExpertService"
MAX_FETCHES = 2
"""At once: each holds its layer's state twice, as tensors and as a file. One of a server that is sparing."""
LINGER_S = 2.0
"""At a stop, for a Fetch that saves what was learned since the last one, and as long again for the next layer's. A
trainer that is stopped at the same moment gives its step at hand 1 s."""
SPARING_WINDOWS = 32
"""Times what may come of a call before it is read, that a queue holds of a server that is sparing."""
MAX_SHARES, SHARE_S = 16, 3.0
"""Being sent at once, and for one, its sending included."""
CHUNK_TIMEOUT_S = 30.0
"""For a chunk of Fetch to be taken, or a piece of a call to come or be taken. Who does neither must not hold one of the
few places."""
MIN_FETCH_BYTES_PER_S = 64 * 1024
"""Nor who reads a little now and then: half a megabit per second."""
MAX_CONNECTION_AGE_S = 1800
"""After this a connection takes no more calls (its client opens another by itself), and ends CONNECTION_GRACE_S later.
gRPC has no way to end a call whose client neither reads nor leaves: its status waits behind what is not read."""
CONNECTION_GRACE_S = 600
GPU_BATCHES = 2
"""Given to a GPU at once: the next one is there when it has done one. A CPU computes on the thread that would begin it.
"""

# In order: the first class that fits decides.
STATUS_OF: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (LimitError, grpc.StatusCode.OUT_OF_RANGE),
    (WireError, grpc.StatusCode.INVALID_ARGUMENT),
    (UnknownExpertError, grpc.StatusCode.NOT_FOUND),
    (InputsGoneError, grpc.StatusCode.FAILED_PRECONDITION),
    (StaleStepError, grpc.StatusCode.ABORTED),
    (BusyError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
)
REFUSALS = tuple(kind for kind, _ in STATUS_OF)
# What Python raises when we are wrong. Not Exception: grpc's own control flow passes through.
OUR_BUGS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

InT = TypeVar("InT")
OutT = TypeVar("OutT")
ParamsT = ParamSpec("ParamsT")
Context = grpc.aio.ServicerContext[Any, Any]


class ExpertServer:
    """Serves one ExpertHost. `start` it on the running loop and `stop` it, or use `serving`."""

    def __init__(
        self,
        host: ExpertHost,
        *,
        run: RunConfig,
        peer_id: str,
        limits: Limits | None = None,
        max_batch_rows: int = 2048,
        max_queue_rows: int = 65_536,
        max_queue_bytes: int = 256 * 2**20,
        max_concurrent_calls: int | None = None,
        chunk_timeout_s: float = CHUNK_TIMEOUT_S,
        sparing: bool = False,
        on_meeting: Callable[[Meeting], None] = lambda _: None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """`max_concurrent_calls` bounds what gRPC takes in before we see and count it: that many messages of at most
        `limits.max_message_bytes`. By default 64 or more, up to 512, as many as fit into 8 times `max_queue_bytes`:
        with the defaults 64, or 2 GiB if as many callers send the largest message at the same moment. `sparing` takes
        less memory for calls in pieces and for Fetch, which are slower then. `on_meeting` hears of every exchange that
        another replica began. `check` raises a RuntimeError when the device computes no more; by default a tiny product
        on a GPU."""
        self._host = host
        self._run = run
        self._peer_id = peer_id
        self._limits = limits or Limits()
        self._layers = frozenset(expert.layer for expert in host.experts)
        self._matrices = matrices_on(host.device, host.compute_dtype)
        on_cpu = self._matrices is ON_CPU
        runner = host if on_cpu else LandedCalls(host, self._matrices)
        if check is None and host.device.type == "cuda":
            check = partial(check_device, str(host.device))
        self._device = DeviceThread(check=check)
        self.run_on_device = self._device.run
        self.failed = self._device.failed  # waits for DeviceError: the device computes no more
        # One thread, so that reading large messages takes no more than one core from the experts.
        self._codec = DeviceThread("codec")
        self._batcher = Batcher(
            self._device,
            forward_many=runner.forward_many,
            backward_many=runner.backward_many,
            max_batch_rows=max_batch_rows,
            max_queue_rows=max_queue_rows,
            max_queue_bytes=max_queue_bytes,
            max_running=1 if on_cpu else GPU_BATCHES,
        )
        self.replicator = Replicator(host, self._device, run=run.name, peer_id=peer_id, on_meeting=on_meeting)
        fitting_calls = 8 * max_queue_bytes // self._limits.max_message_bytes
        self._max_concurrent_calls = max_concurrent_calls or min(max(fitting_calls, 64), 512)
        self.sharing = Sharing(host, self._device.run, peer_id=peer_id)
        self._shares = Places("Share", MAX_SHARES)
        self._share_files = ShareFiles(self._share_file, n_experts=len(host.experts))
        self._fetches = Places("Fetch", 1 if sparing else MAX_FETCHES)
        self._window_bytes = max_queue_bytes // SPARING_WINDOWS if sparing else self._limits.max_message_bytes
        self._chunk_timeout_s = chunk_timeout_s
        self._health = FewWatches()
        self._server: grpc.aio.Server | None = None
        self._unsaved: set[int] = set()
        """Layers that were committed to since anybody fetched them."""
        self._fetched = asyncio.Event()
        self._left_s: float | None = None
        self._stack = AsyncExitStack()
        self.address = ""
        """`host:port` once started."""

    async def start(self, listen: str) -> str:
        """Serve on `listen` (`host:port`, port 0: any free one); returns the address. ValueError: cannot be bound."""
        assert self._server is None, "start once"
        server = grpc.aio.server(
            options=[
                *channel_options(self._limits, window_bytes=self._window_bytes),
                # Otherwise two peers share a port silently, each getting half of the calls.
                ("grpc.so_reuseport", 0),
                # Our clients ping every 20 s while a call runs; by default the third such ping ends the connection.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.max_connection_age_ms", MAX_CONNECTION_AGE_S * 1000),
                ("grpc.max_connection_age_grace_ms", CONNECTION_GRACE_S * 1000),
            ],
            maximum_concurrent_rpcs=self._max_concurrent_calls,
        )
        server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflected = FewReflections((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME))
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflected, server)
        try:
            port = server.add_insecure_port(listen)
        except RuntimeError as error:
            raise ValueError(f"cannot listen on {listen}: {error}") from error
        await self._stack.enter_async_context(self._device)
        if self._host.device.type == "cuda":  # Triton launches on its thread's current device
            await self._device.run(torch.cuda.set_device, self._host.device)
        await self._stack.enter_async_context(self._codec)
        await self._stack.enter_async_context(self._batcher)
        await server.start()
        self._server = server
        self.address = f"{listen.rpartition(':')[0]}:{port}"
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self.address

    async def leave(self, *, grace_s: float = 5.0) -> None:
        """Say NOT_SERVING, but serve on while what was learned here is not saved and somebody may be about to:
        `LINGER_S` after the last Fetch, `grace_s` in all."""
        await self._health.enter_graceful_shutdown()
        self._left_s = asyncio.get_running_loop().time()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._unsaved and not self._device.failure:
                    await self._next_fetch()

    @property
    def served(self) -> Served:
        """Until now."""
        return Served(self._batcher.answered_calls, self._batcher.answered_rows, self._host.versions)

    async def _next_fetch(self) -> None:
        """TimeoutError when none comes, and none runs."""
        self._fetched.clear()
        while True:
            try:
                async with asyncio.timeout(LINGER_S):
                    await self._fetched.wait()
                return
            except TimeoutError:
                if not self._fetches.taken:
                    raise

    async def stop(self, *, grace_s: float = 5.0) -> None:
        """Say NOT_SERVING, take no more calls, finish those that run within `grace_s` of that, or of `leave` if it was
        called before; end the threads."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            if self._left_s is not None:
                grace_s = max(0.0, self._left_s + grace_s - asyncio.get_running_loop().time())
            await self._server.stop(grace_s)
            self._server = None
        await self.sharing.close()
        await self._stack.aclose()

    def _handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        unary: dict[str, Callable[[bytes, Context], Awaitable[bytes]]] = {
            "Info": self._info,
            "Forward": partial(self._forward, write=codec.encode_forward_answer),
            "Backward": partial(self._backward, write=codec.encode_backward_answer),
            "Commit": self._commit,
        }
        # No (de)serialiser: raw bytes in, raw bytes out.
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(self._answering(name, method)) for name, method in unary.items()
        }
        in_pieces: dict[str, Callable[[memoryview, Context, ExitStack], Awaitable[Parts]]] = {
            "ForwardInPieces": partial(self._forward, write=codec.forward_answer_parts),
            "BackwardInPieces": partial(self._backward, write=codec.backward_answer_parts),
        }
        for name, method in in_pieces.items():
            handler = self._answering(name, partial(self._in_pieces, method))
            handlers[name] = grpc.stream_stream_rpc_method_handler(handler)
        handlers["Fetch"] = grpc.unary_stream_rpc_method_handler(self._answering("Fetch", self._fetch))
        handlers["Share"] = grpc.unary_stream_rpc_method_handler(self._answering("Share", self._share))
        handlers["Exchange"] = grpc.stream_stream_rpc_method_handler(self._answering("Exchange", self._exchange))
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def _forward(
        self,
        raw: bytes | memoryview,
        context: Context,
        room: ExitStack | None = None,
        *,
        write: Callable[[ForwardAnswer, Matrices], OutT],
    ) -> OutT:
        """`room`: what holds the message's already, until it is read."""
        with room or self._batcher.reserving(len(raw), timeout_s=context.time_remaining()):
            call = await self._here_if(self._matrices.is_quick_to_read(raw), self._read_forward, raw)
        answer = await self._batcher.forward(call, timeout_s=context.time_remaining())
        quick = self._is_quick_to_write(answer.y_RD, answer.encoding, whole=room is None)
        return await self._here_if(quick, write, answer, self._matrices)

    async def _backward(
        self,
        raw: bytes | memoryview,
        context: Context,
        room: ExitStack | None = None,
        *,
        write: Callable[[BackwardAnswer, Matrices], OutT],
    ) -> OutT:
        """As `_forward`."""
        with room or self._batcher.reserving(len(raw), timeout_s=context.time_remaining()):
            call = await self._here_if(self._matrices.is_quick_to_read(raw), self._read_backward, raw)
        answer = await self._batcher.backward(call, timeout_s=context.time_remaining())
        quick = self._is_quick_to_write(answer.dx_RD, answer.encoding, whole=room is None)
        return await self._here_if(quick, write, answer, self._matrices)

    async def _in_pieces(
        self, method: Callable[[memoryview, Context, ExitStack], Awaitable[Parts]], _requests: AsyncIterator[bytes],
        context: Context,
    ) -> None:  # fmt: skip
        """`method` for a message that comes, and whose answer goes, in pieces. All that will come has its room from
        the first piece on: callers that are let in one by one may not be too many together."""
        # Each way: piece by piece just in time it could take hours, and the place of a call with it.
        limit_s = self._chunk_timeout_s + self._limits.max_message_bytes / MIN_FETCH_BYTES_PER_S
        with ExitStack() as room:

            def admit(n_bytes: int) -> None:  # now, not when its bytes have been sent in vain
                reserving = self._batcher.reserving(n_bytes, timeout_s=context.time_remaining(), coming=True)
                room.enter_context(reserving)

            reader = PieceReader(self._limits, admit, self._matrices.room)
            async with asyncio.timeout(limit_s):
                while raw := await self._in_time(context.read()):  # empty: grpc.aio.EOF
                    reader.feed(raw)
            whole = reader.finish()
            del reader
            answer = await method(whole, context, room)
        del whole
        async with asyncio.timeout(limit_s):
            for piece in cut(answer):
                await self._in_time(context.write(piece))

    async def _in_time(self, step: Awaitable[OutT]) -> OutT:
        """TimeoutError for who neither sends nor reads, as in `_send_file`."""
        try:
            async with asyncio.timeout(self._chunk_timeout_s):
                return await step
        except TimeoutError:
            raise TimeoutError(f"no piece came, or was taken, for {self._chunk_timeout_s:.0f} s") from None

    async def _commit(self, raw: bytes, _context: Context) -> bytes:
        call = codec.decode_commit_call(raw)
        answer = await self.sharing.commit(call)
        self._unsaved |= self._layers
        return codec.encode_commit_answer(answer)

    async def _info(self, _raw: bytes, _context: Context) -> bytes:
        return (await self._device.run(self._describe)).SerializeToString()

    async def _fetch(self, raw: bytes, context: Context) -> None:
        with self._fetches.one():
            layer, indices = codec.decode_fetch_call(raw, self._limits)
            state = await self._device.run(self._host.fetch, layer, indices)
            self._unsaved.discard(layer)
            self._fetched.set()
            data, digest = await asyncio.to_thread(_pack, state, self._run.name, self._host)
            del state
            await self._send_file(data, digest, context)

    async def _share(self, raw: bytes, context: Context) -> None:
        # Whoever asks has gone on alone long before that.
        async with asyncio.timeout(SHARE_S):
            call = codec.decode_share_call(raw, self._limits)
            caller = str(context.peer()).rpartition(":")[0]
            share = await self.sharing.answer(call, limit_s=context.time_remaining(), caller=caller)
            with self._shares.one():
                async with self._share_files.of(call.batch, share) as (data, digest):
                    await self._send_file(data, digest, context)

    async def _share_file(self, share: Share) -> tuple[bytes, bytes]:
        return await asyncio.to_thread(_pack, share.to_state(), self._run.name, self._host)

    async def _send_file(self, data: bytes, digest: bytes, context: Context) -> None:
        """TimeoutError when its receiver is too slow (see the constants above)."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._chunk_timeout_s + len(data) / MIN_FETCH_BYTES_PER_S
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = expert_pb2.FetchChunk(data=data[start : start + CHUNK_BYTES])
            if start + CHUNK_BYTES >= len(data):
                chunk.sha256 = digest
            try:
                async with asyncio.timeout_at(min(loop.time() + self._chunk_timeout_s, end_s)):
                    await context.write(chunk.SerializeToString())
            except TimeoutError:
                raise TimeoutError(f"{start} of {len(data)} bytes were taken in time, then no more") from None

    async def _exchange(self, requests: AsyncIterator[bytes], context: Context) -> None:
        await self.replicator.answer(requests, context.write, limit_s=context.time_remaining())

    def _is_quick_to_write(self, y_RD: Tensor, encoding: Encoding, *, whole: bool) -> bool:
        """`whole`: a message in one piece is a copy of it."""
        rows, cols = y_RD.shape
        small = not whole or payload_bytes(rows, cols, encoding) <= INLINE_BYTES
        return small and self._matrices.is_quick_to_write(y_RD, encoding)

    async def _here_if(
        self, quick: bool, work: Callable[ParamsT, OutT], *args: ParamsT.args, **kwargs: ParamsT.kwargs
    ) -> OutT:
        """`work(...)`, on the codec's thread when it would hold up the loop."""
        return work(*args, **kwargs) if quick else await self._codec.run(work, *args, **kwargs)

    def _read_forward(self, raw: bytes | memoryview) -> ForwardCall:
        call = codec.decode_forward_call(raw, self._limits, self._matrices)
        self._check_inputs(call.layer, call.rows)
        return call

    def _read_backward(self, raw: bytes | memoryview) -> BackwardCall:
        call = codec.decode_backward_call(raw, self._limits, self._matrices)
        if call.rows is not None:
            self._check_inputs(call.layer, call.rows)
        width = call.grad_RD.shape[1]
        expected = self._host.shape.d_model
        if width != expected:  # before a GPU's kernels are made for it: for 2**18 columns over 20 s
            raise WireError(f"grad: rows of {width} columns, the run has expert_width={expected}")
        return call

    def _check_inputs(self, layer: int, rows: RoutedRows) -> None:
        if layer not in self._layers:
            raise UnknownExpertError(f"layer {layer} is not hosted here")
        check_rows(rows, width=self._host.shape.d_model, n_experts=self._run.model.n_experts)
        self._host.check_cost(rows)

    def _describe(self) -> expert_pb2.InfoReply:
        shape = self._host.shape
        self._host.make_all_due()
        layers = [
            expert_pb2.LayerInfo(layer=layer, expert_index=list(versions), version=list(versions.values()))
            for layer, versions in self._host.versions.items()
        ]
        return expert_pb2.InfoReply(
            peer_id=self._peer_id,
            run=self._run.name,
            d_model=shape.d_model,
            d_ff=shape.d_ff,
            activation=shape.activation.value,
            layers=layers,
            committed_tokens=self._host.committed_tokens,
            queue_rows=self._batcher.queue_rows,
            max_message_bytes=self._limits.max_message_bytes,
        )

    def _answering(
        self, name: str, method: Callable[[InT, Context], Awaitable[OutT]]
    ) -> Callable[[InT, Context], Awaitable[OutT]]:
        """`method`, whose errors become statuses: here, and nowhere else."""

        async def answer(request: InT, context: Context) -> OutT:
            trailing: tuple[tuple[str, str], ...] = ()
            try:
                return await method(request, context)
            except REFUSALS as error:
                code = next(code for kind, code in STATUS_OF if isinstance(error, kind))
                detail = str(error) or type(error).__name__
                if isinstance(error, BusyError):
                    # Also when it was something else that is full: it is what a call here costs now.
                    queue_s = error.queue_s or self._batcher.expected_wait_s
                    trailing = ((QUEUE_US_KEY, str(int(queue_s * 1e6))),)
            except OUR_BUGS as error:
                log.exception("%s failed by a bug of ours", name)
                code, detail = grpc.StatusCode.INTERNAL, f"{name} failed by a bug of ours: {type(error).__name__}"
            # gRPC keeps what `abort` raises in a cycle with the call, and Python's collector comes rarely. So it is
            # raised when the error, whose frames hold the call's rows, is gone, and the message as well (a server of
            # 600 MiB that refused most calls took 130 more).
            del request
            await context.abort(code, detail, trailing)
            raise AssertionError("unreachable: abort does not return")

        return answer

    @classmethod
    @asynccontextmanager
    async def serving(
        cls, host: ExpertHost, *, run: RunConfig, peer_id: str, listen: str, grace_s: float = 5.0, **settings: Any
    ) -> AsyncGenerator[Self]:
        """A started server; stopped at the end."""
        server = cls(host, run=run, peer_id=peer_id, **settings)
        await server.start(listen)
        try:
            yield server
        finally:
            await server.stop(grace_s=grace_s)


def _pack(state: dict[str, Any], run: str, host: ExpertHost) -> tuple[bytes, bytes]:
    data = pack(state, run=run, shape=host.shape)
    return data, hashlib.sha256(data).digest()
