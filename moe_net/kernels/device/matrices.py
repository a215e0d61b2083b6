# pyright: basic
"""`wire.matrices` on a GPU: bytes go over in their wire format and become rows there, and the other way round.

R rows, D columns.

It has a stream of its own, beside the one the experts run on: while they compute, the next call comes in and the last
answer goes out. Both ends wait for their own copies only, so what `read` returns is there, and what `write` is given
must be.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from moe_net.errors import WireError
from moe_net.kernels.device import wire
from moe_net.types import Encoding
from moe_net.wire import compress

_DTYPES = {Encoding.FP32: torch.float32, Encoding.BF16: torch.bfloat16, Encoding.FP16: torch.float16}
_LARGEST = {Encoding.FP32: 0.0, Encoding.BF16: compress.BF16_MAX, Encoding.FP16: compress.FP16_MAX}


class OnDevice:
    """Rows in `dtype` on `device`; on a CPU, by Triton's interpreter, the same without streams and pinned memory."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._bad = torch.zeros(1, dtype=torch.int32, device=device)
        self._said_bad = torch.zeros(1, dtype=torch.int32, pin_memory=self._on_gpu)

    @contextmanager
    def _working(self) -> Generator[None]:
        """On our stream; what was begun within is done at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def room(self, n_bytes: int) -> memoryview:
        # torch keeps a pool of pinned memory (a fresh 128 MiB takes 55 ms): sizes rounded up to powers of 2.
        return compress.memory_of(self._pinned(n_bytes))

    def _pinned(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)

    def _bring(self, data: memoryview, dtype: torch.dtype) -> Tensor:
        """The values of `data` on the device. Where they lie in pinned memory, the host goes on at once."""
        there = torch.empty(data.nbytes, dtype=torch.uint8, device=self._device)
        there.copy_(compress.tensor_view(data, torch.uint8), non_blocking=True)
        return there.view(dtype)

    def read(self, data: memoryview, rows: int, cols: int, encoding: Encoding, name: str) -> Tensor:
        """As `Matrices.read`; finite in `dtype`: a value that it has no number for is refused, for the experts would
        compute with an infinity."""
        with self._working():
            x_RD = torch.empty((rows, cols), dtype=self._dtype, device=self._device)
            self._bad.zero_()
            if encoding is Encoding.INT8:
                n_values = rows * cols
                q_N, scale_N = self._bring(data[:n_values], torch.int8), self._bring(data[n_values:], torch.float32)
                wire.dequantise(q_N, scale_N, x_RD, self._bad)
            else:
                wire.cast(self._bring(data, _DTYPES[encoding]), x_RD, self._bad)
            self._said_bad.copy_(self._bad, non_blocking=True)
        if self._said_bad.item():
            raise WireError(f"{name}: holds an infinity, NaN, or a value beyond what {self._dtype} has here")
        if self._stream is not None:
            # Made on our stream, used and let go on the experts'.
            x_RD.record_stream(torch.cuda.default_stream(self._device))
        return x_RD

    def write(self, x_RD: Tensor, encoding: Encoding) -> memoryview:
        """As `Matrices.write`, of rows that their own stream is done with; the bytes lie in pinned memory."""
        n_bytes = compress.payload_bytes(x_RD.shape[0], x_RD.shape[1], encoding)
        out = self._pinned(n_bytes)
        with self._working():
            x_RD = x_RD.detach().contiguous()
            there = torch.empty(n_bytes, dtype=torch.uint8, device=self._device)
            if encoding is Encoding.INT8:
                n_values = x_RD.numel()
                scale_N = torch.empty((n_bytes - n_values) // 4, device=self._device)
                wire.quantise(x_RD, there[:n_values].view(torch.int8), scale_N)
                there[n_values:].copy_(scale_N.view(torch.uint8))
            else:
                wire.cast(x_RD, there.view(_DTYPES[encoding]), self._bad, largest=_LARGEST[encoding])
            out.copy_(there, non_blocking=True)
        return compress.memory_of(out)
