"""The commits of one host: which calls make the next step, in which order, and the step itself.

A batch is complete when the tokens committed towards it are the run's. Each layer's step is then made on the calls that
its commits named, sorted by (trainer, step, position in the commit): what came when has no influence.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from moe_net.errors import WireError
from moe_net.experts.bank import ExpertBank
from moe_net.experts.calls import MAX_GRADIENT, BankCall, Batch, Reusable
from moe_net.experts.staging import Staged, Staging
from moe_net.types import ExpertId
from moe_net.wire.messages import CommitAnswer, CommitCall, RoutedRows
from moe_net.wire.share import ExpertShare, Share

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Gradient:
    """What a Backward brought."""

    grad_RD: Tensor
    most: float | Tensor
    """See `ExpertBank.backward`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a commit, for repetitions: a bit for every call, for there may be many trainers, and each may name
    8192."""

    stepped: bool
    missing: int
    """Bit p: of the p-th call that it names."""
    not_finite: int

    def answer(self, call_ids: Sequence[bytes], committed_tokens: int) -> CommitAnswer:
        """To the same commit again."""
        named = list(dict.fromkeys(call_ids))
        return CommitAnswer(
            repeated=True,
            stepped=self.stepped,
            committed_tokens=committed_tokens,
            missing=tuple(call_id for p, call_id in enumerate(named) if self.missing >> p & 1),
            not_finite=tuple(call_id for p, call_id in enumerate(named) if self.not_finite >> p & 1),
        )


def _bits(call_ids: Sequence[bytes], those: Collection[bytes]) -> int:
    return sum(1 << p for p, call_id in enumerate(dict.fromkeys(call_ids)) if call_id in those)


Book = Staging[RoutedRows, Gradient, Reusable, Outcome]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Committed:
    """A call that counts, for as long as its batch is not made."""

    call: BankCall
    n_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Closed:
    """A step that is due."""

    batch: bytes
    """The same at every replica that closes it by the same commits."""
    layers: Mapping[int, Batch]
    held_bytes: int
    """Of the calls that it is made of."""


class Commits:
    """Owned by one host, and used by its thread."""

    def __init__(
        self,
        banks: Mapping[int, ExpertBank],
        staging: Book,
        to_count: Callable[[Staged[RoutedRows, Gradient, Reusable]], BankCall],
    ) -> None:
        """`to_count`: a staged call as its bank takes it."""
        self._banks = banks
        self._staging = staging
        self._to_count = to_count
        self.open: set[int] = set()
        """Layers whose step is closed but not made."""
        self._due: dict[int, Batch] = {}
        """Of each such layer whose step nobody else is asked for, the first forward layer first."""
        self._due_bytes = 0
        self._heard: list[tuple[str, int, int]] = []
        """Commits (trainer, step, tokens) towards the next step."""
        self._committed: dict[int, dict[tuple[str, int, int], _Committed]] = {layer: {} for layer in banks}
        """Their calls of each layer, by trainer, step and position in the commit."""

    @property
    def committed_tokens(self) -> int:
        """Towards the next step; the same in every bank, because a commit reaches all of them."""
        return next(iter(self._banks.values())).committed_tokens

    def begin(self, call: CommitCall) -> tuple[CommitAnswer, Closed | None]:
        """See `ExpertHost.begin_commit`."""
        if call.tokens < 0 or call.step < 0:
            raise WireError(f"step and tokens must not be negative: {call.step}, {call.tokens}")
        batch_tokens = min(bank.global_batch_tokens for bank in self._banks.values())
        if call.tokens > batch_tokens:
            raise WireError(
                f"tokens: {call.tokens}, but the run's global_batch_tokens, of all trainers, is {batch_tokens}"
            )
        if self.committed_tokens + call.tokens >= batch_tokens:
            self.make_all_due()  # before anything of this commit counts: what fails there leaves it to be sent again
        taken = self._staging.commit(call.trainer, call.step, call.calls)
        if taken is None:
            before = self._staging.answer_of(call.trainer, call.step)
            if before is not None:
                return before.answer(call.calls, self.committed_tokens), None
            answer = CommitAnswer(repeated=True, stepped=False, committed_tokens=self.committed_tokens)
            return answer, None
        too_large: list[bytes] = []
        gone: list[bytes] = []
        for position, (call_id, staged) in enumerate(taken.calls.items()):
            assert staged.grad is not None
            if not float(staged.grad.most) <= MAX_GRADIENT:  # NaN is not either
                too_large.append(call_id)
                self._staging.let_go(staged.n_bytes)
                continue
            counted = self._to_count(staged)
            if not bool((counted.slots_RK >= 0).any()):  # all of its experts broke since its Backward
                gone.append(call_id)
                self._staging.let_go(staged.n_bytes)
                continue
            self._committed[staged.facts.layer][call.trainer, call.step, position] = _Committed(
                call=counted, n_bytes=staged.n_bytes
            )
        if too_large:
            log.warning("%d calls of %r are left out: their gradients are not finite", len(too_large), call.trainer)
        if call.tokens:  # one without tokens closes nothing, and there may be any number of them
            self._heard.append((call.trainer, call.step, call.tokens))
        for bank in self._banks.values():
            bank.committed_tokens += call.tokens
        closed = self._close() if self.committed_tokens >= batch_tokens else None
        answer = CommitAnswer(
            repeated=False,
            stepped=closed is not None,
            committed_tokens=self.committed_tokens,
            missing=(*taken.missing, *gone),
            not_finite=tuple(too_large),
        )
        missing, not_finite = (_bits(call.calls, set(those)) for those in (answer.missing, answer.not_finite))
        outcome = Outcome(stepped=answer.stepped, missing=missing, not_finite=not_finite)
        self._staging.note_answer(call.trainer, outcome)
        if closed is None and self._holds_too_much():
            self.make_all_due()  # the bytes of a step that is due say nothing of this batch
            if self._holds_too_much():
                for layer in self._banks:
                    self.fold(layer)
        return answer, closed

    def _holds_too_much(self) -> bool:
        return self._staging.held_bytes > self._staging.limit_bytes // 2

    def in_order(self, layer: int) -> list[list[BankCall]]:
        """The layer's calls that count, of each commit, in an order that does not depend on when they came."""
        in_order = sorted(self._committed[layer].items(), key=lambda item: item[0])
        return [
            [committed.call for _, committed in of_commit]
            for _, of_commit in itertools.groupby(in_order, key=lambda item: item[0][:2])
        ]

    def _take_committed(self, layer: int) -> tuple[list[list[BankCall]], int]:
        """The layer's commits, which are the caller's now, and their bytes."""
        commits, held_bytes = self.in_order(layer), sum(one.n_bytes for one in self._committed[layer].values())
        self._committed[layer].clear()
        return commits, held_bytes

    def fold(self, layer: int) -> None:
        """Sums in the place of rows: of a batch larger than what there is room for. What it adds up to depends then on
        which commits came first."""
        self.make_due(layer)
        self._banks[layer].fold(self.in_order(layer))
        _, held_bytes = self._take_committed(layer)  # now, for there may be no memory for the sums
        self._staging.let_go(held_bytes)

    def _close(self) -> Closed:
        self.make_all_due()
        layers: dict[int, Batch] = {}
        held_bytes = 0
        for layer, bank in self._banks.items():
            commits, n_bytes = self._take_committed(layer)
            layers[layer] = bank.close(commits, bank.committed_tokens)
            held_bytes += n_bytes
        self.open.update(layers)
        batch, self._heard = hashlib.sha256(json.dumps(sorted(self._heard)).encode()).digest(), []
        return Closed(batch=batch, layers=layers, held_bytes=held_bytes)

    def defer(self, closed: Closed) -> None:
        """See `ExpertHost.defer`."""
        self._due = dict(closed.layers)
        self._due_bytes = closed.held_bytes

    def make_next(self) -> bool:
        """Make the first layer's step that is due; whether more are."""
        if self._due:
            self.make_due(next(iter(self._due)))
        return bool(self._due)

    def make_due(self, layer: int) -> None:
        batch = self._due.pop(layer, None)
        if batch is None:
            return
        try:
            self._finish_layer(layer, batch, {}, 0)
        finally:
            if not self._due:
                self._staging.let_go(self._due_bytes)
                self._due_bytes = 0

    def make_all_due(self) -> None:
        """Every layer's."""
        while self.make_next():
            pass

    def share(self, closed: Closed, shared: Collection[ExpertId], origin: int) -> Share:
        """See `ExpertHost.share`."""
        experts: dict[ExpertId, ExpertShare] = {}
        for layer, batch in closed.layers.items():
            shares = self._banks[layer].shares(batch, {expert.index for expert in shared if expert.layer == layer})
            experts |= {ExpertId(layer, index): share for index, share in shares.items()}
        clock = max(self._banks[layer].clock for layer in closed.layers)
        return Share(origin=origin, clock=clock, experts=experts)

    def finish(self, closed: Closed, shares: Sequence[Share], origin: int) -> None:
        """See `ExpertHost.finish_commit`."""
        # Of two that claim the same origin, one lies, or is ourselves.
        parts = {share.origin: share.experts for share in shares if share.origin != origin}
        clock = max((share.clock for share in shares), default=0)
        with ExitStack() as steps:
            steps.callback(self._staging.let_go, closed.held_bytes)
            for layer, batch in reversed(list(closed.layers.items())):
                steps.callback(self._finish_layer, layer, batch, parts, clock)

    def _finish_layer(
        self, layer: int, batch: Batch, parts: Mapping[int, Mapping[ExpertId, ExpertShare]], clock: int
    ) -> None:
        by_index: dict[int, dict[int, ExpertShare]] = {}
        for origin, experts in parts.items():
            for expert, share in experts.items():
                if expert.layer == layer:
                    by_index.setdefault(expert.index, {})[origin] = share
        try:
            self._banks[layer].step(batch, by_index, clock=clock)
        finally:
            self.open.discard(layer)
