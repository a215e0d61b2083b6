"""What one replica adds to a step that others make as well: its gradient sums, with the rows that they are of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_net.errors import CheckpointError
from moe_net.types import ExpertId, ExpertShape
from moe_net.wire.messages import CommitCall
from moe_net.wire.state import MAX_COUNT, experts_in, tensor_name

BATCH_BYTES = 32
_HEADER_BYTES, _ENTRY_BYTES = 64 * 1024, 256

MAX_COMMITS = 1024
"""Of a batch that are named; of more, the last ones."""
MAX_SHARED_EXPERTS = 8192
"""Of a call: twice those of a large swarm, and 0.07 s of the loop; 256 KiB of them would take 0.7."""
MAX_NORM = 1e15
"""Of a share. The squares of many add up to what fp32 holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareCall:
    """Asks a replica for its part of a step."""

    batch: bytes
    """Which step: SHA-256 of the commits that it closes."""
    experts: tuple[ExpertId, ...]
    commits: tuple[int, ...] = ()
    """`commit_key` of those commits, in the order in which they came."""


def commit_key(call: CommitCall) -> int:
    """Names a commit, in 8 bytes."""
    named = json.dumps([call.trainer, call.step, call.tokens]).encode()
    return int.from_bytes(hashlib.sha256(named).digest()[:8], "big")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertShare:
    """Of one expert."""

    rows: int
    """That the sums are of; 0: they make up for gradients of an earlier step, which should not have been in it."""
    rows_before: int
    """That its origin had stepped on before."""
    g_in: Tensor
    g_out: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share:
    """One replica's part of one step; only the experts that had rows there."""

    origin: int
    """Whose rows these are (see `experts.lineage`)."""
    clock: int
    """Steps of the run, with this one."""
    experts: Mapping[ExpertId, ExpertShare]
    committed_tokens: int | None = None
    """Instead of experts, when steps end at other commits there: towards the next one, after the last of the call's."""

    def to_state(self) -> dict[str, Tensor]:
        """For `wire.snapshot.pack`."""
        state = {"origin": torch.tensor(self.origin), "clock": torch.tensor(self.clock)}
        for expert, share in self.experts.items():
            state[tensor_name(expert, "rows")] = torch.tensor([share.rows, share.rows_before])
            state[tensor_name(expert, "g_in")] = share.g_in
            state[tensor_name(expert, "g_out")] = share.g_out
        if self.committed_tokens is not None:
            state["committed"] = torch.tensor(self.committed_tokens)
        return state


def share_from_state(state: Mapping[str, Tensor], *, asked: Collection[ExpertId], shape: ExpertShape) -> Share:
    """The share in `state`, of no experts but those `asked` for. CheckpointError when it is none, or not usable."""
    origin, clock = _number(state, "origin"), _number(state, "clock")
    if "committed" in state:
        if len(state) > 3:
            raise CheckpointError("committed: with gradients of a step that is not ours")
        return Share(origin=origin, clock=clock, experts={}, committed_tokens=_number(state, "committed", least=0))
    named = experts_in(state.keys() - {"origin", "clock"})
    experts: dict[ExpertId, ExpertShare] = {}
    for expert in asked:
        if str(expert) in named:
            named.discard(str(expert))
            experts[expert] = _expert_share(state, expert, shape)
    if named or len(state) != 2 + 3 * len(experts):
        raise CheckpointError("a share of gradients with more in it than was asked for")
    return Share(origin=origin, clock=clock, experts=experts)


def _number(state: Mapping[str, Tensor], name: str, *, least: int = 1) -> int:
    value = state.get(name)
    if value is None or value.dtype != torch.int64 or value.ndim or int(value) < least:
        raise CheckpointError(f"{name} is missing, or no number from {least} on")
    return int(value)


def _expert_share(state: Mapping[str, Tensor], expert: ExpertId, shape: ExpertShape) -> ExpertShare:
    rows, g_in, g_out = (tensor_name(expert, field) for field in ("rows", "g_in", "g_out"))
    wanted = {
        rows: (torch.int64, (2,)),
        g_in: (torch.float32, (shape.d_model, shape.d_hidden)),
        g_out: (torch.float32, (shape.d_ff, shape.d_model)),
    }
    for name, (dtype, size) in wanted.items():
        value = state.get(name)
        if value is None or value.dtype != dtype or value.shape != size:
            raise CheckpointError(f"{name} is missing, or not {dtype} {list(size)}")
        # NaN is not below anything. Larger ones make the sum's norm infinite, and the step of all replicas void.
        if name != rows and not float(torch.linalg.vector_norm(value)) <= MAX_NORM:
            raise CheckpointError(f"{name} has a norm over {MAX_NORM:g}, or none")
    now, before = state[rows].tolist()
    if not (0 <= now <= MAX_COUNT and 0 <= before <= MAX_COUNT):
        raise CheckpointError(f"{rows} is {now} after {before}, must be 0..{MAX_COUNT} each")
    return ExpertShare(rows=now, rows_before=before, g_in=state[g_in], g_out=state[g_out])


def max_share_bytes(n_experts: int, shape: ExpertShape) -> int:
    """More than a file of `n_experts` shares ever has, and little more."""
    one_bytes = 4 * shape.d_model * (shape.d_hidden + shape.d_ff) + 16
    return _HEADER_BYTES + n_experts * (one_bytes + 3 * _ENTRY_BYTES)
