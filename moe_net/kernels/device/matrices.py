# pyright: basic
"""`wire.matrices` on a GPU: bytes go over in their wire format and become rows there, and the other way round.

R rows, D columns.

Everything is one queue, the stream that the experts run on: while rows travel, the host looks up their call; while the
experts run, it asks for their answer; what is waited for, once per batch, is its `arrival`. With streams of their own,
and another thread that waits for them, a call of 2048 rows took 2 to 3 times as long as its experts: threads of Python
wait for each other at each launch.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from moe_net.errors import WireError
from moe_net.kernels.device import wire
from moe_net.kernels.graphed import IN_GRAPHS
from moe_net.kernels.promise import Payload, payload_of, promise, take_sent
from moe_net.types import Encoding
from moe_net.wire import compress
from moe_net.wire.matrices import AT_ONCE, INLINE_BYTES, Arrival, is_large_part
from moe_net.wire.validate import check_finite


class OnDevice:
    """Rows in `dtype` on `device`; on a CPU, by Triton's interpreter, the same without pinned memory."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._on_gpu = device.type == "cuda"

    def room(self, n_bytes: int) -> memoryview:
        return compress.memory_of(self._pinned(n_bytes))

    def _pinned(self, n_bytes: int) -> Tensor:
        # torch keeps a pool of pinned memory (a fresh 128 MiB takes 55 ms): sizes rounded up to powers of 2.
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)

    def read(self, data: memoryview, rows: int, cols: int, encoding: Encoding, name: str) -> Tensor:
        """As `Matrices.read`; looked at where it is, in the host's memory."""
        if encoding is Encoding.INT8:
            # With finite scales a product is finite, or `dequantise` makes it so.
            if not np.isfinite(np.frombuffer(data, np.float32, offset=rows * cols)).all():
                raise WireError(f"{name}: holds an infinity or NaN")
        else:
            check_finite(compress.tensor_view(data, wire.DTYPES[encoding]), name)
        return promise(rows, cols, Payload(self._kept(data), encoding, land=self._land))

    def _kept(self, data: memoryview) -> Tensor:
        """`data` in pinned memory: a message that came in one piece lies elsewhere, and the thread that the experts run
        on would have to wait for its copy."""
        values = compress.tensor_view(data, torch.uint8)
        if is_large_part(data) and (values.is_pinned() or not self._on_gpu):
            return values
        return self._pinned(data.nbytes).copy_(values)

    def land(self, x_RD: Tensor) -> Tensor:
        """`dtype` on the device; the bytes of `x_RD` are needed until its `arrival`."""
        rows_RD = payload_of(x_RD).rows
        return self._land(x_RD) if rows_RD is None else rows_RD

    def land_later(self, x_RD: Tensor, reply: Encoding) -> Tensor:
        """As `Matrices.land_later`. A graph has buffers for few encodings, and answers in the one it was asked in."""
        encoding = payload_of(x_RD).encoding
        return x_RD if encoding is reply and encoding in IN_GRAPHS else self.land(x_RD)

    def _land(self, x_RD: Tensor) -> Tensor:
        payload = payload_of(x_RD)
        # First, so that the host does the rest while they travel. (A kernel that reads the host's memory takes twice as
        # long as a copy engine.)
        there_N = torch.empty_like(payload.data_N, device=self._device).copy_(payload.data_N, non_blocking=True)
        landed_RD = torch.empty(x_RD.shape, dtype=self._dtype, device=self._device)
        wire.decode(there_N, payload.encoding, landed_RD)
        return landed_RD

    def ship(self, y_RD: Tensor, encoding: Encoding) -> Tensor:
        """Into pinned memory."""
        rows, cols = y_RD.shape
        sent = take_sent(y_RD)
        if sent is None or sent.encoding is not encoding:
            n_bytes = compress.payload_bytes(rows, cols, encoding)
            y_RD = y_RD.contiguous()
            there_N = torch.empty(n_bytes, dtype=torch.uint8, device=self._device)
            wire.encode(y_RD, encoding, there_N)
            sent = Payload(self._pinned(n_bytes).copy_(there_N, non_blocking=True), encoding)
        return promise(rows, cols, replace(sent, source=y_RD))

    def arrival(self) -> Arrival:
        if not self._on_gpu:
            return AT_ONCE
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def write(self, y_RD: Tensor, encoding: Encoding) -> memoryview:
        """As `Matrices.write`; in another encoding than it was shipped in, by the CPU."""
        payload = payload_of(y_RD)
        if payload.encoding is encoding:
            return compress.memory_of(payload.data_N)
        assert payload.source is not None, "only what was shipped is written"
        return compress.encode(payload.source.to("cpu", torch.float32), encoding)

    def is_quick_to_read(self, message: bytes | memoryview) -> bool:
        # What came in pieces lies in pinned memory already (`room`).
        return len(message) <= (2 * INLINE_BYTES if isinstance(message, memoryview) else INLINE_BYTES)

    def is_quick_to_write(self, y_RD: Tensor, encoding: Encoding) -> bool:
        return payload_of(y_RD).encoding is encoding
