# pyright: basic
"""A server's step on the GPU from the bytes of int8 rows in pinned memory to the bytes of the answer (not yet what
moe_peer's server does: its codec makes fp32 rows on the CPU).

R rows, D model width, K experts per row. Copies and kernels follow each other on one stream and nothing waits for the
device but `finish`: while it computes, the host receives the next call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_net.kernels.device.wire import dequantise, payload_bytes, quantise
from moe_net.kernels.graphed import GraphedExperts
from moe_net.kernels.types import Saved


class PayloadExperts:
    """Experts that read and write payloads of `wire.compress` (int8). Buffers on the device are made once: pinned ones
    belong to the caller, who should keep a pool of them (a fresh 128 MiB one costs 55 ms)."""

    def __init__(self, experts: GraphedExperts, width: int, max_rows: int, dtype: torch.dtype) -> None:
        self._experts, self._width, self._dtype = experts, width, dtype
        n_bytes = payload_bytes(max_rows, width)
        self._received, self._sent = torch.empty((2, n_bytes), dtype=torch.uint8, device="cuda")

    def _receive(self, payload_N: Tensor, n_rows: int) -> Tensor:
        self._received[: payload_N.numel()].copy_(payload_N, non_blocking=True)
        return dequantise(self._received, n_rows, self._width, self._dtype)

    def _send(self, x_RD: Tensor, payload_N: Tensor) -> None:
        quantise(x_RD, self._sent)
        payload_N.copy_(self._sent[: payload_N.numel()], non_blocking=True)

    def forward(
        self, payload_N: Tensor, slots_RK: Tensor, gates_RK: Tensor, answer_N: Tensor
    ) -> tuple[Tensor, Saved | None]:
        """(x [R, D] for the backward, what was kept); the rows' sums go to `answer_N`, which `finish` completes."""
        x_RD = self._receive(payload_N, slots_RK.shape[0])
        y_RD, saved = self._experts.forward(x_RD, slots_RK, gates_RK, keep=True)
        self._send(y_RD, answer_N)
        return x_RD, saved

    def backward(
        self,
        payload_N: Tensor,
        x_RD: Tensor,
        slots_RK: Tensor,
        gates_RK: Tensor,
        saved: Saved | None,
        answer_N: Tensor,
    ) -> Tensor:
        """dgates [R, K]; dx goes to `answer_N`."""
        dy_RD = self._receive(payload_N, slots_RK.shape[0])
        dx_RD, dgates_RK, _ = self._experts.backward(dy_RD, x_RD, slots_RK, gates_RK, saved)
        self._send(dx_RD, answer_N)
        return dgates_RK

    @staticmethod
    def finish() -> None:
        """Wait until all answers stand in their pinned memory."""
        torch.cuda.current_stream().synchronize()
