"""What a host keeps of calls between their Forward and their trainer's Commit. Pure: no clock, no tensor arithmetic.

A Forward's inputs wait for its Backward; with the Backward's gradient they are staged, and wait for the Commit that
names the call. Nothing is added to anything before that, so a retry, a duplicate, a hedge or a trainer that dies counts
nothing, and what is staged may be let go at any moment: it costs its trainer a gradient, of which the commit's answer
tells, and nobody else anything.

Rows count towards one limit. To make room go, in this order: what can be computed again (pre-activations, and what the
weights' gradients are made of), inputs that can be sent again, what trainers staged that have been silent for long, and
what the trainer staged that holds most, if that is more than who asks for room. Who asks is refused otherwise.

A trainer's last committed step is remembered for `FORGET_AFTER_S` at least, so that a commit counts once.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from moe_net.errors import BusyError, InputsGoneError, StaleStepError, WireError

InputsT = TypeVar("InputsT")
GradT = TypeVar("GradT")
ExtraT = TypeVar("ExtraT")
AnswerT = TypeVar("AnswerT")

ENTRY_OVERHEAD_BYTES = 6 * 1024
"""Counted for every call beside its payload, so that a flood of one-row calls is bounded too: tensors, dataclasses and
dict slots of one that is staged take 3.3 KiB of a process, and 5.3 once it is committed."""
SILENT_AFTER_S = 120.0
"""Silence after which what a trainer staged may go when others need the room: several times the longest deadline."""
FORGET_AFTER_S = 3600.0
"""Silence after which a trainer's steps may be forgotten when others need the room."""


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
class Staged(Generic[InputsT, GradT, ExtraT]):
    """One call."""

    facts: CallFacts
    inputs: InputsT
    grad: GradT | None = None
    """Of its Backward; None before that."""
    extra: ExtraT | None = None
    """What would have to be computed again."""
    row_bytes: int = 0
    extra_bytes: int = 0

    @property
    def n_bytes(self) -> int:
        return self.row_bytes + self.extra_bytes


@dataclass(slots=True)
class _Trainer(Generic[AnswerT]):
    last_committed_step: int = -1
    answer: AnswerT | None = None
    """To the commit of that step."""
    calls: OrderedDict[bytes, None] = field(default_factory=OrderedDict[bytes, None])
    """Ordered, for both ends of a dict from which much was taken are found slowly."""
    staged_bytes: int = 0
    seen_s: float = 0.0
    """When it last called or committed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken(Generic[InputsT, GradT, ExtraT]):
    """What a commit named."""

    calls: dict[bytes, Staged[InputsT, GradT, ExtraT]]
    """In the order in which it named them."""
    missing: tuple[bytes, ...]
    """Not staged here for a step of this trainer up to that one."""


class Staging(Generic[InputsT, GradT, ExtraT, AnswerT]):
    """See the module's text. One thread (the device's) owns it; payloads are whatever the host wants kept."""

    def __init__(
        self,
        *,
        limit_bytes: int,
        max_trainers: int = 65_536,
        silent_after_s: float = SILENT_AFTER_S,
        forget_after_s: float = FORGET_AFTER_S,
    ) -> None:
        self.limit_bytes = limit_bytes
        self._max_trainers = max_trainers
        self._silent_after_s = silent_after_s
        self._forget_after_s = forget_after_s
        self._calls: dict[bytes, Staged[InputsT, GradT, ExtraT]] = {}
        self._with_extra: OrderedDict[bytes, None] = OrderedDict()  # the oldest first
        self._waiting: OrderedDict[bytes, None] = OrderedDict()  # for their Backward, the oldest first
        self._trainers: OrderedDict[str, _Trainer[AnswerT]] = OrderedDict()  # silent longest first
        self._with_calls: OrderedDict[str, _Trainer[AnswerT]] = OrderedDict()  # those of them, in the same order
        self._bytes = 0
        self._staged_bytes = 0  # of rows alone
        self.held_bytes = 0
        """Of calls that were committed, and still are their host's: see `let_go`."""
        self._now_s = 0.0

    @property
    def n_bytes(self) -> int:
        """Of all calls, with those that were committed and not let go."""
        return self._bytes + self.held_bytes

    @property
    def n_calls(self) -> int:
        """Those that were not committed."""
        return len(self._calls)

    @property
    def n_trainers(self) -> int:
        return len(self._trainers)

    def advance(self, now_s: float) -> None:
        """It is `now_s` (monotonic): what happens from here on happens then. Time never goes back."""
        self._now_s = max(self._now_s, now_s)

    def last_committed_step(self, trainer: str) -> int:
        """-1 before the first commit."""
        known = self._trainers.get(trainer)
        return -1 if known is None else known.last_committed_step

    def check_forward(self, call_id: bytes, facts: CallFacts) -> None:
        """WireError when the id belongs to another call."""
        known = self._calls.get(call_id)
        if known is not None and not facts.agrees_with(known.facts):
            raise _contradiction(call_id, facts, known.facts)

    def keep(
        self,
        call_id: bytes,
        facts: CallFacts,
        inputs: InputsT,
        row_bytes: int,
        extra: ExtraT | None = None,
        extra_bytes: int = 0,
    ) -> bool:
        """Keep a Forward's inputs for its Backward; a retry replaces what the first one left. False, and nothing kept,
        when no Backward can want them (staged already, step committed), or when there is no room: they can be sent
        again."""
        known = self._calls.get(call_id)
        if facts.step <= self.last_committed_step(facts.trainer) or (known is not None and known.grad is not None):
            return False
        self._drop(call_id)
        row_bytes += ENTRY_OVERHEAD_BYTES
        try:
            self._check_trainer_room(facts.trainer)
        except BusyError:
            return False
        if self.held_bytes + self._staged_bytes + row_bytes > self.limit_bytes:
            return False
        self._drop_waiting(row_bytes, but=call_id)
        self._put(call_id, Staged(facts=facts, inputs=inputs, row_bytes=row_bytes))
        self.add_extra(call_id, extra, extra_bytes)
        return True

    def find(
        self, call_id: bytes, facts: CallFacts, resent: InputsT | None, *, input_bytes: int, grad_bytes: int
    ) -> Staged[InputsT, GradT, ExtraT]:
        """The call of a Backward that brings `facts`, a gradient of `grad_bytes`, and perhaps its inputs again, of
        `input_bytes`. There is room to stage it.

        StaleStepError: its step was committed. WireError: it contradicts what is known of the id. InputsGoneError: no
        inputs here, and none sent. BusyError: no room.
        """
        last = self.last_committed_step(facts.trainer)
        if facts.step <= last:
            raise StaleStepError(
                f"gradients of step {facts.step} came after {facts.trainer!r} committed step {last}; drop them"
            )
        known = self._calls.get(call_id)
        if known is not None and not facts.agrees_with(known.facts):
            raise _contradiction(call_id, facts, known.facts)
        if known is None and resent is None:
            raise InputsGoneError(f"call {call_id.hex()} is not known here, or its inputs are gone: send them along")
        self._check_trainer_room(facts.trainer)
        if known is not None:
            if known.grad is None:
                self._make_room(grad_bytes, facts.trainer, but=call_id)
            return known
        assert resent is not None
        self._make_room(input_bytes + grad_bytes + ENTRY_OVERHEAD_BYTES, facts.trainer, but=call_id)
        return Staged(facts=facts, inputs=resent)

    def stage(self, call_id: bytes, call: Staged[InputsT, GradT, ExtraT], grad: GradT, row_bytes: int) -> None:
        """The Backward of a call that `find` found: from now on a commit may name it. What it left (`extra`) is
        gone; `add_extra` puts something else there."""
        self._drop(call_id)
        self._put(
            call_id,
            Staged(facts=call.facts, inputs=call.inputs, grad=grad, row_bytes=row_bytes + ENTRY_OVERHEAD_BYTES),
        )

    def add_extra(self, call_id: bytes, extra: ExtraT | None, extra_bytes: int) -> None:
        """Keep what would have to be computed again, if older ones can make room for it."""
        call = self._calls.get(call_id)
        if call is None or extra is None or extra_bytes > self.limit_bytes:
            return
        self._drop_extras(extra_bytes)
        if not self._lacks(extra_bytes):
            call.extra, call.extra_bytes = extra, extra_bytes
            self._bytes += extra_bytes
            self._with_extra[call_id] = None

    def commit(self, trainer: str, step: int, call_ids: Sequence[bytes]) -> Taken[InputsT, GradT, ExtraT] | None:
        """Close every step of `trainer` up to `step`: the calls that it names are the host's, their bytes `held`, the
        others of these steps are dropped. None when that was done before: see `answer_of`.

        BusyError when the trainer is new and there is no room to remember it.
        """
        if step <= self.last_committed_step(trainer):
            return None
        self._check_trainer_room(trainer)
        known = self._seen(trainer)
        known.last_committed_step, known.answer = step, None
        calls: dict[bytes, Staged[InputsT, GradT, ExtraT]] = {}
        missing: list[bytes] = []
        for call_id in dict.fromkeys(call_ids):
            call = self._calls.get(call_id)
            if call_id in known.calls and call is not None and call.facts.step <= step and call.grad is not None:
                calls[call_id] = call
                self.held_bytes += call.n_bytes
            else:
                missing.append(call_id)
        for call_id in [i for i in known.calls if self._calls[i].facts.step <= step]:
            self._drop(call_id)
        return Taken(calls=calls, missing=tuple(missing))

    def note_answer(self, trainer: str, answer: AnswerT) -> None:
        """What its last commit is answered, for repetitions."""
        self._trainers[trainer].answer = answer

    def answer_of(self, trainer: str, step: int) -> AnswerT | None:
        """As the commit of `step` was answered, if that was its trainer's last."""
        known = self._trainers.get(trainer)
        return known.answer if known is not None and known.last_committed_step == step else None

    def let_go(self, n_bytes: int) -> None:
        """So many bytes of committed calls are not held any more."""
        self.held_bytes -= n_bytes

    # -- room ----------------------------------------------------------------------------------------------------------

    def _put(self, call_id: bytes, call: Staged[InputsT, GradT, ExtraT]) -> None:
        self._calls[call_id] = call
        self._bytes += call.n_bytes
        if call.grad is None:
            self._waiting[call_id] = None
        trainer = self._with_calls[call.facts.trainer] = self._seen(call.facts.trainer)
        trainer.calls[call_id] = None
        if call.grad is not None:
            trainer.staged_bytes += call.row_bytes
            self._staged_bytes += call.row_bytes

    def _drop(self, call_id: bytes) -> None:
        call = self._calls.pop(call_id, None)
        if call is None:
            return
        self._bytes -= call.n_bytes
        self._waiting.pop(call_id, None)
        self._with_extra.pop(call_id, None)
        trainer = self._trainers[call.facts.trainer]
        del trainer.calls[call_id]
        if call.grad is not None:
            trainer.staged_bytes -= call.row_bytes
            self._staged_bytes -= call.row_bytes
        if not trainer.calls:
            del self._with_calls[call.facts.trainer]
            if trainer.last_committed_step < 0:  # nothing has to be remembered of it
                del self._trainers[call.facts.trainer]

    def _lacks(self, n_bytes: int) -> bool:
        return self.n_bytes + n_bytes > self.limit_bytes

    def _make_room(self, n_bytes: int, trainer: str, *, but: bytes) -> None:
        """BusyError, unless `n_bytes` more fit; nothing goes for what can never fit beside the trainer's own."""
        if self.held_bytes + self._staged_by(trainer) + n_bytes <= self.limit_bytes:
            self._drop_waiting(n_bytes, but=but)
            self._drop_silent(n_bytes, but=trainer)
            self._drop_of_largest(trainer, n_bytes)
        if self._lacks(n_bytes):
            raise BusyError(
                f"{self.n_bytes / 2**20:.1f} MiB of calls wait for their commits, at most "
                f"{self.limit_bytes / 2**20:.0f} MiB may; this call takes {n_bytes} bytes"
            )

    def _drop_extras(self, n_bytes: int) -> None:
        """Of the oldest first, until `n_bytes` more fit."""
        while self._with_extra and self._lacks(n_bytes):
            call = self._calls[self._with_extra.popitem(last=False)[0]]
            self._bytes -= call.extra_bytes
            call.extra, call.extra_bytes = None, 0

    def _drop_waiting(self, n_bytes: int, *, but: bytes) -> None:
        """What can be computed or sent again, the oldest first, until `n_bytes` more fit."""
        self._drop_extras(n_bytes)
        while self._lacks(n_bytes):
            waiting = next((call_id for call_id in self._waiting if call_id != but), None)
            if waiting is None:
                return
            self._drop(waiting)

    def _drop_silent(self, n_bytes: int, *, but: str) -> None:
        """Calls of trainers that have been silent for long, until `n_bytes` more fit."""
        if not self._lacks(n_bytes):
            return
        for name, trainer in list(self._with_calls.items()):
            if self._now_s - trainer.seen_s < self._silent_after_s:
                return
            while trainer.calls and name != but:
                if not self._lacks(n_bytes):
                    return
                self._drop(next(iter(trainer.calls)))

    def _drop_of_largest(self, trainer: str, n_bytes: int) -> None:
        """The newest call of the trainer that has staged most, until `n_bytes` more fit; not where that is who asks, or
        would be."""
        if not self._lacks(n_bytes):
            return
        own_bytes = n_bytes + self._staged_by(trainer)
        larger = {
            name: one for name, one in self._with_calls.items() if name != trainer and one.staged_bytes > own_bytes
        }
        heap = [(-one.staged_bytes, name) for name, one in larger.items()]
        heapq.heapify(heap)
        while heap and self._lacks(n_bytes):
            one = larger[heap[0][1]]
            self._drop(next(reversed(one.calls)))
            if one.staged_bytes > own_bytes:
                heapq.heapreplace(heap, (-one.staged_bytes, heap[0][1]))
            else:
                heapq.heappop(heap)

    def _staged_by(self, trainer: str) -> int:
        known = self._trainers.get(trainer)
        return 0 if known is None else known.staged_bytes

    def _seen(self, trainer: str) -> _Trainer[AnswerT]:
        known = self._trainers.setdefault(trainer, _Trainer())
        known.seen_s = self._now_s
        self._trainers.move_to_end(trainer)
        if known.calls:
            self._with_calls.move_to_end(trainer)
        return known

    def _check_trainer_room(self, trainer: str) -> None:
        if trainer in self._trainers or len(self._trainers) < self._max_trainers:
            return
        silent = next(iter(self._trainers))
        if self._now_s - self._trainers[silent].seen_s < self._forget_after_s:
            raise BusyError(
                f"this peer remembers the commits of {len(self._trainers)} trainers and has no room for {trainer!r}"
            )
        for call_id in list(self._trainers[silent].calls):
            self._drop(call_id)
        self._trainers.pop(silent, None)  # gone with its last call, if it never committed


def _contradiction(call_id: bytes, facts: CallFacts, known: CallFacts) -> WireError:
    return WireError(f"call_id {call_id.hex()} belongs to another call: {known}, now said to be {facts}")
