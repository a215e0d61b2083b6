# pyright: basic
"""`wire.matrices` on a GPU: bytes go over in their wire format and become rows there, and the other way round.

R rows, D columns.

Everything is one queue, the stream that the experts run on: while rows travel, the host looks up their call; while the
experts run, it asks for their answer; it waits once, in `finish`. With streams of their own, and another thread that
waits for them, a call of 2048 rows took 2 to 3 times as long as its experts: threads of Python wait for each other at
each launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from moe_net.errors import WireError
from moe_net.kernels.device import wire
from moe_net.types import Encoding
from moe_net.wire import compress
from moe_net.wire.matrices import is_large_part
from moe_net.wire.validate import check_finite

_DTYPES = {Encoding.FP32: torch.float32, Encoding.BF16: torch.bfloat16, Encoding.FP16: torch.float16}


@dataclass(slots=True, eq=False)
class _Payload:
    """The bytes of a matrix, on the host."""

    data: memoryview
    encoding: Encoding
    source: Tensor | None = None
    """On the device, of what was shipped."""


def _promise(rows: int, cols: int, payload: _Payload) -> Tensor:
    """A matrix without values, that says its sizes, and behind it the bytes. Counts as fp32, the most they can be."""
    promised_RD = torch.empty((rows, cols), device="meta")
    promised_RD.payload = payload  # pyright: ignore[reportAttributeAccessIssue]
    return promised_RD


def _payload_of(promised_RD: Tensor) -> _Payload:
    return cast(_Payload, promised_RD.payload)  # pyright: ignore[reportAttributeAccessIssue]


def _parts(there_N: Tensor, n_values: int) -> tuple[Tensor, Tensor]:
    """(q, scales) of an int8 matrix; `n_values` is a multiple of 4."""
    return there_N[:n_values].view(torch.int8), there_N[n_values:].view(torch.float32)


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
            check_finite(compress.tensor_view(data, _DTYPES[encoding]), name)
        return _promise(rows, cols, _Payload(self._kept(data), encoding))

    def _kept(self, data: memoryview) -> memoryview:
        """`data` in pinned memory: a message that came in one piece lies elsewhere, and the thread that the experts run
        on would have to wait for its copy."""
        values = compress.tensor_view(data, torch.uint8)
        if is_large_part(data) and (values.is_pinned() or not self._on_gpu):
            return data
        return compress.memory_of(self._pinned(data.nbytes).copy_(values))

    def _bring(self, data: memoryview) -> Tensor:
        """`data` as bytes on the device. (A kernel that reads them from here takes twice as long as a copy engine.)"""
        there = torch.empty(data.nbytes, dtype=torch.uint8, device=self._device)
        return there.copy_(compress.tensor_view(data, torch.uint8), non_blocking=True)

    def land(self, x_RD: Tensor) -> Tensor:
        """`dtype` on the device; the bytes of `x_RD` are needed until `finish`."""
        payload = _payload_of(x_RD)
        # First, so that the host does the rest while they travel.
        there_N, n_values = self._bring(payload.data), x_RD.numel()
        landed_RD = torch.empty(x_RD.shape, dtype=self._dtype, device=self._device)
        if payload.encoding is not Encoding.INT8:
            wire.cast(there_N.view(_DTYPES[payload.encoding]), landed_RD)
        elif n_values % 4 == 0:
            wire.dequantise(*_parts(there_N, n_values), landed_RD)
        else:  # there a kernel cannot read fp32
            scale_N = there_N[n_values:].clone().view(torch.float32)
            wire.dequantise(there_N[:n_values].view(torch.int8), scale_N, landed_RD)
        return landed_RD

    def ship(self, y_RD: Tensor, encoding: Encoding) -> Tensor:
        """Into pinned memory."""
        rows, cols = y_RD.shape
        n_values, n_bytes = rows * cols, compress.payload_bytes(rows, cols, encoding)
        y_RD = y_RD.contiguous()
        there = torch.empty(n_bytes, dtype=torch.uint8, device=self._device)
        if encoding is not Encoding.INT8:
            wire.cast(y_RD, there.view(_DTYPES[encoding]))
        elif n_values % 4 == 0:
            wire.quantise(y_RD, *_parts(there, n_values))
        else:
            scale_N = torch.empty((n_bytes - n_values) // 4, device=self._device)
            wire.quantise(y_RD, there[:n_values].view(torch.int8), scale_N)
            there[n_values:].copy_(scale_N.view(torch.uint8))
        out = self._pinned(n_bytes).copy_(there, non_blocking=True)
        return _promise(rows, cols, _Payload(compress.memory_of(out), encoding, y_RD))

    def finish(self) -> None:
        if self._on_gpu:
            torch.cuda.current_stream(self._device).synchronize()

    def write(self, y_RD: Tensor, encoding: Encoding) -> memoryview:
        """As `Matrices.write`; in another encoding than it was shipped in, by the CPU."""
        payload = _payload_of(y_RD)
        if payload.encoding is encoding:
            return payload.data
        assert payload.source is not None, "only what was shipped is written"
        return compress.encode(payload.source.to("cpu", torch.float32), encoding)
