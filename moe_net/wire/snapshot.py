"""Expert state as one safetensors file: what Fetch streams, what a checkpoint keeps. No pickle anywhere.

The tensors are those of `ExpertBank.state`; the file's metadata says of which run and shape they are, and carries a
digest, because safetensors checks the structure of a file but not its values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from moe_net.errors import CheckpointError
from moe_net.types import ExpertShape
from moe_net.wire.state import max_header_bytes

FORMAT = "moe-net experts 1"
_DTYPES = ("F32", "I64")


def _digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _manifest(run: str, shape: ExpertShape) -> dict[str, str | int]:
    return {
        "format": FORMAT,
        "run": run,
        "d_model": shape.d_model,
        "d_ff": shape.d_ff,
        "activation": shape.activation.value,
    }


def pack(state: Mapping[str, Tensor], *, run: str, shape: ExpertShape) -> bytes:
    """`state` (CPU tensors, from one or several banks) as a safetensors file. The same state gives the same bytes."""
    manifest = json.dumps(_manifest(run, shape) | {"sha256": _digest(state)})
    # One key: safetensors writes several in the order of a hash table, another one each time.
    return safetensors.torch.save({name: value.contiguous() for name, value in state.items()}, {"moe-net": manifest})


def _read_manifest(data: bytes, shape: ExpertShape) -> dict[str, Any]:
    """What `pack` stated. A safetensors file begins with 8 bytes of length (little-endian), then that much JSON."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise CheckpointError(f"not a safetensors file, or cut short: {len(data)} bytes")
    largest = max_header_bytes(len(data) - length, shape)
    if length > largest:  # hundreds of thousands of empty tensors take seconds to look at
        raise CheckpointError(f"a header of {length} bytes, the limit for {len(data)} bytes of experts is {largest}")
    try:
        header = json.loads(data[8 : 8 + length])
        manifest = json.loads(header["__metadata__"]["moe-net"])
        others = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
        others = [dtype for dtype in others if dtype not in _DTYPES]
    except (KeyError, TypeError):
        raise CheckpointError("a safetensors file, but no snapshot of experts") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not a safetensors file: {error!s:.200}") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"the snapshot's manifest is {manifest!r:.80}")
    if others:
        raise CheckpointError(f"a snapshot of experts has fp32 and int64, not {others[0]!r:.20}")
    return cast("dict[str, Any]", manifest)


def unpack(data: bytes, *, run: str, shape: ExpertShape) -> dict[str, Tensor]:
    """The state in `data`. CheckpointError if it is damaged, of another format, run or expert shape."""
    manifest = _read_manifest(data, shape)
    for key, expected in _manifest(run, shape).items():
        if manifest.get(key) != expected:
            raise CheckpointError(f"snapshot has {key} {manifest.get(key)!r:.80}, this run {expected!r}")
    try:
        state = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"damaged snapshot: {error!s:.200}") from error
    if _digest(state) != manifest.get("sha256"):
        raise CheckpointError("damaged snapshot: its values do not have the digest it states")
    return state
