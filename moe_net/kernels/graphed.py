# pyright: basic
"""A server's calls as CUDA graphs: what 64 to 512 tokens over 16 experts cost is launches, not arithmetic.

T tokens of a call, B tokens of its bucket, K experts per token, E experts, D model width, P = B * K pairs.

Token counts change from call to call, and a graph has fixed sizes: counts are rounded up to buckets, the rest is
padding (expert -1), which no kernel touches. A bucket has one set of buffers that its graphs read and write. A forward
leaves the pre-activations there; the backward of the same call uses them in place, and only if another forward of the
bucket comes first they are copied out. What a backward leaves for the weights' gradients is copied out at once, without
the padding.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_net.kernels.dispatch import choose
from moe_net.kernels.promise import Payload, attach_sent, is_promise, payload_of
from moe_net.kernels.routing import Routing
from moe_net.kernels.types import ExpertWeights, Saved, Work
from moe_net.types import Encoding
from moe_net.wire.compress import payload_bytes

NAME = "graphed"
IN_GRAPHS = (Encoding.INT8, Encoding.BF16)
"""What promises are taken in: the encodings of runs. Each takes buffers for good."""
# Sizes are the callers' to choose, and each takes memory for good: so many, and of tokens with no more choices.
MAX_BUCKETS, MAX_CHOICES = 16, 16
BUCKETS = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 768, 1024, 1536, 2048)


def bucket_of(n_tokens: int) -> int | None:
    """The smallest bucket that holds them; None if none does."""
    return next((bucket for bucket in BUCKETS if n_tokens <= bucket), None)


class _Kept:
    """What a forward left for its backward: in its bucket's buffers, until another call needs these."""

    def __init__(self, bucket: _Bucket) -> None:
        self.bucket = bucket
        self.copies: list[Tensor] | None = None


def _filled(buffer_BX: Tensor, n_tokens: int) -> Tensor:
    """The rows of a call; a view of all is not made, for launches wait for it."""
    return buffer_BX if n_tokens == buffer_BX.shape[0] else buffer_BX[:n_tokens]


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    """Room for the answer of a call."""

    buffer_BD: Tensor
    rows_TD: Tensor
    wire: _Wire | None
    message: Payload | None

    def fill(self) -> Tensor:
        """The rows of the buffer; of a call that came as bytes their bytes are on the way, too."""
        n_tokens = self.rows_TD.shape[0]
        if self.wire is not None and self.message is not None:
            self.wire.give_out(self.buffer_BD, n_tokens, self.message)
            attach_sent(self.rows_TD, self.message)
        return self.rows_TD.copy_(_filled(self.buffer_BD, n_tokens), non_blocking=True)


class _Bucket:
    """Static inputs and outputs of one (tokens, choices), and the graphs between them."""

    def __init__(self, n_tokens: int, n_choices: int, weights: ExpertWeights, backend: str | None) -> None:
        w_in_EDH = weights.w_in_EDH
        device, d_model = w_in_EDH.device, w_in_EDH.shape[1]
        self._weights = weights
        self.x_BD = torch.zeros((n_tokens, d_model), dtype=w_in_EDH.dtype, device=device)
        self.dy_BD = torch.zeros_like(self.x_BD)
        self.ids_BK = torch.full((n_tokens, n_choices), -1, dtype=torch.int32, device=device)
        self.gates_BK = torch.zeros((n_tokens, n_choices), device=device)
        self._owner: weakref.ref[_Kept] | None = None
        self._wires: dict[Encoding, _Wire] = {}
        self._backend = choose(self.x_BD, self.ids_BK, weights, backend)
        self.forward_graph, forward = _capture(self._forward, device)
        self.y_BD, self.h_PH, self._kept = forward[0], forward[1], forward[1:]
        self.forward_graph()  # capturing it wrote nothing, and the backward reads where each expert's pairs end
        self.rows_graph, backward = _capture(self._rows, device)
        self.dx_BD, self.dgates_BK, self._routing_N, self._a_PF, self._dh_PH = backward

    def _forward(self) -> list[Tensor]:
        y_BD, saved = self._backend.forward(self.x_BD, self.ids_BK, self.gates_BK, self._weights, keep=True)
        assert saved is not None
        return [y_BD, saved.h_PH, *saved.routing.tensors()]

    def _rows(self) -> list[Tensor]:
        saved = Saved(self._backend.NAME, Routing(*self._kept[1:]), (self.h_PH,), static=True)
        dx_BD, dgates_BK, work = self._backend.backward_rows(
            self.dy_BD, self.x_BD, self.ids_BK, self.gates_BK, self._weights, saved
        )
        assert dx_BD is not None
        pair_P, row_P, place_P, end_E, bound_B = self._kept[1:]
        # In one piece, for one launch to copy; each part begins at a multiple of 16 bytes.
        parts = (pair_P, row_P, place_P, bound_B, bound_B.new_zeros(-bound_B.numel() % 4), end_E)
        return [dx_BD, dgates_BK, torch.cat([part.int() for part in parts]), *work.a, *work.dh]

    def work(self, ids_TK: Tensor) -> Work:
        """What the last backward, of a call with these experts, left for the weights' gradients: copies of its own
        pairs. They come before the padding, and their tokens before those that the bucket has beyond the call's."""
        n_experts, ids = self._weights.w_in_EDH.shape[0], ids_TK.cpu().numpy()
        # One row at least, whosever it is: not every product takes none.
        n_pairs = max(1, int(((ids >= 0) & (ids < n_experts)).sum()))
        most, own = self.ids_BK.numel(), ids.size
        bounds = (n_experts + 1, -(n_experts + 1) % 4, n_experts)
        sizes = (n_pairs, most - n_pairs, n_pairs, most - n_pairs, own, most - own, *bounds)
        pair_P, _, row_P, _, place_P, _, bound_B, _, end_E = self._routing_N.clone().split(sizes)
        return Work(
            backend=self._backend.NAME,
            routing=Routing(pair_P, row_P, place_P, end_E, bound_B),
            gate_P1=None,
            a=(self._a_PF[:n_pairs].clone(),),
            dh=(self._dh_PH[:n_pairs].clone(),),
        )

    def load(self, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, owner: _Kept | None) -> None:
        """Put a call's inputs into the buffers; whoever still needs what is there gets a copy of it."""
        previous = None if self._owner is None else self._owner()
        if previous is not None and previous is not owner:
            previous.copies = [value.clone() for value in self._kept]
        self._owner = None  # from here on nobody's, also if it fails
        n_tokens = x_TD.shape[0]
        self.take_in(x_TD, self.x_BD)
        _filled(self.ids_BK, n_tokens).copy_(ids_TK, non_blocking=True)
        if n_tokens < self.ids_BK.shape[0]:
            self.ids_BK[n_tokens:].fill_(-1)
        _filled(self.gates_BK, n_tokens).copy_(gates_TK, non_blocking=True)
        self._owner = None if owner is None else weakref.ref(owner)

    def take_in(self, x_TD: Tensor, buffer_BD: Tensor) -> None:
        """Rows, or a promise of some, into a buffer of the bucket."""
        if is_promise(x_TD):
            payload = payload_of(x_TD)
            self._wire(payload.encoding).take_in(payload.data_N, x_TD.shape[0], buffer_BD)
        else:
            _filled(buffer_BD, x_TD.shape[0]).copy_(x_TD, non_blocking=True)

    def answer(self, asked_TD: Tensor, buffer_BD: Tensor) -> _Answer:
        """Room for what will be in the buffer for `asked_TD`."""
        n_tokens, width = asked_TD.shape
        rows_TD = torch.empty((n_tokens, width), dtype=buffer_BD.dtype, device=buffer_BD.device)
        if not is_promise(asked_TD):
            return _Answer(buffer_BD, rows_TD, None, None)
        wire = self._wire(payload_of(asked_TD).encoding)
        return _Answer(buffer_BD, rows_TD, wire, wire.message(buffer_BD, n_tokens))

    def _wire(self, encoding: Encoding) -> _Wire:
        wire = self._wires.get(encoding)
        if wire is None:
            wire = self._wires[encoding] = _Wire(encoding, self.x_BD)
        return wire

    def drop_wires(self) -> None:
        """No call will come in bytes any more."""
        self._wires.clear()

    def holds(self, kept: _Kept) -> bool:
        return self._owner is not None and self._owner() is kept

    def restore(self, kept: _Kept) -> None:
        assert kept.copies is not None
        for buffer, copy in zip(self._kept, kept.copies, strict=True):
            buffer.copy_(copy)
        kept.copies = None


class _Wire:
    """Bytes of a bucket in one encoding, and the small graphs between them and rows: launched one by one these take
    the host three times as long, while the device waits.

    The bytes lie as those of a message of all rows of the bucket would.
    """

    def __init__(self, encoding: Encoding, like_BD: Tensor) -> None:
        self._encoding = encoding
        self._n_rows, self._width = like_BD.shape
        self._device = like_BD.device
        n_bytes = payload_bytes(self._n_rows, self._width, encoding)
        self._in_N = torch.zeros(n_bytes, dtype=torch.uint8, device=self._device)
        self._out_N = torch.zeros_like(self._in_N)
        self._graphs: dict[tuple[str, int], Callable[[], None]] = {}

    def take_in(self, data_N: Tensor, n_rows: int, buffer_BD: Tensor) -> None:
        """What the message `data_N` says, `n_rows` long, is in the buffer's first rows; in the others anything."""
        for there_N, here_N in self._same_places(self._in_N, data_N, n_rows):
            there_N.copy_(here_N, non_blocking=True)
        self._graph("in", buffer_BD)()

    def message(self, buffer_BD: Tensor, n_rows: int) -> Payload:
        """Room on the host for the first rows of a buffer, and all that `give_out` of them needs."""
        self._graph("out", buffer_BD)
        n_bytes = payload_bytes(n_rows, self._width, self._encoding)
        on_gpu = self._device.type == "cuda"
        return Payload(torch.empty(n_bytes, dtype=torch.uint8, pin_memory=on_gpu), self._encoding)

    def give_out(self, buffer_BD: Tensor, n_rows: int, message: Payload) -> None:
        """The first rows into the message, where they are once the device has done what it was given."""
        self._graph("out", buffer_BD)()
        for there_N, here_N in self._same_places(self._out_N, message.data_N, n_rows):
            here_N.copy_(there_N, non_blocking=True)

    def _same_places(self, there_N: Tensor, here_N: Tensor, n_rows: int) -> list[tuple[Tensor, Tensor]]:
        """(of the bucket's bytes, of those of a message of `n_rows`): the values, and behind all of them the scales."""
        if n_rows == self._n_rows:
            return [(there_N, here_N)]
        if self._encoding is not Encoding.INT8:
            return [(there_N[: here_N.numel()], here_N)]
        n_values, first = n_rows * self._width, self._n_rows * self._width
        n_scales = here_N.numel() - n_values
        return [(there_N[:n_values], here_N[:n_values]), (there_N[first : first + n_scales], here_N[n_values:])]

    def _graph(self, way: str, buffer_BD: Tensor) -> Callable[[], None]:
        key = (way, buffer_BD.data_ptr())
        graph = self._graphs.get(key)
        if graph is None:
            from moe_net.kernels.device import wire  # Triton takes seconds to import

            # It runs before it is captured, which spoils nothing: what it writes is about to be written.
            if way == "in":
                graph = _capture_small(lambda: wire.decode(self._in_N, self._encoding, buffer_BD), self._device)
            else:
                graph = _capture_small(lambda: wire.encode(buffer_BD, self._encoding, self._out_N), self._device)
            self._graphs[key] = graph
        return graph


@contextmanager
def _no_collection() -> Generator[None]:
    """A graph that is found to be garbage ends, and during a capture that ends the capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _capture(fn: Callable[[], list[Tensor]], device: torch.device) -> tuple[Callable[[], None], list[Tensor]]:
    """(what runs `fn` again into the same outputs, these). Without CUDA: `fn`, and a copy of what it returns."""
    if device.type != "cuda":
        outputs = fn()

        def replay() -> None:
            for output, value in zip(outputs, fn(), strict=True):
                output.copy_(value)

        return replay, outputs
    # Triton compiles at the first launch, which a capture does not survive.
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        fn()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls are captured: a server's codec copies on a stream of its own meanwhile.
    with _no_collection(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = fn()
    return graph.replay, outputs


def _capture_small(fn: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """As `_capture`, of what takes no memory: without the collections and the wait that `torch.cuda.graph` begins
    with, for a call waits."""
    if device.type != "cuda":
        return fn
    here, side, graph = torch.cuda.current_stream(device), torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    side.wait_stream(here)
    with _no_collection(), torch.cuda.stream(side):
        try:
            fn()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                fn()
            finally:
                graph.capture_end()
        finally:
            here.wait_stream(side)
    return graph.replay


class GraphedExperts:
    """Forward and backward of calls of up to 2048 tokens on fixed weights; not for more than one thread or stream.

    Weights may change in place between calls; a `Saved` is then the caller's to drop.
    """

    def __init__(self, weights: ExpertWeights, *, backend: str | None = None) -> None:
        self._weights, self._name = weights, backend
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        """The one used last at the end."""

    def takes(self, x_TD: Tensor, expert_ids_TK: Tensor) -> bool:
        """Whether a call of this size and dtype goes through a graph."""
        n_tokens, n_choices = expert_ids_TK.shape
        return (
            0 < n_tokens * n_choices <= n_tokens * MAX_CHOICES
            and bucket_of(n_tokens) is not None
            and (is_promise(x_TD) or x_TD.dtype is self._weights.w_in_EDH.dtype)
        )

    def _bucket(self, expert_ids_TK: Tensor) -> _Bucket:
        n_tokens, n_choices = expert_ids_TK.shape
        size = bucket_of(n_tokens)
        assert size is not None
        bucket = self._buckets.pop((size, n_choices), None)
        if bucket is None:
            if len(self._buckets) >= MAX_BUCKETS:
                # Calls that it was kept for hold it for as long as they may come back: without its bytes.
                self._buckets.pop(next(iter(self._buckets))).drop_wires()
            bucket = _Bucket(size, n_choices, self._weights, self._name)
        self._buckets[size, n_choices] = bucket
        return bucket

    def forward(
        self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, *, keep: bool
    ) -> tuple[Tensor, Saved | None]:
        """As `types.Backend.forward`, of a call that `takes`."""
        bucket = self._bucket(expert_ids_TK)
        kept = _Kept(bucket) if keep else None
        bucket.load(x_TD, expert_ids_TK, gates_TK, kept)
        bucket.forward_graph()
        y_TD = bucket.answer(x_TD, bucket.y_BD).fill()
        if keep and is_promise(x_TD):
            payload_of(x_TD).rows = _filled(bucket.x_BD, x_TD.shape[0]).clone()
        return y_TD, Saved(NAME, kept, (bucket.h_PH,), static=True) if keep else None

    def backward(
        self,
        dy_TD: Tensor,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        gates_TK: Tensor,
        saved: Saved | None,
        *,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Work | None]:
        """(dx [T, D], dgates [T, K], with `keep` what `dispatch.moe_ffn_weight_grads` needs). Ids on the device make
        `keep` wait for them: how many pairs there are decides how much is kept."""
        bucket = self._bucket(expert_ids_TK)
        kept = saved.routing if saved is not None and isinstance(saved.routing, _Kept) else None
        if kept is None or kept.bucket is not bucket:
            bucket.load(x_TD, expert_ids_TK, gates_TK, None)
            bucket.forward_graph()
        elif not bucket.holds(kept):
            bucket.load(x_TD, expert_ids_TK, gates_TK, kept)
            bucket.restore(kept)
        n_tokens = dy_TD.shape[0]
        bucket.take_in(dy_TD, bucket.dy_BD)
        # All room is taken while the bytes travel.
        answer, dgates_TK = bucket.answer(dy_TD, bucket.dx_BD), torch.empty_like(bucket.dgates_BK[:n_tokens])
        bucket.rows_graph()
        dx_TD = answer.fill()
        dgates_TK.copy_(_filled(bucket.dgates_BK, n_tokens), non_blocking=True)
        if is_promise(dy_TD):  # it has landed, before the next call's rows take their place
            payload_of(dy_TD).rows = _filled(bucket.dy_BD, n_tokens).clone()
        work = bucket.work(expert_ids_TK) if keep else None
        return dx_TD, dgates_TK.to(gates_TK.dtype), work
