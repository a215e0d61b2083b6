"""What a message must satisfy: its structure before memory is spent on it, then its meaning for one model.

R rows sent to one server, D model width, P (row, expert) pairs of those rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_net.errors import LimitError, WireError
from moe_net.types import Encoding
from moe_net.wire.compress import payload_bytes
from moe_net.wire.messages import RoutedRows

Int32Array = npt.NDArray[np.int32]

FEW_EXPERTS = 4
"""Of a row: compared pair by pair."""
PLAUSIBLE = 1e9
"""Of an answer to values of up to 1, and in proportion. Activations of trained models stay below 1e5."""
LARGEST = 1e18
"""Of any answer: its square is a number of fp32, and so the norm behind it makes something finite of it."""
CALL_ID_BYTES = 16
MAX_TRAINER_BYTES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that one message may cost its receiver."""

    max_message_bytes: int = 32 * 1024 * 1024
    """Length of a message."""
    max_matrix_bytes: int = 64 * 1024 * 1024
    """What one matrix may take once decoded to fp32: int8 grows to almost four times what it took on the wire."""
    max_rows: int = 65_536
    """Rows of a matrix."""
    max_experts_per_row: int = 64
    """Experts a row may ask for."""


def check_message_bytes(length: int, limits: Limits) -> None:
    """LimitError when a message is too long to be looked at."""
    if length > limits.max_message_bytes:
        raise LimitError(f"message of {length} bytes, the limit is {limits.max_message_bytes}")


def check_encoding(number: int, name: str) -> Encoding:
    """The encoding with that number; WireError names `name` and the choices."""
    try:
        return Encoding(number)
    except ValueError:
        choices = ", ".join(f"{member.value} ({member.name.lower()})" for member in Encoding)
        raise WireError(f"{name}: unknown encoding {number}, known are {choices}") from None


def check_matrix(name: str, rows: int, cols: int, encoding: Encoding, data_bytes: int, limits: Limits) -> None:
    """A matrix is not empty, within the limits, and exactly as long as its sizes say; nothing is allocated."""
    if rows < 1 or cols < 1:
        raise WireError(f"{name}: {rows} rows of {cols} columns, but neither may be 0")
    if rows > limits.max_rows:
        raise LimitError(f"{name}: {rows} rows, the limit is {limits.max_rows}")
    decoded_bytes = 4 * rows * cols  # Python's integers: no claim overflows this
    if decoded_bytes > limits.max_matrix_bytes:
        raise LimitError(
            f"{name}: {rows} rows of {cols} columns take {decoded_bytes} bytes, the limit is {limits.max_matrix_bytes}"
        )
    expected_bytes = payload_bytes(rows, cols, encoding)
    if data_bytes != expected_bytes:
        raise WireError(
            f"{name}_data: {data_bytes} bytes for {rows} rows of {cols} columns in {encoding.name.lower()}, "
            f"which take {expected_bytes}"
        )


def check_routing(rows: int, count_R: Int32Array, index_P: Int32Array, gates: int, limits: Limits) -> None:
    """Counts, expert indices and gates fit each other and `rows`; no row asks for an expert twice."""
    pairs = index_P.size
    if count_R.size != rows:
        raise WireError(f"experts_per_row: {count_R.size} counts for {rows} rows")
    if gates != pairs:
        raise WireError(f"gate: {gates} gates for {pairs} entries of expert_index")
    lowest, highest = int(count_R.min()), int(count_R.max())
    if lowest < 1:  # fixed32 beyond 2**31 is negative here
        row = int(count_R.argmin())
        raise WireError(f"experts_per_row: {lowest & 0xFFFFFFFF} in row {row}, must be 1..{limits.max_experts_per_row}")
    if highest > limits.max_experts_per_row:
        row = int(count_R.argmax())
        raise LimitError(f"experts_per_row: {highest} in row {row}, the limit is {limits.max_experts_per_row}")
    total = int(count_R.sum(dtype=np.int64))
    if total != pairs:
        raise WireError(f"experts_per_row: sums to {total}, but expert_index has {pairs} entries")
    if int(index_P.min()) < 0:
        raise WireError(f"expert_index: {int(index_P.min()) & 0xFFFFFFFF} is no index of an expert")
    if highest > 1:
        _check_no_duplicates(count_R, index_P, highest)


def _check_no_duplicates(count_R: Int32Array, index_P: Int32Array, highest: int) -> None:
    if count_R.size * highest == index_P.size and highest <= FEW_EXPERTS:
        # As top-k routing to one server gives; 2048 rows of 2: 24 -> 4 us.
        index_RK = index_P.reshape(-1, highest)
        pairs = combinations(range(highest), 2)
        if not any((index_RK[:, first] == index_RK[:, second]).any() for first, second in pairs):
            return
    # (row, expert) as one number: after sorting, equal pairs are neighbours. 16 bytes per pair, for a moment.
    key_P = np.repeat(np.arange(count_R.size, dtype=np.int64) << 32, count_R)
    key_P |= index_P
    key_P.sort()
    twice_P = key_P[1:] == key_P[:-1]
    if twice_P.any():
        key = int(key_P[int(twice_P.argmax())])
        raise WireError(f"expert_index: expert {key & 0xFFFFFFFF} twice in row {key >> 32}")


def check_finite(x: Tensor, name: str) -> None:
    """WireError when a value of `x` is infinite or NaN.

    One infinity or NaN makes the sum one of them, so a finite sum settles it: 0.25 ms for 16 MiB, where
    `isfinite(x).all()` takes 9. Only a sum that is not finite, which large values alone can cause, needs a second
    pass (0.45 ms), for the extremes.
    """
    if math.isfinite(x.sum().item()) or not x.numel():
        return
    lowest, highest = torch.aminmax(x)
    if not (math.isfinite(lowest.item()) and math.isfinite(highest.item())):
        raise WireError(f"{name}: holds an infinity or NaN")


def check_plausible(x: Tensor, name: str, *, sent: Tensor) -> None:
    """WireError when a value of `x`, an expert's answer, is out of all proportion to what it was `sent`."""
    largest = _largest(x)
    if largest > PLAUSIBLE and largest > min(LARGEST, PLAUSIBLE * max(1.0, _largest(sent))):
        raise WireError(f"{name}: values of up to {largest:.3g}")


def _largest(x: Tensor) -> float:
    """The largest absolute value; 0 of none."""
    if not x.numel():
        return 0.0
    lowest, highest = torch.aminmax(x)
    return max(-lowest.item(), highest.item())


def check_trainer(trainer: str) -> None:
    """A trainer's name is not empty and not longer than 128 bytes: servers keep it."""
    if not trainer:
        raise WireError("trainer: empty")
    length = len(trainer.encode())
    if length > MAX_TRAINER_BYTES:
        raise LimitError(f"trainer: a name of {length} bytes, the limit is {MAX_TRAINER_BYTES}")


def check_peer_id(peer_id: str) -> None:
    """A peer's id is not empty and not longer than a trainer's name may be: peers keep it."""
    length = len(peer_id.encode())
    if not 0 < length <= MAX_TRAINER_BYTES:
        raise WireError(f"peer_id: {length} bytes, must be 1..{MAX_TRAINER_BYTES}")


def check_call_id(call_id: bytes) -> None:
    """A call_id has 16 bytes."""
    if len(call_id) != CALL_ID_BYTES:
        raise WireError(f"call_id: {len(call_id)} bytes, must be {CALL_ID_BYTES}")


def check_rows(rows: RoutedRows, *, width: int, n_experts: int) -> None:
    """Rows that passed the codec fit this model: WireError for another width or an expert it does not have."""
    if rows.x_RD.shape[1] != width:
        raise WireError(f"x: rows of {rows.x_RD.shape[1]} columns, the run has expert_width={width}")
    highest = int(rows.expert_index_P.max())
    if highest >= n_experts:
        raise WireError(f"expert_index: {highest}, but each layer has n_experts={n_experts}")
