"""What to do when a call brings no answer. Pure: (failure, what was tried, time left) -> the next move."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from moe_net.rpc.base import CallFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPolicy:
    """Deadlines and attempts of a trainer's calls."""

    forward_timeout_s: float = 20.0
    """Deadline of a layer's forward, fail-over included."""
    backward_timeout_s: float = 20.0
    """Deadline of a layer's backward, retries included."""
    commit_timeout_s: float = 20.0
    """Deadline of a commit, retries included."""
    attempts: int = 3
    """Calls per shipment at most: the first one and its retries."""
    retry_pause_s: float = 0.05
    """Wait before the first repetition of the same call to the same peer; doubles with each further one."""
    max_tensor_bytes: int = 14 * 2**20
    """Largest tensor in one message; larger shipments are cut by rows. A backward that brings its inputs again has
    two of them, and must stay below `Limits.max_message_bytes`."""
    max_rows: int = 32_768
    """Most rows in one message: half of what a server takes at most, and of what its queue holds."""

    def __post_init__(self) -> None:
        if min(self.forward_timeout_s, self.backward_timeout_s, self.commit_timeout_s) <= 0 or self.attempts < 1:
            raise ValueError("timeouts must be positive and attempts at least 1")


class Move(Enum):
    """The caller's next move."""

    ELSEWHERE = "elsewhere"
    """Ask another replica (forward: the same rows may run anywhere)."""
    AGAIN = "again"
    """The same call, same id, same peer: it cannot count twice."""
    RESEND = "resend"
    """The same call with its inputs."""
    GIVE_UP = "give_up"
    """Count the pairs as dropped."""


def pause_s(*, attempt: int, left_s: float, policy: CallPolicy) -> float:
    """Wait before call number `attempt` + 1: a connection that broke needs a moment, a deadline bounds it."""
    return max(0.0, min(policy.retry_pause_s * 2 ** (attempt - 1), left_s / 2))


def after_forward(failure: CallFailure, *, attempt: int, left_s: float, policy: CallPolicy) -> Move:
    """Forward has no effect on the server, so any replica may be asked as long as time is left."""
    if left_s <= 0 or attempt >= policy.attempts:
        return Move.GIVE_UP
    return Move.ELSEWHERE


def after_backward(failure: CallFailure, *, attempt: int, left_s: float, policy: CallPolicy) -> Move:
    """Backward follows the peer that ran forward: only its book knows whether the gradient counted already."""
    if left_s <= 0 or attempt >= policy.attempts:
        return Move.GIVE_UP
    match failure:
        case CallFailure.INPUTS_GONE:
            return Move.RESEND
        case CallFailure.UNREACHABLE | CallFailure.LATE | CallFailure.BUSY:
            return Move.AGAIN
        case CallFailure.STALE_STEP | CallFailure.REFUSED:
            return Move.GIVE_UP


def after_commit(failure: CallFailure, *, attempt: int, left_s: float, policy: CallPolicy) -> Move:
    """A commit is remembered by (trainer, step), so it may be said again; a peer that cannot be reached owes it
    until the next one, and gets no rows before that."""
    if left_s <= 0 or attempt >= policy.attempts:
        return Move.GIVE_UP
    return Move.AGAIN if failure in (CallFailure.LATE, CallFailure.BUSY) else Move.GIVE_UP


@dataclass(frozen=True, slots=True, kw_only=True)
class DropWindow:
    """Routed and dropped pairs of the last steps: how much loss a run puts up with (design, D7)."""

    max_fraction: float = 0.5
    """Largest dropped share over the window."""
    length: int = 20
    """Steps of the window; it judges nothing before it is full, so that one bad step stops nobody."""
    steps: tuple[tuple[int, int], ...] = ()
    """(routed, dropped) of the last steps."""

    def after(self, routed: int, dropped: int) -> DropWindow:
        """With one more step."""
        return replace(self, steps=(*self.steps, (routed, dropped))[-self.length :])

    @property
    def fraction(self) -> float:
        """Dropped share over the window; 0 while nothing was routed."""
        routed = sum(step[0] for step in self.steps)
        return sum(step[1] for step in self.steps) / routed if routed else 0.0

    @property
    def exceeded(self) -> bool:
        return len(self.steps) == self.length and self.fraction > self.max_fraction
