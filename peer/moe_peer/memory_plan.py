"""How a peer divides the memory that it may take: experts, caches for their calls, and room for the work. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from moe_peer.config import ServeConfig

MIB = 2**20
STAGE_MIB, QUEUE_MIB = 576, 256
"""What staged calls and the queue get where memory is plentiful: more brings nothing."""
SCARCE_BYTES = 4 * 2**30
"""Available memory below which what is kept or taken in advance to be fast is missing elsewhere."""
QUEUE_FACTOR = 4
"""Times its bytes, that a full queue takes: rows, the messages they came in, answers, and what gRPC holds."""
CACHES_SHARE = 1 / 4
"""Share of the available memory that caches and queue take together at most, unless options say otherwise."""
EXPERTS_SHARE, SCARCE_EXPERTS_SHARE = 1 / 2, 1 / 3
"""Experts' share of what the caches leave; the latter where memory is scarce. The rest is for dispatches, for steps
that replicas make together (three quarters of the experts, with one other), for states on their way to others (a
layer's experts, once and a half), and for what the allocator cannot give back. With 1 GiB and one processor, 4 clients
that sent as much as they could, and a replica: 16 experts of 12 MiB, 932 MiB at the most."""
MIN_AT_ONCE_MIB, AT_ONCE_MIB = 4, 512
AT_ONCE_SHARE = 1 / 32
"""Share of what the caches leave that is for the pre-activations of rows that run together; with its copies a backward
takes four times that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Experts, and bytes of each part."""

    n_experts: int
    """Experts to host: as many as asked for, or as fit."""
    fitting_experts: int
    stage_bytes: int
    """See `experts.staging`."""
    queue_bytes: int
    at_once_bytes: int
    """See `experts.bank.AT_ONCE_BYTES`."""
    sparing: bool
    """True where memory is scarce."""

    @property
    def caches_bytes(self) -> int:
        """What staged calls and queue take together at the most."""
        return _taken(self.stage_bytes, self.queue_bytes)


def plan_memory(config: ServeConfig, *, available_bytes: int, expert_bytes: int, n_asked: int | None) -> MemoryPlan:
    """The plan of a peer with so much memory that hosts `n_asked` experts, or as many as fit.

    ValueError when none fits, or when those asked for alone take more than there is.
    """
    usual_mib = (STAGE_MIB, QUEUE_MIB)
    scale = min(1.0, CACHES_SHARE * available_bytes / (_taken(*usual_mib) * MIB))
    options_mib = (config.stage_mib, config.max_queue_mib)
    stage, queue = (
        int(usual * scale * MIB) if option is None else option * MIB
        for option, usual in zip(options_mib, usual_mib, strict=True)
    )
    caches_bytes = _taken(stage, queue)
    rest_bytes = max(0, available_bytes - caches_bytes)
    sparing = available_bytes < SCARCE_BYTES
    fitting = int((SCARCE_EXPERTS_SHARE if sparing else EXPERTS_SHARE) * rest_bytes) // expert_bytes
    n_experts = fitting if n_asked is None else n_asked
    there = f"{available_bytes / MIB:.0f} MiB of memory are available here"
    if n_experts == 0:
        raise ValueError(
            f"no expert fits: {there}, caches take {caches_bytes / MIB:.0f}, and an expert {expert_bytes / MIB:.1f} "
            "and twice that for its work. Give this peer more memory, or its caches less (--stage-mib, --max-queue-mib)"
        )
    if n_experts * expert_bytes > available_bytes:
        raise ValueError(
            f"{n_experts} experts take {n_experts * expert_bytes / MIB:.0f} MiB, but {there}: there is room for "
            f"{fitting} (--max-experts {fitting}), beside caches and work"
        )
    return MemoryPlan(
        n_experts=n_experts,
        fitting_experts=fitting,
        stage_bytes=stage,
        queue_bytes=queue,
        at_once_bytes=min(max(MIN_AT_ONCE_MIB * MIB, int(AT_ONCE_SHARE * rest_bytes)), AT_ONCE_MIB * MIB),
        sparing=sparing,
    )


def _taken(stage: int, queue: int) -> int:
    return stage + QUEUE_FACTOR * queue
