"""Where the matrices of a message become tensors, and tensors become bytes: on the CPU here, on a GPU in
`kernels.device.matrices`.

R rows, D columns.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from moe_net.types import Encoding
from moe_net.wire import compress
from moe_net.wire.validate import check_finite


class Matrices(Protocol):
    """One thread at a time may use it; `room` any."""

    def room(self, n_bytes: int) -> memoryview:
        """Writable memory for a message that comes in pieces, from where `read` is fastest."""
        ...

    def read(self, data: memoryview, rows: int, cols: int, encoding: Encoding, name: str) -> Tensor:
        """[rows, cols] of `data`, which is as long as these say; WireError, naming `name`, unless all are finite."""
        ...

    def write(self, x_RD: Tensor, encoding: Encoding) -> memoryview:
        """The bytes of `x_RD`, complete when this returns."""
        ...


class OnCpu:
    """fp32 on the CPU, by `wire.compress`; stateless, for any number of threads."""

    def room(self, n_bytes: int) -> memoryview:
        return np.empty(n_bytes, np.uint8).data

    def read(self, data: memoryview, rows: int, cols: int, encoding: Encoding, name: str) -> Tensor:
        x_RD = compress.decode(data, rows, cols, encoding)
        check_finite(x_RD, name)
        # A field may come twice and unknown ones besides: 44 bytes that are kept could hold a message of 32 MiB. `obj`
        # is what the view is of. Only a Backward with inputs, about half each, pays for this honestly: 7 ms for 8 MiB
        # on a busy core.
        holds_message = encoding is Encoding.FP32 and 2 * data.nbytes < memoryview(data.obj).nbytes
        return x_RD.clone() if holds_message else x_RD

    def write(self, x_RD: Tensor, encoding: Encoding) -> memoryview:
        return compress.encode(x_RD, encoding)


ON_CPU: Matrices = OnCpu()
