"""Checkpoints of a run as a trainer sees it: trunk, optimizer, place in the data, and the experts of the peers.

Where their files lie: `moe_net.checkpoint_folder`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_net.checkpoint_folder import (
    ANY_STATE,
    OPTIMIZER,
    STATE,
    TOKENIZER,
    TRUNK,
    after,
    all_checkpoints_of,
    checkpoint_at,
    checkpoints_of,
    expert_file,
    expert_files,
    is_checkpoint,
    newest_in,
    whole_ones,
)
from moe_net.config import RunConfig, from_json, to_json
from moe_net.errors import CheckpointError
from moe_net.trace import FaultEvent
from moe_net.types import ExpertId
from moe_net.wire.snapshot import pack, unpack
from moe_net.wire.state import LINEAGE_FIELD, STATE_FIELDS, expert_id, experts_in, split_name, tensor_name

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
    tokenizer: bytes | None = None,
) -> Path:
    """Write the checkpoint of `meta.step` to `folder`, whole or not at all; returns its path. `experts` may lack those
    nobody answered for; `tokenizer` is the file of a run's BPE.

    CheckpointError when it cannot be written (a full disk).
    """
    final = checkpoint_at(folder, meta.step)
    partial = folder / f".{final.name}.partial"
    try:
        _write(partial, meta, model, optimizer, experts, tokenizer)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{final} cannot be written: {error}") from error
    return final


def _write(
    partial: Path,
    meta: CheckpointMeta,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    experts: dict[str, Tensor],
    tokenizer: bytes | None,
) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if tokenizer is not None:
        (partial / TOKENIZER).write_bytes(tokenizer)
    save_file({k: v.contiguous() for k, v in _trunk(model).items()}, partial / TRUNK)
    save_file(_optimizer_tensors(optimizer), partial / OPTIMIZER)
    layers: dict[int, dict[str, Tensor]] = {}
    for name, value in experts.items():
        layers.setdefault(expert_id(name).layer, {})[name] = value
    for layer, state in sorted(layers.items()):
        file = expert_file(partial, layer)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pack(state, run=meta.run.name, shape=meta.run.model.expert_shape))
    files = sorted(p for p in partial.rglob("*") if p.is_file())
    description = {
        "format": FORMAT,
        "run": json.loads(to_json(meta.run)),
        "step": meta.step,
        "data_fingerprint": meta.data_fingerprint,
        "tokenizer_fingerprint": meta.tokenizer_fingerprint,
        "trainers": meta.trainers,
        "sequences": meta.sequences,
        "sha256": {str(p.relative_to(partial)): _sha256(p) for p in files},
    }
    (partial / STATE).write_text(json.dumps(description, indent=1))
    for path in [*files, partial / STATE]:
        _flush(path)


def newest_checkpoint(folder: Path) -> Path:
    """`folder` itself if it is a checkpoint, else the newest one in it; CheckpointError when there is none."""
    found = folder if is_checkpoint(folder) else newest_in(folder)
    if found is None:
        raise CheckpointError(f"no checkpoint in {folder}: expected {folder}/{ANY_STATE}")
    return found


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`: itself, of a trainer's output, or of a whole local run; None while there is
    none. CheckpointError when there is no such folder.

    Of trainers at the same step the first one counts: their experts are equal.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give a checkpoint, or a folder of a run that holds some")
    found: list[Path] = []
    for place in (folder, checkpoints_of(folder), *all_checkpoints_of(folder)):
        try:
            found.append(newest_checkpoint(place))
        except CheckpointError:
            continue
    return max(found, key=lambda path: read_meta(path).step, default=None)


def set_aside_later(folder: Path, step: int) -> None:
    """Rename the checkpoints in `folder` after `step` to `replaced-step-N`.

    A training that begins (or goes on) at `step` replaces them, and the newest one must be one of its own: stopped
    before it gets so far, it would otherwise be resumed from its predecessor's.
    """
    for path in after(folder, step):
        aside = folder / f"replaced-{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)


def remove_old(folder: Path, *, keep: int, limit_bytes: float) -> None:
    """Remove the oldest checkpoints in `folder` until there are no more than `keep`, of no more than `limit_bytes` in
    all (0: any number, any size). The newest whole one stays, whatever its size.

    Nothing else may write there. CheckpointError when one cannot be removed.
    """
    whole = whole_ones(folder)
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in whole}
    for path in whole[:-1]:
        if not (0 < keep < len(sizes) or 0 < limit_bytes < sum(sizes.values())):
            break
        del sizes[path]
        aside = folder / f".{path.name}.partial"  # at no moment half a checkpoint that looks whole
        try:
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            shutil.rmtree(aside)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be removed: {error}") from error


def read_meta(path: Path) -> CheckpointMeta:
    """The description of the checkpoint at `path`, after checking every file against its checksum."""
    try:
        state = json.loads((path / STATE).read_text())
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


def completed(
    experts: Mapping[str, Tensor], run: RunConfig, previous: Path | None
) -> tuple[dict[str, Tensor], list[FaultEvent]]:
    """`experts` and, for those that nobody answered for, the state that the checkpoint `previous` has of them.

    An expert that fell behind is a better start than a fresh one. The events say which ones these are, and which are
    found nowhere.
    """
    state = dict(experts)
    events: list[FaultEvent] = []
    if previous is not None and (missing := _missing(run, state)):
        try:
            carried = load_experts_of(previous, run, missing)
        except CheckpointError as error:
            events.append(FaultEvent(what="checkpoint_damaged", action="left_out", detail=str(error)))
            carried = {}
        if carried:
            state |= carried
            versions = [f"{expert} of version {version}" for expert, version in versions_of(carried).items()]
            detail = f"nobody answers for {len(versions)} experts, kept as in {previous}: {_few(versions)}"
            events.append(FaultEvent(what="experts_carried_over", action="saved", detail=detail))
    if missing := _missing(run, state):
        detail = f"nobody hosts {len(missing)} experts, a resume starts them afresh: {_few([str(e) for e in missing])}"
        events.append(FaultEvent(what="checkpoint_incomplete", action="saved", detail=detail))
    return state, events


def _missing(run: RunConfig, state: Mapping[str, Tensor]) -> list[ExpertId]:
    there = experts_in(state)
    return [expert for expert in run.model.expert_ids if str(expert) not in there]


def _few(texts: Sequence[str]) -> str:
    return ", ".join(texts[:8]) + (", ..." if len(texts) > 8 else "")


def load_experts_of(path: Path, run: RunConfig, experts: Collection[ExpertId]) -> dict[str, Tensor]:
    """State of those of `experts` that the checkpoint at `path` has, without what they had summed up for their next
    step; CheckpointError when it is damaged or of another run."""
    found: dict[str, Tensor] = {}
    wanted = {tensor_name(expert, field) for expert in experts for field in (*STATE_FIELDS, LINEAGE_FIELD)}
    for layer in sorted({expert.layer for expert in experts}):
        found |= {name: value for name, value in load_layer(path, run, layer).items() if name in wanted}
    return found


def load_layer(path: Path, run: RunConfig, layer: int) -> dict[str, Tensor]:
    """State of the experts of `layer` that the checkpoint at `path` has; CheckpointError as `load_experts_of`."""
    file = expert_file(path, layer)
    if not file.exists():
        return {}
    try:
        return unpack(file.read_bytes(), run=run.name, shape=run.model.expert_shape)
    except OSError as error:
        raise CheckpointError(f"{file}: {error}") from error


def versions_of(state: Mapping[str, Tensor]) -> dict[ExpertId, int]:
    """Optimizer steps of each expert in `state`, ascending by expert."""
    return {expert_id(name): int(value) for name, value in state.items() if split_name(name)[1] == "version"}


def saved_versions(path: Path) -> dict[ExpertId, int]:
    """Optimizer steps of each expert in the checkpoint at `path`; CheckpointError when it cannot be read."""
    found: dict[str, Tensor] = {}
    for file in expert_files(path):
        try:
            # The weights stay on the disk.
            with safe_open(file, "pt") as tensors:
                versions = [name for name in tensors.keys() if split_name(name)[1] == "version"]  # noqa: SIM118
                found |= {name: tensors.get_tensor(name) for name in versions}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: {error}") from error
    return versions_of(found)


def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Trunk and optimizer from the checkpoint at `path` into `model` and `optimizer`; CheckpointError names misfits."""
    try:
        trunk = load_file(path / TRUNK)
        moments = load_file(path / OPTIMIZER)
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
