"""What to do when a call brings no answer. Pure: (failure, what was tried, time left) -> the next move."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from moe_net.rpc.base import CallFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPolicy:
    """Bounds of a trainer's calls. Within them, deadlines and hedges follow from what was measured."""

    forward_timeout_s: float = 20.0
    """The most that a layer's forward may take, fail-over included; also the deadline while nothing is measured yet."""
    backward_timeout_s: float = 20.0
    """The same of a layer's backward."""
    commit_timeout_s: float = 20.0
    """The same of a commit."""
    min_timeout_s: float = 2.0
    """No call is given up before: a machine that pauses this long (a collection, a full disk, a neighbour's build) has
    not failed. Hedges begin as early as the measured tail says."""
    attempts: int = 4
    """Calls per shipment at most: the first one and its retries. Those that fail at once cost little: the pauses."""
    retry_pause_s: float = 0.05
    """Wait before the first repetition of the same call to the same peer; doubles with each further one."""
    hedge_fraction: float = 0.05
    """Calls sent a second time only because the first is late, as a share of all calls; 0: none. Forward and backward
    have this much each."""
    hedge_burst: float = 16.0
    """So many may come together: who stalls often stalls in several layers in a row."""
    max_tensor_bytes: int = 14 * 2**20
    """Largest tensor in one message; larger shipments are cut by rows. A backward that brings its inputs again has
    two of them, and must stay below `Limits.max_message_bytes`."""
    max_rows: int = 32_768
    """Most rows in one message: half of what a server takes at most, and of what its queue holds."""

    def __post_init__(self) -> None:
        times_s = (self.forward_timeout_s, self.backward_timeout_s, self.commit_timeout_s, self.min_timeout_s)
        if min(times_s) <= 0 or self.attempts < 1:
            raise ValueError("timeouts must be positive and attempts at least 1")
        if not 0 <= self.hedge_fraction <= 1 or self.hedge_burst < 1:
            raise ValueError("hedge_fraction must be in 0..1 and hedge_burst at least 1")


class Move(Enum):
    """The caller's next move."""

    ELSEWHERE = "elsewhere"
    """Ask another replica."""
    AGAIN = "again"
    """The same call to the same peer, once more."""
    RESEND = "resend"
    """The same call with its inputs."""
    GIVE_UP = "give_up"
    """Count the pairs as dropped, or their gradients as lost."""


def pause_s(*, attempt: int, left_s: float, policy: CallPolicy, queue_s: float = 0.0) -> float:
    """Wait before call number `attempt` + 1 to the same peer: a connection that broke needs a moment, a full queue the
    time it said (`queue_s`); a deadline bounds both."""
    return max(0.0, min(max(queue_s, policy.retry_pause_s * 2 ** (attempt - 1)), left_s / 2))


def after_forward(
    failure: CallFailure, *, attempt: int, left_s: float, policy: CallPolicy, replica: bool, usable: bool
) -> Move:
    """Forward has no effect on the server, so any replica may be asked as long as time is left.

    Without another replica (`replica`) the same peer is asked again, if it is `usable` still and the failure may pass:
    a full queue, a connection that broke.
    """
    if left_s <= 0 or attempt >= policy.attempts:
        return Move.GIVE_UP
    if replica:
        return Move.ELSEWHERE
    passes = failure in (CallFailure.BUSY, CallFailure.UNREACHABLE)
    return Move.AGAIN if passes and usable else Move.GIVE_UP


def after_backward(
    failure: CallFailure, *, attempt: int, left_s: float, policy: CallPolicy, replica: bool, usable: bool
) -> Move:
    """Backward stays with the peer that ran forward while that can answer: it has the inputs. Another replica
    (`replica`) is given the inputs and takes over; the step's commit says whose answer counts.
    """
    if left_s <= 0 or failure is CallFailure.STALE_STEP:
        return Move.GIVE_UP
    if failure is CallFailure.INPUTS_GONE and attempt < policy.attempts:
        return Move.RESEND
    if replica:
        return Move.ELSEWHERE
    passes = failure in (CallFailure.BUSY, CallFailure.UNREACHABLE, CallFailure.LATE)
    return Move.AGAIN if passes and usable and attempt < policy.attempts else Move.GIVE_UP


def after_commit(failure: CallFailure, *, attempt: int, left_s: float, policy: CallPolicy, usable: bool = True) -> Move:
    """A commit is remembered by (trainer, step), so it may be said again while the peer is `usable`; one that it does
    not hear is owed to it, and it gets no rows before."""
    if left_s <= 0 or attempt >= policy.attempts or not usable:
        return Move.GIVE_UP
    return Move.AGAIN if failure in (CallFailure.BUSY, CallFailure.UNREACHABLE) else Move.GIVE_UP


@dataclass(frozen=True, slots=True, kw_only=True)
class HedgeBudget:
    """Caps the extra load of hedges: a token bucket that calls fill and hedges empty."""

    fraction: float
    """Tokens that a call adds."""
    burst: float
    """Tokens at most, and at the start."""
    tokens: float | None = None

    @property
    def left(self) -> float:
        return self.burst if self.tokens is None else self.tokens

    @property
    def allows(self) -> bool:
        return self.fraction > 0 and self.left >= 1

    def after_call(self) -> HedgeBudget:
        return replace(self, tokens=min(self.burst, self.left + self.fraction))

    def after_hedge(self, calls: int = 1) -> HedgeBudget:
        return replace(self, tokens=self.left - calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class DropWindow:
    """Routed and dropped pairs of the last steps: how much loss a run puts up with."""

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
