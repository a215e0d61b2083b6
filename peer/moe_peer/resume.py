"""Going on from a checkpoint: does it belong to this run and this text, and are the peers' experts those it left?"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

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


def checkpoint_to_resume(folder: Path) -> Path:
    """The newest checkpoint in `folder`: itself, or of a trainer's output; CheckpointError when there is none."""
    inner = checkpoints_of(folder)
    return newest_checkpoint(inner if inner.is_dir() else folder)


def resume_trunk(path: Path, trainer: Trainer, expected: CheckpointMeta) -> None:
    """Load the checkpoint at `path` into `trainer`.

    CheckpointError when it is not of the same run, text and trainers as `expected` (whose step does not count).
    """
    meta = read_meta(path)
    for name in ("run", "data_fingerprint", "tokenizer_fingerprint", "trainers", "sequences"):
        if getattr(meta, name) != getattr(expected, name):
            raise CheckpointError(
                f"{path} cannot be continued here: its {name} is {getattr(meta, name)}, not {getattr(expected, name)}"
            )
    load_checkpoint(path, trainer.model, trainer.optimizer)
    trainer.step = meta.step


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
    path: Path, saved: Mapping[ExpertId, int], live: Mapping[ExpertId, int], *, allow_fresh: bool
) -> FaultEvent | None:
    """An event when the peers' experts are not those of the checkpoint at `path`; both map an expert to its version.

    A swarm that lived on, or came back from an older snapshot, is a fair place to go on. One in which every trained
    expert is fresh was most likely started without them: CheckpointError, unless `allow_fresh`.
    """
    both = {expert: (version, live[expert]) for expert, version in saved.items() if expert in live}
    trained = [now for then, now in both.values() if then > 0]
    if trained and not any(trained) and not allow_fresh:
        raise CheckpointError(
            f"{path} has {len(trained)} trained experts, and those of the peers are all fresh: start the peers with "
            f"--load {path}, or go on with fresh experts by --allow-fresh-experts"
        )
    behind = {expert: pair for expert, pair in both.items() if pair[1] < pair[0]}
    ahead = {expert: pair for expert, pair in both.items() if pair[1] > pair[0]}
    if not behind and not ahead:
        return None
    parts = [
        f"{len(group)} {word} (up to {max(abs(now - then) for then, now in group.values())} steps)"
        for word, group in (("behind", behind), ("ahead", ahead))
        if group
    ]
    detail = f"of {len(both)} experts {' and '.join(parts)} of {path}: the losses will not be those of one whole run"
    return FaultEvent(what="experts_differ", action="resumed", detail=detail)
