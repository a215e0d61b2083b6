"""ExpertTransport to experts in this very process: the same calls, no bytes. Also what tests compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from moe_net.errors import BusyError, ExpertCallError, InputsGoneError, StaleStepError, WireError
from moe_net.rpc.base import CallError, CallFailure
from moe_net.types import PeerInfo
from moe_net.wire.messages import (
    BackwardAnswer,
    BackwardCall,
    CommitAnswer,
    CommitCall,
    ForwardAnswer,
    ForwardCall,
)

AnswerT = TypeVar("AnswerT")


class Host(Protocol):
    """What `experts.host.ExpertHost` offers, as far as a transport needs it."""

    def forward_many(self, calls: Sequence[ForwardCall]) -> list[ForwardAnswer | ExpertCallError | WireError]: ...

    def backward_many(self, calls: Sequence[BackwardCall]) -> list[BackwardAnswer | ExpertCallError | WireError]: ...

    def commit(self, call: CommitCall) -> CommitAnswer: ...

    def fetch(self, layer: int, indices: Sequence[int]) -> dict[str, Tensor]: ...


def failure_of(error: ExpertCallError | WireError) -> CallFailure:
    """What a host's refusal means to the caller; gRPC's status codes are mapped to the same."""
    if isinstance(error, InputsGoneError):
        return CallFailure.INPUTS_GONE
    if isinstance(error, StaleStepError):
        return CallFailure.STALE_STEP
    if isinstance(error, BusyError):
        return CallFailure.BUSY
    return CallFailure.REFUSED


class LocalTransport:
    """Calls go to the host of the named peer, at once, on the caller's thread."""

    def __init__(self, hosts: Mapping[str, Host]) -> None:
        self._hosts = hosts

    def _do(self, peer: PeerInfo, work: Callable[[Host], AnswerT | ExpertCallError | WireError]) -> AnswerT:
        host = self._hosts.get(peer.peer_id)
        if host is None:
            raise CallError(CallFailure.UNREACHABLE, peer.peer_id, "no such host in this process")
        try:
            answer = work(host)
        except (ExpertCallError, WireError) as error:
            answer = error
        if isinstance(answer, ExpertCallError | WireError):
            queue_s = answer.queue_s if isinstance(answer, BusyError) else 0.0
            raise CallError(failure_of(answer), peer.peer_id, str(answer), queue_s=queue_s) from answer
        return answer

    async def forward(self, peer: PeerInfo, call: ForwardCall, *, timeout_s: float) -> ForwardAnswer:
        return self._do(peer, lambda host: host.forward_many([call])[0])

    async def backward(self, peer: PeerInfo, call: BackwardCall, *, timeout_s: float) -> BackwardAnswer:
        return self._do(peer, lambda host: host.backward_many([call])[0])

    async def commit(self, peer: PeerInfo, call: CommitCall, *, timeout_s: float) -> CommitAnswer:
        return self._do(peer, lambda host: host.commit(call))

    async def ping(self, peer: PeerInfo, *, timeout_s: float) -> None:
        if peer.peer_id not in self._hosts:
            raise CallError(CallFailure.UNREACHABLE, peer.peer_id, "no such host in this process")

    async def fetch(
        self, peer: PeerInfo, layer: int, expert_index: Sequence[int], *, timeout_s: float
    ) -> dict[str, Tensor]:
        return self._do(peer, lambda host: host.fetch(layer, expert_index))

    async def close(self) -> None:
        return None
