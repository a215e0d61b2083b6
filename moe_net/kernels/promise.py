# pyright: basic
"""Matrices that are still bytes on the host, for experts that take them in themselves.

A promise is a tensor without values that says its sizes, and behind it the bytes. Whoever needs the rows asks for
`landed`; a graph takes the bytes into its own buffers (`kernels.graphed`) and leaves the rows behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from moe_net.types import Encoding

_META = torch.device("meta")


@dataclass(slots=True, eq=False)
class Payload:
    """The bytes of a matrix, on the host."""

    data_N: Tensor
    """uint8"""
    encoding: Encoding
    source: Tensor | None = None
    """On the device, of what was shipped."""
    land: Callable[[Tensor], Tensor] | None = None
    """What makes rows of the promise."""
    rows: Tensor | None = None
    """On the device, once it has landed."""


def promise(rows: int, cols: int, payload: Payload) -> Tensor:
    """Counts as fp32, the most that its bytes can be."""
    promised_RD = torch.empty((rows, cols), device=_META)
    promised_RD.payload = payload  # pyright: ignore[reportAttributeAccessIssue]
    return promised_RD


def payload_of(promised_RD: Tensor) -> Payload:
    return cast(Payload, promised_RD.payload)  # pyright: ignore[reportAttributeAccessIssue]


def is_promise(x_RD: Tensor) -> bool:
    return x_RD.is_meta


def landed(x_RD: Tensor) -> Tensor:
    """`x_RD`; of a promise the rows on the device."""
    if not is_promise(x_RD):
        return x_RD
    payload = payload_of(x_RD)
    if payload.rows is None:
        assert payload.land is not None, "only what was read lands"
        payload.rows = payload.land(x_RD)
    return payload.rows


def attach_sent(y_RD: Tensor, sent: Payload) -> None:
    """Note that the bytes of `y_RD` are on their way to the host."""
    y_RD.sent = sent  # pyright: ignore[reportAttributeAccessIssue]


def take_sent(y_RD: Tensor) -> Payload | None:
    """What `attach_sent` noted, once: the bytes stay with whoever ships them, and not with rows that are kept."""
    sent: Payload | None = getattr(y_RD, "sent", None)
    if sent is not None:
        del y_RD.sent  # pyright: ignore[reportAttributeAccessIssue]
    return sent
