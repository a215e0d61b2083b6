"""The exactly-once book of one expert host: which calls are open, which gradients are in, what was answered.

Pure bookkeeping (no clock, no I/O, no tensor arithmetic): `InputsT`, `SavedT` and `ReplyT` are whatever the host wants
kept; it says how many bytes they hold, and, by `advance`, what time it is.

A gradient is applied at most once because (1) its call id stands in the book from before it is added until the trainer
commits its step; (2) a Backward of a committed step is refused, so the ids of committed steps can be forgotten. It is
applied at least once because a trainer retries until it has an answer. What may be forgotten at any time only costs
work: saved pre-activations (recomputed), replies (recomputed without adding), inputs (sent again).

Ids and trainers are not dropped to make room, except those of trainers that neither added a gradient nor committed
for FORGET_AFTER_S, those silent longest first; without such the full book refuses. The price: a duplicate of a
gradient, or of a commit, that comes later than that counts a second time. No Backward is on its way for so long
(deadlines are seconds, and travel with the call); a commit owed by a trainer that was cut off may be.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from moe_net.errors import BusyError, InputsGoneError, StaleStepError, WireError

InputsT = TypeVar("InputsT")
SavedT = TypeVar("SavedT")
ReplyT = TypeVar("ReplyT")

ENTRY_OVERHEAD_BYTES = 1024
"""Counted for every kept entry beside its payload, so that a flood of one-row calls is bounded too: a dict slot, the
dataclasses and three small tensors measure 0.6..0.9 KiB."""


FORGET_AFTER_S = 3600.0
"""Silence after which a trainer may be forgotten when its room is needed: a hundred times the longest deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFacts:
    """What two messages about one call must agree on."""

    trainer: str
    step: int
    layer: int
    n_rows: int
    n_pairs: int | None = None
    """(row, expert) pairs; None in a Backward that brings no inputs."""

    def agrees_with(self, other: CallFacts) -> bool:
        same_pairs = self.n_pairs is None or other.n_pairs is None or self.n_pairs == other.n_pairs
        mine = (self.trainer, self.step, self.layer, self.n_rows)
        return same_pairs and mine == (other.trainer, other.step, other.layer, other.n_rows)


@dataclass(slots=True, kw_only=True)
class _Kept(Generic[InputsT, SavedT]):
    facts: CallFacts
    inputs: InputsT
    inputs_bytes: int
    saved: SavedT | None
    saved_bytes: int


@dataclass(slots=True, kw_only=True)
class _Reply(Generic[ReplyT]):
    facts: CallFacts
    answer: ReplyT
    n_bytes: int


@dataclass(slots=True)
class _Trainer:
    last_committed_step: int = -1
    applied: dict[bytes, int] = field(default_factory=dict[bytes, int])
    """Call id -> step, of steps not committed yet."""
    seen_s: float = 0.0
    """When it last added a gradient or committed."""
    voids: tuple[int, int] = (0, 0)
    """What the commit of `last_committed_step` answered: taken out, could not be taken out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardPlan(Generic[InputsT, SavedT, ReplyT]):
    """What to do with a Backward. `answer`: say it again. Otherwise compute from `inputs`, adding iff `accumulate`."""

    facts: CallFacts
    accumulate: bool
    inputs: InputsT | None = None
    saved: SavedT | None = None
    answer: ReplyT | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BookSizes:
    """How much the book holds of what it bounds, for tests."""

    kept_calls: int
    kept_bytes: int
    replies: int
    reply_bytes: int
    applied_calls: int
    trainers: int


class CallBook(Generic[InputsT, SavedT, ReplyT]):
    """See the module's text. Not thread-safe: one thread (the device's) owns it."""

    def __init__(
        self,
        *,
        cache_bytes: int,
        reply_bytes: int,
        max_trainers: int = 65_536,
        max_open_calls: int = 262_144,
        max_open_calls_per_trainer: int = 16_384,
        forget_after_s: float = FORGET_AFTER_S,
    ) -> None:
        """`cache_bytes` bounds inputs and saved pre-activations, `reply_bytes` the answers kept for retries. The other
        bounds are on what must not be forgotten before `forget_after_s` of silence: trainers seen, and applied calls of
        steps not committed yet (about 0.3 KiB each; 16 384 is a step of 32 layers, 8 micro-batches and 64 calls
        each)."""
        self.cache_bytes = cache_bytes
        self._reply_limit_bytes = reply_bytes
        self._max_trainers = max_trainers
        self._max_open_calls = max_open_calls
        self._max_open_calls_per_trainer = max_open_calls_per_trainer
        self._kept: OrderedDict[bytes, _Kept[InputsT, SavedT]] = OrderedDict()
        self._with_saved: OrderedDict[bytes, None] = OrderedDict()
        self._kept_bytes = 0
        self._replies: OrderedDict[bytes, _Reply[ReplyT]] = OrderedDict()
        self._reply_bytes = 0
        self._applied: dict[bytes, CallFacts] = {}
        self._trainers: OrderedDict[str, _Trainer] = OrderedDict()  # silent longest first
        self._forget_after_s = forget_after_s
        self._now_s = 0.0

    @property
    def sizes(self) -> BookSizes:
        return BookSizes(
            kept_calls=len(self._kept),
            kept_bytes=self._kept_bytes,
            replies=len(self._replies),
            reply_bytes=self._reply_bytes,
            applied_calls=len(self._applied),
            trainers=len(self._trainers),
        )

    def advance(self, now_s: float) -> None:
        """It is `now_s` (monotonic): what happens from here on happens then. Time never goes back."""
        self._now_s = max(self._now_s, now_s)

    def last_committed_step(self, trainer: str) -> int:
        """-1 before the first commit."""
        known = self._trainers.get(trainer)
        return -1 if known is None else known.last_committed_step

    def check_forward(self, call_id: bytes, facts: CallFacts) -> None:
        """WireError when the id belongs to another call."""
        kept = self._kept.get(call_id)
        known = kept.facts if kept is not None else self._applied.get(call_id)
        if known is not None and not facts.agrees_with(known):
            raise _contradiction(call_id, facts, known)

    def keep(
        self,
        call_id: bytes,
        facts: CallFacts,
        inputs: InputsT,
        inputs_bytes: int,
        saved: SavedT | None = None,
        saved_bytes: int = 0,
    ) -> bool:
        """Keep a Forward's inputs for its Backward; a retry replaces what the first one left.

        False, and nothing kept, when no Backward can want them (applied already, step committed) or when they alone
        are over the limit.
        """
        if call_id in self._applied or facts.step <= self.last_committed_step(facts.trainer):
            return False
        self._drop_kept(call_id)
        needed_bytes = inputs_bytes + ENTRY_OVERHEAD_BYTES
        if needed_bytes > self.cache_bytes:
            return False
        if saved is None or needed_bytes + saved_bytes > self.cache_bytes:
            saved, saved_bytes = None, 0
        self._kept[call_id] = _Kept(
            facts=facts, inputs=inputs, inputs_bytes=needed_bytes, saved=saved, saved_bytes=saved_bytes
        )
        self._kept_bytes += needed_bytes + saved_bytes
        if saved is not None:
            self._with_saved[call_id] = None
        while self._kept_bytes > self.cache_bytes and self._with_saved:
            oldest, _ = self._with_saved.popitem(last=False)
            entry = self._kept[oldest]
            self._kept_bytes -= entry.saved_bytes
            entry.saved, entry.saved_bytes = None, 0
        while self._kept_bytes > self.cache_bytes:
            self._drop_kept(next(iter(self._kept)))
        return True

    def plan_backward(
        self, call_id: bytes, facts: CallFacts, resent: InputsT | None = None
    ) -> BackwardPlan[InputsT, SavedT, ReplyT]:
        """What to do with a Backward; changes nothing but the order of eviction and, for
        room, forgets silent trainers.

        Raises StaleStepError (step committed), WireError (contradicts what is known of the id), InputsGoneError (no
        inputs here and none sent), BusyError (no room to remember the id).
        """
        last = self.last_committed_step(facts.trainer)
        if facts.step <= last:
            raise StaleStepError(
                f"gradients of step {facts.step} came after {facts.trainer!r} committed step {last}; drop them"
            )
        kept = self._kept.get(call_id)
        applied = self._applied.get(call_id)
        known = kept.facts if kept is not None else applied
        if known is not None and not facts.agrees_with(known):
            raise _contradiction(call_id, facts, known)
        if applied is not None:
            reply = self._replies.get(call_id)
            if reply is not None:
                self._replies.move_to_end(call_id)
                return BackwardPlan(facts=applied, accumulate=False, answer=reply.answer)
            if resent is None:
                raise _gone(call_id, "was applied before, but its answer and")
            return BackwardPlan(facts=facts, accumulate=False, inputs=resent)
        self._check_room(facts.trainer)
        if kept is not None:
            self._kept.move_to_end(call_id)
            return BackwardPlan(facts=kept.facts, accumulate=True, inputs=kept.inputs, saved=kept.saved)
        if resent is None:
            raise _gone(call_id, "is not known here, or")
        return BackwardPlan(facts=facts, accumulate=True, inputs=resent)

    def mark_applied(self, call_id: bytes, facts: CallFacts) -> None:
        """Write the id down, BEFORE its gradient is added, and let go of its inputs.

        If adding then fails by a bug of ours the gradient may be lost, but it is never counted twice. BusyError when
        there is no room: calls planned together may fill the book together.
        """
        assert call_id not in self._applied, "plan_backward said to accumulate an applied call"
        self._check_room(facts.trainer)
        self._drop_kept(call_id)
        self._applied[call_id] = facts
        self._seen(facts.trainer).applied[call_id] = facts.step

    def store_reply(self, call_id: bytes, answer: ReplyT, answer_bytes: int) -> None:
        """Keep the answer of an applied call for its retries, as long as there is room."""
        self._drop_reply(call_id)
        facts = self._applied.get(call_id)
        needed_bytes = answer_bytes + ENTRY_OVERHEAD_BYTES
        if facts is None or needed_bytes > self._reply_limit_bytes:
            return
        self._replies[call_id] = _Reply(facts=facts, answer=answer, n_bytes=needed_bytes)
        self._reply_bytes += needed_bytes
        while self._reply_bytes > self._reply_limit_bytes:
            self._drop_reply(next(iter(self._replies)))

    def applied_among(self, trainer: str, step: int, call_ids: Sequence[bytes]) -> list[tuple[bytes, CallFacts]]:
        """Those of `call_ids`, each once, whose gradients `trainer` had added in steps up to `step` that it has not
        committed. Nobody voids a stranger's gradient."""
        known = ((call_id, self._applied.get(call_id)) for call_id in dict.fromkeys(call_ids))
        return [(i, facts) for i, facts in known if facts and facts.trainer == trainer and facts.step <= step]

    def note_voids(self, trainer: str, voided: int, failed: int) -> None:
        """What the trainer's last commit answered, for its repetitions."""
        self._trainers[trainer].voids = (voided, failed)

    def voids_of(self, trainer: str, step: int) -> tuple[int, int]:
        """(taken out, could not be taken out) as the commit of `step` answered; zeros unless it was the last one."""
        known = self._trainers.get(trainer)
        return known.voids if known is not None and known.last_committed_step == step else (0, 0)

    def commit(self, trainer: str, step: int) -> bool:
        """Close every step of `trainer` up to `step`; False when that was done before.

        BusyError when the trainer is new and there is no room to remember it.
        """
        known = self._trainers.get(trainer)
        if known is not None and step <= known.last_committed_step:
            return False
        self._check_trainer_room(trainer)
        known = self._seen(trainer)
        known.last_committed_step = step
        known.voids = (0, 0)
        for call_id in [i for i, applied_step in known.applied.items() if applied_step <= step]:
            del known.applied[call_id]
            del self._applied[call_id]
            self._drop_reply(call_id)
        # At most cache_bytes / 1 KiB entries: 15 ms for a full 256 MiB of one-row calls, microseconds in practice.
        for call_id in [i for i, k in self._kept.items() if k.facts.trainer == trainer and k.facts.step <= step]:
            self._drop_kept(call_id)
        return True

    def _seen(self, trainer: str) -> _Trainer:
        known = self._trainers.setdefault(trainer, _Trainer())
        known.seen_s = self._now_s
        self._trainers.move_to_end(trainer)
        return known

    def _forget_silent(self, speaking: str) -> bool:
        """Forget the trainer silent longest, if it has been for long enough; not the one that asks for room."""
        silent = next((name for name in self._trainers if name != speaking), None)
        if silent is None or self._now_s - self._trainers[silent].seen_s < self._forget_after_s:
            return False
        for call_id in self._trainers.pop(silent).applied:
            del self._applied[call_id]
            self._drop_reply(call_id)
        # Its kept inputs may stay: they are of steps that it had not committed, and none was added.
        return True

    def _check_trainer_room(self, trainer: str) -> None:
        if trainer in self._trainers:
            return
        if len(self._trainers) >= self._max_trainers and not self._forget_silent(trainer):
            raise BusyError(
                f"this peer remembers the commits of {len(self._trainers)} trainers and has no room for {trainer!r}"
            )

    def _check_room(self, trainer: str) -> None:
        self._check_trainer_room(trainer)
        known = self._trainers.get(trainer)
        if known is not None and len(known.applied) >= self._max_open_calls_per_trainer:
            raise BusyError(f"{trainer!r} has {len(known.applied)} applied calls in steps it has not committed")
        while len(self._applied) >= self._max_open_calls and self._forget_silent(trainer):
            pass
        if len(self._applied) >= self._max_open_calls:
            raise BusyError(f"{len(self._applied)} applied calls stand in steps that are not committed")

    def _drop_kept(self, call_id: bytes) -> None:
        entry = self._kept.pop(call_id, None)
        if entry is not None:
            self._kept_bytes -= entry.inputs_bytes + entry.saved_bytes
            self._with_saved.pop(call_id, None)

    def _drop_reply(self, call_id: bytes) -> None:
        reply = self._replies.pop(call_id, None)
        if reply is not None:
            self._reply_bytes -= reply.n_bytes


def _contradiction(call_id: bytes, facts: CallFacts, known: CallFacts) -> WireError:
    return WireError(f"call_id {call_id.hex()} belongs to another call: {known}, now said to be {facts}")


def _gone(call_id: bytes, why: str) -> InputsGoneError:
    return InputsGoneError(f"call {call_id.hex()} {why} its inputs are gone: send them along")
