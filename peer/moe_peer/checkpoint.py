"""Checkpoints of a run as a trainer sees it: trunk, optimizer, place in the data, and the experts of the peers.

step-00000120/
    state.json             what this is, and the SHA-256 of every other file
    trunk.safetensors      parameters and buffers
    optimizer.safetensors  AdamW's moments and step counters
    experts/layer-003.safetensors   as in moe_net.experts.snapshot; `moe-peer serve --load` reads them
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_net.config import RunConfig, from_json, to_json
from moe_net.errors import CheckpointError
from moe_net.experts.snapshot import pack

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMeta:
    """What a checkpoint says of itself."""

    run: RunConfig
    step: int
    """The next step to make."""
    data_fingerprint: str
    tokenizer_fingerprint: str
    trainers: int
    sequences: int


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entry in state.items() for name, value in entry.items()
    }


def save_checkpoint(
    folder: Path,
    meta: CheckpointMeta,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    experts: dict[str, Tensor],
) -> Path:
    """Write `folder/step-N`, whole or not at all; returns its path. `experts` may lack those nobody answered for."""
    final = folder / f"step-{meta.step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "experts").mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in _trunk(model).items()}, partial / "trunk.safetensors")
    save_file(_optimizer_tensors(optimizer), partial / "optimizer.safetensors")
    for layer in sorted({int(name.split(".")[0]) for name in experts}):
        state = {name: value for name, value in experts.items() if int(name.split(".")[0]) == layer}
        data = pack(state, run=meta.run.name, shape=meta.run.model.expert_shape)
        (partial / "experts" / f"layer-{layer:03d}.safetensors").write_bytes(data)
    files = sorted(p for p in partial.rglob("*") if p.is_file())
    state = {
        "format": FORMAT,
        "run": json.loads(to_json(meta.run)),
        "step": meta.step,
        "data_fingerprint": meta.data_fingerprint,
        "tokenizer_fingerprint": meta.tokenizer_fingerprint,
        "trainers": meta.trainers,
        "sequences": meta.sequences,
        "sha256": {str(p.relative_to(partial)): _sha256(p) for p in files},
    }
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    for path in [*files, partial / "state.json"]:
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _flush(folder)
    return final


def newest_checkpoint(folder: Path) -> Path:
    """`folder` itself if it is a checkpoint, else the newest one in it; CheckpointError when there is none."""
    if (folder / "state.json").exists():
        return folder
    found = sorted(p for p in folder.glob("step-*") if (p / "state.json").exists())
    if not found:
        raise CheckpointError(f"no checkpoint in {folder}: expected {folder}/step-N/state.json")
    return found[-1]


def set_aside_later(folder: Path, step: int) -> None:
    """Rename the checkpoints in `folder` after `step` to `replaced-step-N`.

    A training that begins (or goes on) at `step` replaces them, and the newest one must be one of its own: stopped
    before it gets so far, it would otherwise be resumed from its predecessor's.
    """
    for path in sorted(folder.glob("step-*")):
        number = path.name.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            aside = folder / f"replaced-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


def read_meta(path: Path) -> CheckpointMeta:
    """The description of the checkpoint at `path`, after checking every file against its checksum."""
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {state['format']}, this version reads {FORMAT}")
        for name, expected in state["sha256"].items():
            if _sha256(path / name) != expected:
                raise CheckpointError(f"{path}/{name}: damaged (its checksum differs)")
        return CheckpointMeta(
            run=from_json(RunConfig, json.dumps(state["run"])),
            step=int(state["step"]),
            data_fingerprint=state["data_fingerprint"],
            tokenizer_fingerprint=state["tokenizer_fingerprint"],
            trainers=int(state["trainers"]),
            sequences=int(state["sequences"]),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error


def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Trunk and optimizer from the checkpoint at `path` into `model` and `optimizer`; CheckpointError names misfits."""
    try:
        trunk = load_file(path / "trunk.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        missing, unexpected = model.load_state_dict(trunk, strict=False)
        # Tied parameters are stored once.
        if unexpected or set(missing) - set(_aliases(model)):
            raise CheckpointError(f"{path}: the trunk is of another model (missing {missing}, unexpected {unexpected})")
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in moments.items():
            index, field = name.split(".", 1)
            state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _aliases(model: torch.nn.Module) -> list[str]:
    """Names of tensors that share memory with one of an earlier name."""
    seen: set[int] = set()
    aliases: list[str] = []
    for name, value in model.state_dict().items():
        if value.numel() and value.data_ptr() in seen:
            aliases.append(name)
        seen.add(value.data_ptr())
    return aliases


def _trunk(model: torch.nn.Module) -> dict[str, Tensor]:
    aliases = set(_aliases(model))
    return {name: value for name, value in model.state_dict().items() if name not in aliases}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    # The rename must not reach the disk before the data does.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
