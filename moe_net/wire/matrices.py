"""The matrices of messages where a server computes: fp32 on the CPU here, rows on a GPU in `kernels.device.matrices`.

R rows, D columns.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from moe_net.types import Encoding
from moe_net.wire import compress
from moe_net.wire.validate import check_finite

INLINE_BYTES = 2 * 2**20
"""What is up to this size is read and written on a server's loop (see `is_quick_to_read`, `is_quick_to_write`); a
thread's hop costs 0.1 to 0.2 ms. Measured on one core, to read / to write: fp32 4 KiB 0.06 / 0.01, 1 MiB 0.10 / 0.04,
16 MiB 1.1 / 1.2; int8 0.3 MiB 0.18 / 0.19, 4.5 MiB 3.4 / 5.4 ms."""


class Arrival(Protocol):
    """An event as `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether it has happened."""
        ...

    def synchronize(self) -> None:
        """Wait for it."""
        ...


class Matrices(Protocol):
    """From a message to the experts and back: `read`, `land` or `land_later`, (experts), `ship`, `arrival`, `write`.

    `land`, `land_later`, `ship` and `arrival` belong to the thread that the experts run on, the others to any.
    """

    def room(self, n_bytes: int) -> memoryview:
        """Writable memory for a message that comes in pieces, from where it is taken fastest."""
        ...

    def read(self, data: memoryview, rows: int, cols: int, encoding: Encoding, name: str) -> Tensor:
        """[rows, cols] for `data`, which is as long as these say; WireError, naming `name`, unless all are finite.

        Its values may be there only after `land`, or for the experts after `land_later`.
        """
        ...

    def land(self, x_RD: Tensor) -> Tensor:
        """What `read` returned where the experts are."""
        ...

    def land_later(self, x_RD: Tensor, reply: Encoding) -> Tensor:
        """As `land`, of rows that run alone and whose answer shall be in `reply`; or `x_RD` itself, if the experts can
        take its bytes in themselves."""
        ...

    def ship(self, y_RD: Tensor, encoding: Encoding) -> Tensor:
        """What the experts returned, for `write` after its `arrival`."""
        ...

    def arrival(self) -> Arrival:
        """Of all that was landed and shipped until now."""
        ...

    def write(self, y_RD: Tensor, encoding: Encoding) -> memoryview:
        """The bytes of what was shipped."""
        ...

    def is_quick_to_read(self, message: bytes | memoryview) -> bool:
        """Whether a loop may `read` its matrices itself: they do not hold it up."""
        ...

    def is_quick_to_write(self, y_RD: Tensor, encoding: Encoding) -> bool:
        """Whether a loop may `write` it itself; to make one message of it costs a copy besides."""
        ...


def is_large_part(data: memoryview) -> bool:
    """Whether `data` is at least half of the memory that it keeps alive, so that it may; else it is to be copied out.

    A field may come twice and unknown ones besides: 44 bytes that are kept could hold a message of 32 MiB. Only a
    Backward with inputs, about half each, pays for this honestly: 7 ms for 8 MiB on a busy core.
    """
    return 2 * data.nbytes >= memoryview(data.obj).nbytes  # `obj` is what the view is of


class _AtOnce:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


AT_ONCE: Arrival = _AtOnce()


class OnCpu:
    """fp32 on the CPU, by `wire.compress`; nothing has to land or be shipped."""

    def room(self, n_bytes: int) -> memoryview:
        return np.empty(n_bytes, np.uint8).data

    def read(self, data: memoryview, rows: int, cols: int, encoding: Encoding, name: str) -> Tensor:
        x_RD = compress.decode(data, rows, cols, encoding)
        check_finite(x_RD, name)
        # Of fp32 these are the bytes themselves.
        return x_RD if encoding is not Encoding.FP32 or is_large_part(data) else x_RD.clone()

    def land(self, x_RD: Tensor) -> Tensor:
        return x_RD

    def land_later(self, x_RD: Tensor, reply: Encoding) -> Tensor:
        return x_RD

    def ship(self, y_RD: Tensor, encoding: Encoding) -> Tensor:
        return y_RD

    def arrival(self) -> Arrival:
        return AT_ONCE

    def write(self, y_RD: Tensor, encoding: Encoding) -> memoryview:
        return compress.encode(y_RD, encoding)

    def is_quick_to_read(self, message: bytes | memoryview) -> bool:
        return len(message) <= INLINE_BYTES

    def is_quick_to_write(self, y_RD: Tensor, encoding: Encoding) -> bool:
        return y_RD.nbytes <= INLINE_BYTES


ON_CPU: Matrices = OnCpu()
