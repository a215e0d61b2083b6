"""Going on from a checkpoint: does it belong to this run and this text, and are the peers' experts those it left?"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from moe_net.checkpoint_folder import checkpoints_of
from moe_net.errors import CheckpointError
from moe_net.placement.view import View
from moe_net.rpc.base import CallError
from moe_net.rpc.grpc_client import GrpcTransport
from moe_net.trace import FaultEvent
from moe_net.types import ExpertId
from moe_peer.checkpoint import CheckpointMeta, load_checkpoint, newest_checkpoint, read_meta
from moe_peer.trainer import Trainer

INFO_TIMEOUT_S = 10.0
_HASH_DIGITS = 12
_NAMED = 8


def checkpoint_to_resume(folder: Path) -> Path:
    """The newest checkpoint in `folder`: itself, or of a trainer's output; CheckpointError when there is none."""
    inner = checkpoints_of(folder)
    return newest_checkpoint(inner if inner.is_dir() else folder)


def resume_trunk(path: Path, trainer: Trainer, expected: CheckpointMeta) -> FaultEvent | None:
    """Load the checkpoint at `path` into `trainer`; an event that names what of its run is another by now.

    CheckpointError when the two differ in what a state depends on: model, seed, text, tokenizer, moments.
    """
    meta = read_meta(path)
    differ = {name: pair for name, pair in _differences(meta, expected).items() if name not in _DECIDED_BY_ANOTHER}
    refused = [_in_words(name, *pair) for name, pair in differ.items() if name not in _MAY_CHANGE]
    if refused:
        raise CheckpointError(f"{path} cannot be continued here: {'; '.join(refused)}")
    load_checkpoint(path, trainer.model, trainer.optimizer)
    trainer.step = meta.step
    if not differ:
        return None
    reasons = dict.fromkeys(_MAY_CHANGE[name] for name in differ if _MAY_CHANGE[name])
    detail = ". ".join(["; ".join(_in_words(name, *pair) for name, pair in differ.items()), *reasons])
    return FaultEvent(what="run_changed", action="resumed", detail=f"the checkpoint's {detail}")


_SCHEDULE = "The learning rate follows the new schedule from here on"
_PLACE = "The text goes on at another place: until it is through, some of it comes again or is left out"
# What no state depends on, and what follows from a change. Sequences and trainers decide at which sample a step begins.
_MAY_CHANGE = {
    "run.wire": "",
    "run.record_ttl_s": "",
    "run.global_batch_tokens": "Experts step as often as the new batch says",
    "run.optimizer.learning_rate": _SCHEDULE,
    "run.optimizer.min_lr_ratio": _SCHEDULE,
    "run.optimizer.total_steps": _SCHEDULE,
    "run.optimizer.warmup_steps": _SCHEDULE,
    "run.optimizer.weight_decay": "",
    "run.optimizer.clip_norm": "",
    "sequences": _PLACE,
    "trainers": _PLACE,
}
# A run may name afterwards the tokenizer that its trainer had made: the tokenizer's own fingerprint decides.
_DECIDED_BY_ANOTHER = ("step", "run.tokenizer_sha256")
_HINTS = {
    "data_fingerprint": " (another text; --data, --text-field and --max-data-mib must be as they were)",
    "tokenizer_fingerprint": " (another tokenizer)",
}


def _differences(saved: CheckpointMeta, expected: CheckpointMeta) -> dict[str, tuple[object, object]]:
    """Fields by their path, as in `run.optimizer.total_steps`, with both values."""
    then, now = _flat(asdict(saved)), _flat(asdict(expected))
    return {name: (value, now[name]) for name, value in then.items() if value != now[name]}


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(cast(dict[str, object], value), f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _in_words(name: str, saved: object, expected: object) -> str:
    short = (str(value)[:_HASH_DIGITS] if name in _HINTS else repr(value) for value in (saved, expected))
    return f"{name}: {', not '.join(short)}{_HINTS.get(name, '')}"


async def live_versions(view: View, transport: GrpcTransport) -> dict[ExpertId, int]:
    """Steps that each expert has made, by its furthest replica; without those of peers that do not answer."""

    async def ask(peer_id: str) -> list[tuple[ExpertId, int]]:
        try:
            info = await transport.info(view.peers[peer_id], timeout_s=INFO_TIMEOUT_S)
        except CallError:
            return []
        return [
            (ExpertId(layer.layer, index), version)
            for layer in info.layers
            for index, version in zip(layer.expert_index, layer.version, strict=False)
        ]

    live: dict[ExpertId, int] = {}
    for answer in await asyncio.gather(*(ask(peer_id) for peer_id in view.peers)):
        for expert, version in answer:
            live[expert] = max(version, live.get(expert, 0))
    return live


def compare_experts(
    path: Path,
    saved: Mapping[ExpertId, int],
    live: Mapping[ExpertId, int],
    experts: Collection[ExpertId],
    *,
    allow_fresh: bool,
) -> FaultEvent | None:
    """An event when the peers' experts are not those of the checkpoint at `path`; `saved` and `live` map an expert to
    its version, `experts` are all of the run.

    A swarm that lived on, or came back from an older snapshot, is a fair place to go on. Where experts begin afresh
    under a trunk that knows trained ones, CheckpointError, unless `allow_fresh`: of peers that were started without
    them, or because the checkpoint lacks them (nobody answered for them when it was made).
    """
    behind = {e: (then, live[e]) for e, then in saved.items() if e in live and live[e] < then}
    ahead = {e: (then, live[e]) for e, then in saved.items() if e in live and live[e] > then}
    was_trained = any(saved.values()) or not saved
    lost = [e for e in experts if was_trained and e not in saved and not live.get(e)]
    left = [e for e, (_, now) in behind.items() if not now]
    if (lost or left) and not allow_fresh:
        parts = [f"{len(lost)} of {len(experts)} experts are not in {path} ({_few(lost)})"] if lost else []
        if left:
            parts.append(
                f"{len(left)} experts that {path} has trained are fresh at the peers ({_few(left)}): start the peers "
                f"with --load {path}"
            )
        raise CheckpointError(
            f"{'; '.join(parts)}. They would begin afresh under a trunk that is trained: go on from an earlier "
            "checkpoint that has them, or with fresh experts by --allow-fresh-experts"
        )
    alive = [e for e in experts if e not in saved and live.get(e)]
    if not behind and not ahead and not lost and not alive:
        return None
    parts = [
        f"{len(group)} {word} (up to {max(abs(now - then) for then, now in group.values())} steps)"
        for word, group in (("behind", behind), ("ahead", ahead))
        if group
    ]
    if alive:  # they lived on, or began afresh since, with another trainer: only their versions tell
        parts.append(f"{len(alive)} not in it (up to {max(live[e] for e in alive)} steps at the peers)")
    if lost or left:
        parts.append(f"{len(lost) + len(left)} begin afresh ({_few(sorted([*lost, *left]))})")
    detail = f"of {len(experts)} experts {', '.join(parts)}, seen from {path}: the losses will not be those of one run"
    return FaultEvent(what="experts_differ", action="resumed", detail=detail)


def _few(experts: Sequence[ExpertId]) -> str:
    return ", ".join(map(str, experts[:_NAMED])) + (", ..." if len(experts) > _NAMED else "")
