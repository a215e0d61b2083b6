"""The experts of one peer behind the calls of ExpertService: checks, merging, exactly-once. No network, no threads.

R rows, D model width, K most experts of any row, P (row, expert) pairs; merged calls have the sums of these.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moe_net.errors import BusyError, ExpertCallError, UnknownExpertError, WireError
from moe_net.experts.bank import BankSaved, ClosedSums, ExpertBank
from moe_net.experts.callbook import CallBook, CallFacts
from moe_net.experts.checks import backward_facts, check_cost, check_shapes, check_twin, forward_facts, some
from moe_net.experts.journal import Journal
from moe_net.experts.merging import Part, fitting, merge, split
from moe_net.experts.voiding import Voiding
from moe_net.kernels.promise import landed
from moe_net.types import ExpertId, ExpertShape
from moe_net.wire.messages import (
    BackwardAnswer,
    BackwardCall,
    CommitAnswer,
    CommitCall,
    ForwardAnswer,
    ForwardCall,
    RoutedRows,
)
from moe_net.wire.share import ExpertShare, Share
from moe_net.wire.state import experts_in, split_name

log = logging.getLogger(__name__)

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Closed:
    """A step that is due."""

    batch: bytes
    """The same at every replica that closes it by the same commits."""
    sums: Mapping[int, ClosedSums]
    """Of each layer."""


class ExpertHost:
    """Runs the calls of any number of trainers on this peer's experts, one bank per layer. One thread may use it.

    Errors are answers here: one bad call must not take down those merged with it.
    """

    def __init__(
        self,
        banks: Mapping[int, ExpertBank],
        *,
        cache_bytes: int = 256 * MIB,
        reply_bytes: int = 64 * MIB,
        journal_bytes: int = 256 * MIB,
        pairs_bytes: int = 3072 * MIB,
        book: CallBook[RoutedRows, BankSaved, BackwardAnswer] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`cache_bytes` for inputs that wait for their Backward, `reply_bytes` for answers that a retry may ask for.
        `journal_bytes` for the calls whose gradients a trainer may still want taken out, and those added beside them.
        `pairs_bytes` for what a call, or calls that run together, take beside their rows (`checks.pairs_bytes`):
        2048 rows of 8 experts as wide as Mixtral's take 2 GiB.
        `book`: a book with limits of its own, instead of these. `clock`, in seconds: when trainers were heard of.
        ValueError when there is no bank, or the banks'
        experts differ in shape."""
        if not banks:
            raise ValueError("an ExpertHost needs at least one bank")
        shapes = {bank.shape for bank in banks.values()}
        if len(shapes) > 1:
            raise ValueError(f"experts of one host have one shape, not {len(shapes)}: {shapes}")
        self._banks = dict(sorted(banks.items()))
        self.shape: ExpertShape = shapes.pop()
        self._book = book or CallBook(cache_bytes=cache_bytes, reply_bytes=reply_bytes)
        self._pairs_bytes = pairs_bytes
        self._clock = clock
        self._journal: Journal[RoutedRows, Tensor] = Journal(limit_bytes=journal_bytes)
        self._voiding = Voiding(self._banks, self._journal, self._part, clock)
        self._dispatches = 0
        self._open: set[int] = set()
        """Layers whose step is closed but not made."""
        self._batch: list[tuple[str, int, int]] = []
        """Commits (trainer, step, tokens) towards the next step."""

    @property
    def experts(self) -> tuple[ExpertId, ...]:
        """What is hosted, ascending."""
        return tuple(ExpertId(layer, index) for layer, bank in self._banks.items() for index in bank.indices)

    @property
    def versions(self) -> dict[int, dict[int, int]]:
        """Layer -> expert index -> optimizer steps made."""
        return {layer: bank.versions for layer, bank in self._banks.items()}

    @property
    def committed_tokens(self) -> int:
        """Towards the next step; the same in every bank, because a commit reaches all of them."""
        return next(iter(self._banks.values())).committed_tokens

    @property
    def device(self) -> torch.device:
        """Where the experts run; rows may be there already, in `compute_dtype`."""
        return next(iter(self._banks.values())).device

    @property
    def compute_dtype(self) -> torch.dtype:
        return next(iter(self._banks.values())).compute_dtype

    @property
    def origin(self) -> int:
        """Whose learning this is, among replicas; 0: it has none."""
        return next(iter(self._banks.values())).origin

    def forward_many(self, calls: Sequence[ForwardCall]) -> list[ForwardAnswer | ExpertCallError | WireError]:
        """One answer per call, in order; all of one layer, run in one dispatch. Of equal call ids one runs.

        Of rows that are on a GPU the answer's tensors are there when the GPU has done what it was given (as of
        `backward_many`); of rows on the CPU now.
        """
        answers: dict[int, ForwardAnswer | ExpertCallError | WireError] = {}
        parts: dict[bytes, Part] = {}
        twins: dict[int, Part] = {}
        for position, call in enumerate(calls):
            try:
                assert call.layer == calls[0].layer, "calls of several layers cannot be merged"
                facts = forward_facts(call)
                self._book.check_forward(call.call_id, facts)
                part = self._part(position, facts, call.rows)
                twin = parts.setdefault(call.call_id, part)
                if twin is not part:
                    check_twin(call.call_id, facts, twin.facts)
                    twins[position] = twin
            except (ExpertCallError, WireError) as error:
                answers[position] = error
        for together in fitting(list(parts.values()), self.shape, self._pairs_bytes):
            self._run_forward(calls, together, answers)
        for position, twin in twins.items():
            answer = answers[twin.position]
            if isinstance(answer, ForwardAnswer):
                answer = replace(answer, encoding=calls[position].reply_encoding)
            answers[position] = answer
        return [answers[position] for position in range(len(calls))]

    def _run_forward(
        self,
        calls: Sequence[ForwardCall],
        parts: Sequence[Part],
        answers: dict[int, ForwardAnswer | ExpertCallError | WireError],
    ) -> None:
        bank = self._banks[parts[0].facts.layer]
        merged = merge(parts)
        # Pre-activations of merged calls lie sorted by expert, not by call: they are kept for single calls only, and
        # computed again for others (one product of the forward's two), and where they alone would not fit in the book.
        h_bytes = merged.slot_RK.numel() * self.shape.d_hidden * self.compute_dtype.itemsize
        keep = len(parts) == 1 and calls[parts[0].position].train and h_bytes <= self._book.cache_bytes
        y_RD, saved = bank.forward(merged.x_RD, merged.slot_RK, merged.gate_RK, keep=keep)
        versions = bank.versions
        y_by_part = split(y_RD, [part.facts.n_rows for part in parts])
        for part, y in zip(parts, y_by_part, strict=True):
            call = calls[part.position]
            if call.train:
                saved_bytes = 0 if saved is None else saved.nbytes
                rows = _landed_rows(part.rows)
                self._book.keep(call.call_id, part.facts, rows, _rows_bytes(rows), saved, saved_bytes)
            answers[part.position] = ForwardAnswer(
                y_RD=y,
                failed_experts=part.missing,
                versions=_versions_of(part, bank, versions),
                encoding=call.reply_encoding,
            )

    def backward_many(self, calls: Sequence[BackwardCall]) -> list[BackwardAnswer | ExpertCallError | WireError]:
        """One answer per call, in order; all of one layer. New gradients are added in one dispatch; those added
        before, whose answer is gone, are computed once more in another, without adding."""
        answers: dict[int, BackwardAnswer | ExpertCallError | WireError] = {}
        parts: dict[bytes, Part] = {}
        twins: dict[int, Part] = {}
        adding: list[Part] = []
        repeating: list[Part] = []
        saved: BankSaved | None = None
        self._book.advance(self._clock())
        for position, call in enumerate(calls):
            try:
                assert call.layer == calls[0].layer, "calls of several layers cannot be merged"
                self._bank(call.layer)
                facts = backward_facts(call, self.shape.d_model)
                twin = parts.get(call.call_id)
                if twin is not None:
                    check_twin(call.call_id, facts, twin.facts)
                    twins[position] = twin
                    continue
                plan = self._book.plan_backward(call.call_id, facts, call.rows)
                if plan.answer is not None:
                    answers[position] = replace(plan.answer, repeated=True, encoding=call.reply_encoding)
                    continue
                assert plan.inputs is not None, "a plan without an answer has inputs"
                part = self._part(position, plan.facts, plan.inputs)
                if plan.accumulate:
                    # From here on the id stands in the book: see CallBook.mark_applied.
                    self._book.mark_applied(call.call_id, plan.facts)
                    saved = plan.saved
                (adding if plan.accumulate else repeating).append(part)
                parts[call.call_id] = part
            except (ExpertCallError, WireError) as error:
                answers[position] = error
        for together in fitting(adding, self.shape, self._pairs_bytes):
            self._run_backward(calls, together, saved if len(adding) == 1 else None, answers, accumulate=True)
        for together in fitting(repeating, self.shape, self._pairs_bytes):
            self._run_backward(calls, together, None, answers, accumulate=False)
        for position, twin in twins.items():
            answer = answers[twin.position]
            assert isinstance(answer, BackwardAnswer), "a call in `parts` has run"
            answers[position] = replace(answer, repeated=True, encoding=calls[position].reply_encoding)
        return [answers[position] for position in range(len(calls))]

    def _run_backward(
        self,
        calls: Sequence[BackwardCall],
        parts: Sequence[Part],
        saved: BankSaved | None,
        answers: dict[int, BackwardAnswer | ExpertCallError | WireError],
        *,
        accumulate: bool,
    ) -> None:
        bank = self._banks[parts[0].facts.layer]
        merged = merge(parts)
        grads = [calls[part.position].grad_RD for part in parts]
        grad_RD = grads[0] if len(grads) == 1 else torch.cat(grads)
        dx_RD, dgate_RK = bank.backward(
            grad_RD, merged.x_RD, merged.slot_RK, merged.gate_RK, saved, accumulate=accumulate
        )
        if accumulate:  # not of one that has raised: nothing was added (`GraphedExperts` takes all room before)
            self._dispatches += 1
            for part, grad in zip(parts, map(landed, grads), strict=True):
                n_bytes = _rows_bytes(part.rows) + grad.nbytes
                call_id = calls[part.position].call_id
                self._journal.add(call_id, part.facts, part.rows, grad, n_bytes, dispatch=self._dispatches)
            self._voiding.trim()
        dgate_P = dgate_RK.reshape(-1)
        if merged.filled_RK is not None:  # by position: of a mask on a GPU the host would have to know the size
            dgate_P = dgate_P[bank.put(merged.filled_RK.reshape(-1).nonzero().flatten())]
        versions = bank.versions
        dx_by_part = split(dx_RD, [part.facts.n_rows for part in parts])
        dgate_by_part = split(dgate_P, [part.slot_P.numel() for part in parts])
        for part, dx, dgate in zip(parts, dx_by_part, dgate_by_part, strict=True):
            call = calls[part.position]
            if len(parts) > 1:
                # A kept view would keep the whole batch alive, and count as its own size only.
                dx, dgate = dx.clone(), dgate.clone()
            answer = BackwardAnswer(
                dx_RD=dx,
                gate_grad_P=bank.fetched(dgate),
                repeated=not accumulate,
                versions=_versions_of(part, bank, versions),
                encoding=call.reply_encoding,
            )
            answers[part.position] = answer
            self._book.store_reply(call.call_id, answer, dx.nbytes + dgate.nbytes)
        if dx_RD.device != bank.device:
            bank.finish()

    def settle(self) -> None:
        """See `ExpertBank.settle`: for whoever calls with promises (`kernels.promise`), once the answers are on their
        way."""
        for bank in self._banks.values():
            bank.settle()

    def commit(self, call: CommitCall) -> CommitAnswer:
        """Take out what went to other replicas, close the trainer's step, count its tokens in every expert; these step
        when that was the batch. BusyError: no room to remember the trainer. WireError: negative, or more tokens than
        the run's batch, by which the gradients of all would be divided."""
        answer, closed = self.begin_commit(call)
        if closed is not None:
            self.finish_commit(closed)
        return answer

    def begin_commit(self, call: CommitCall, *, detach: bool = False) -> tuple[CommitAnswer, Closed | None]:
        """As `commit`, but the step, if it is due, is left to `finish_commit`. With `detach` other calls may come in
        between, but no other commit."""
        if call.tokens < 0 or call.step < 0:
            raise WireError(f"step and tokens must not be negative: {call.step}, {call.tokens}")
        batch_tokens = min(bank.global_batch_tokens for bank in self._banks.values())
        if call.tokens > batch_tokens:
            raise WireError(
                f"tokens: {call.tokens}, but the run's global_batch_tokens, of all trainers, is {batch_tokens}"
            )
        self._book.advance(self._clock())
        void = self._book.applied_among(call.trainer, call.step, call.void)
        if not self._book.commit(call.trainer, call.step):
            voided, failed = self._book.voids_of(call.trainer, call.step)
            answer = CommitAnswer(
                repeated=True, stepped=False, committed_tokens=self.committed_tokens, voided=voided, void_failed=failed
            )
            return answer, None
        # Those of `call.void` that were never added need nothing: from now on they are refused as stale.
        failed = self._voiding.take_out(void)
        due = [n for n, bank in self._banks.items() if bank.committed_tokens + call.tokens >= bank.global_batch_tokens]
        self._voiding.renew(due)
        self._book.note_voids(call.trainer, len(void) - failed, failed)
        self._journal.committed(call.trainer, call.step)
        if call.tokens:  # one without tokens closes nothing, and there may be any number of them
            self._batch.append((call.trainer, call.step, call.tokens))
        closings = {layer: bank.close(call.tokens, detach=detach) for layer, bank in self._banks.items()}
        sums = {layer: closing for layer, closing in closings.items() if closing is not None}
        for layer in sums:
            self._journal.stepped(layer, self._book.last_committed_step)
        answer = CommitAnswer(
            repeated=False,
            stepped=bool(sums),
            committed_tokens=self.committed_tokens,
            voided=len(void) - failed,
            void_failed=failed,
        )
        if not sums:
            return answer, None
        if detach:
            self._open.update(sums)
        batch, self._batch = hashlib.sha256(json.dumps(sorted(self._batch)).encode()).digest(), []
        return answer, Closed(batch=batch, sums=sums)

    def share(self, closed: Closed, shared: Collection[ExpertId]) -> Share:
        """Our part of a step, for the replicas that make it as well: of the experts in `shared`."""
        experts: dict[ExpertId, ExpertShare] = {}
        for layer, sums in closed.sums.items():
            shares = self._banks[layer].shares(sums, {expert.index for expert in shared if expert.layer == layer})
            experts |= {ExpertId(layer, index): share for index, share in shares.items()}
        clock = max(self._banks[layer].clock for layer in closed.sums)
        return Share(origin=self.origin, clock=clock, experts=experts)

    def finish_commit(self, closed: Closed, shares: Sequence[Share] = ()) -> None:
        """The step, on our sums and on what replicas add to them; `shares` of no experts but those hosted here.

        Raises what a layer's step raises, once every layer has had its turn: the step is over in any case.
        """
        # Of two that claim the same origin, one lies, or is ourselves.
        parts = {share.origin: share.experts for share in shares if share.origin != self.origin}
        clock = max((share.clock for share in shares), default=0)
        with ExitStack() as steps:
            for layer, sums in reversed(list(closed.sums.items())):
                steps.callback(self._finish_layer, layer, sums, parts, clock)

    def _finish_layer(
        self, layer: int, sums: ClosedSums, parts: Mapping[int, Mapping[ExpertId, ExpertShare]], clock: int
    ) -> None:
        by_index: dict[int, dict[int, ExpertShare]] = {}
        for origin, experts in parts.items():
            for expert, share in experts.items():
                if expert.layer == layer:
                    by_index.setdefault(expert.index, {})[origin] = share
        try:
            # Those of the next step, if they are set apart.
            self._voiding.renew((layer,))
            self._banks[layer].step(sums, by_index, clock=clock)
        finally:
            self._open.discard(layer)
            if sums.detached:
                self._journal.weights_changed(layer, self._book.last_committed_step)

    def continue_at(self, committed_tokens: int) -> None:
        """Between two steps: in every layer as many tokens are committed towards the next one as a replica says, whose
        steps end at other commits. It may not say that a step is due."""
        for bank in self._banks.values():
            bank.committed_tokens = min(committed_tokens, bank.global_batch_tokens - 1)

    def fetch(self, layer: int, indices: Sequence[int], *, with_sums: bool = True) -> dict[str, Tensor]:
        """Copies of the experts' state, all of the layer when `indices` is empty; `with_sums` as in `ExpertBank.state`.
        UnknownExpertError."""
        self.check_hosted(layer, indices)
        if with_sums and self.committed_tokens > 0:
            self._voiding.renew_to_read(layer)
        return self._banks[layer].state(sorted(set(indices)) or None, with_sums=with_sums)

    def load_state(self, state: Mapping[str, Tensor]) -> int:
        """Take over those experts of `state` (see `ExpertBank.state`) that are hosted here; returns how many.
        CheckpointError as `ExpertBank.load_state`."""
        loaded = 0
        for layer, bank in self._banks.items():
            hosted = {str(ExpertId(layer, index)) for index in bank.indices}
            mine = {name: value for name, value in state.items() if split_name(name)[0] in hosted}
            if mine:
                self._voiding.renew((layer,))
                bank.load_state(mine)
                self._journal.forget(layer)
                loaded += len(experts_in(mine))
        return loaded

    def check_state(self, layer: int, state: Mapping[str, Tensor]) -> None:
        """CheckpointError when it holds anything but valid states of experts of this layer."""
        self._bank(layer).check_state(state)

    def replace_state(self, layer: int, state: Mapping[str, Tensor]) -> None:
        """As `ExpertBank.replace_state`: gradients summed so far, and what is known of calls, stay.

        BusyError between `begin_commit` and `finish_commit`: a replica that has made this step has our rows of it in
        its state already, and our own step would add them once more.
        """
        if layer in self._open:
            raise BusyError(f"layer {layer} is in the middle of a step")
        self._voiding.renew((layer,))
        self._bank(layer).replace_state(state)
        self._journal.weights_changed(layer, self._book.last_committed_step)

    def check_cost(self, rows: RoutedRows) -> None:
        """LimitError when a call with these takes more than one may at once; any thread may ask."""
        check_cost(rows, self.shape, self._pairs_bytes)

    def check_hosted(self, layer: int, indices: Sequence[int]) -> None:
        """UnknownExpertError when one of them is not; any thread may ask."""
        unknown = sorted(set(indices) - set(self._bank(layer).indices))
        if unknown:
            raise UnknownExpertError(f"experts {some(unknown)} of layer {layer} are not hosted here")

    def _bank(self, layer: int) -> ExpertBank:
        bank = self._banks.get(layer)
        if bank is None:
            raise UnknownExpertError(f"layer {layer} is not hosted here; layers {some(self._banks)} are")
        return bank

    def _part(self, position: int, facts: CallFacts, rows: RoutedRows) -> Part:
        """UnknownExpertError when none of the call's experts is here, WireError when its arrays do not fit."""
        bank = self._bank(facts.layer)
        check_shapes(rows, self.shape.d_model)
        slot_P = bank.slots(rows.expert_index_P)
        missing: tuple[int, ...] = ()
        if slot_P.numel() and int(slot_P.numpy().min()) < 0:
            gone_P = slot_P < 0
            missing = tuple(torch.unique(rows.expert_index_P[gone_P]).tolist())
            if bool(gone_P.all()):
                raise UnknownExpertError(
                    f"none of the call's experts is hosted here: {some(missing)} of layer {facts.layer} are not"
                )
        return Part(position=position, facts=facts, rows=rows, slot_P=slot_P, missing=missing)


def _versions_of(part: Part, bank: ExpertBank, versions: Mapping[int, int]) -> dict[int, int]:
    slot_P = part.slot_P.numpy()
    ran = np.bincount(slot_P[slot_P >= 0] if part.missing else slot_P).nonzero()[0].tolist()
    return {bank.indices[slot]: versions[bank.indices[slot]] for slot in ran}


def _landed_rows(rows: RoutedRows) -> RoutedRows:
    x_RD = landed(rows.x_RD)
    return rows if x_RD is rows.x_RD else replace(rows, x_RD=x_RD)


def _rows_bytes(rows: RoutedRows) -> int:
    return sum(t.nbytes for t in (rows.x_RD, rows.experts_per_row_R, rows.expert_index_P, rows.gate_P))
