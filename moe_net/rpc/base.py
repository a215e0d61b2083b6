"""What a trainer needs of whoever runs experts: four calls, the same for a remote peer and for this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from moe_net.errors import MoeNetError
from moe_net.types import PeerInfo
from moe_net.wire.messages import (
    BackwardAnswer,
    BackwardCall,
    CommitAnswer,
    CommitCall,
    ForwardAnswer,
    ForwardCall,
)


class CallFailure(Enum):
    """Why a call brought no answer, as far as the caller's next move depends on it."""

    UNREACHABLE = "unreachable"
    """No connection, or it broke: the peer may be gone. (UNAVAILABLE, CANCELLED by the other side)"""
    LATE = "late"
    """No answer before the deadline. (DEADLINE_EXCEEDED)"""
    BUSY = "busy"
    """The peer refused for now: its queue is full. (RESOURCE_EXHAUSTED)"""
    INPUTS_GONE = "inputs_gone"
    """Backward of inputs the peer no longer has: send them along. (FAILED_PRECONDITION)"""
    STALE_STEP = "stale_step"
    """Backward of a step this trainer has committed already: too late to count. (ABORTED)"""
    REFUSED = "refused"
    """Our call is wrong, or the peer has a bug: asking again cannot help. (everything else)"""


class CallError(MoeNetError):
    """A call to an expert server that brought no answer."""

    def __init__(self, failure: CallFailure, peer: str, detail: str, *, queue_s: float = 0.0) -> None:
        super().__init__(f"{peer}: {failure.value}: {detail}")
        self.failure = failure
        self.peer = peer
        self.detail = detail
        self.queue_s = queue_s
        """Of a BUSY peer: the wait it expects just now; 0 when it did not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A call that brought no answer, as a value."""

    error: CallError
    waited_s: float


class ExpertTransport(Protocol):
    """Carries calls to peers. Every method raises CallError, and nothing else, when no answer comes."""

    async def forward(self, peer: PeerInfo, call: ForwardCall, *, timeout_s: float) -> ForwardAnswer: ...

    async def backward(self, peer: PeerInfo, call: BackwardCall, *, timeout_s: float) -> BackwardAnswer: ...

    async def commit(self, peer: PeerInfo, call: CommitCall, *, timeout_s: float) -> CommitAnswer: ...

    async def ping(self, peer: PeerInfo, *, timeout_s: float) -> None:
        """Return once the peer has answered."""
        ...

    async def fetch(
        self, peer: PeerInfo, layer: int, expert_index: Sequence[int], *, timeout_s: float
    ) -> dict[str, Tensor]:
        """State of the experts as in `wire.snapshot` (all of the layer when `expert_index` is empty)."""
        ...

    async def close(self) -> None: ...
