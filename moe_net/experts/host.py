"""The experts of one peer behind the calls of ExpertService: checks, merging, exactly-once. No network, no threads.

R rows, D model width, K most experts of any row, P (row, expert) pairs; merged calls have the sums of these.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from moe_net.errors import BusyError, ExpertCallError, UnknownExpertError, WireError
from moe_net.experts.bank import ExpertBank
from moe_net.experts.calls import BankCall, Reusable
from moe_net.experts.checks import backward_facts, check_cost, check_shapes, check_twin, forward_facts, some
from moe_net.experts.commits import Book, Closed, Commits, Gradient
from moe_net.experts.merging import Part, fitting, merge, split
from moe_net.experts.staging import CallFacts, Staged, Staging
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
from moe_net.wire.share import Share
from moe_net.wire.state import experts_in, split_name

log = logging.getLogger(__name__)

MIB = 2**20


class ExpertHost:
    """Runs the calls of any number of trainers on this peer's experts, one bank per layer. One thread may use it.

    Errors are answers here: one bad call must not take down those merged with it.
    """

    def __init__(
        self,
        banks: Mapping[int, ExpertBank],
        *,
        stage_bytes: int = 512 * MIB,
        pairs_bytes: int = 3072 * MIB,
        staging: Book | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stage_bytes` for what calls leave between their Forward and their trainer's Commit (`Staging`).
        `pairs_bytes` for what a call, or calls that run together, take beside their rows (`checks.pairs_bytes`):
        2048 rows of 8 experts as wide as Mixtral's take 2 GiB.
        `staging`: with limits of its own, instead of these. `clock`, in seconds: when trainers were heard of.
        ValueError when there is no bank, or the banks' experts differ in shape."""
        if not banks:
            raise ValueError("an ExpertHost needs at least one bank")
        shapes = {bank.shape for bank in banks.values()}
        if len(shapes) > 1:
            raise ValueError(f"experts of one host have one shape, not {len(shapes)}: {shapes}")
        self._banks = dict(sorted(banks.items()))
        self.shape: ExpertShape = shapes.pop()
        self._staging: Book = staging or Staging(limit_bytes=stage_bytes)
        self._pairs_bytes = pairs_bytes
        self._clock = clock
        self._commits = Commits(self._banks, self._staging, self._to_count)

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
        self._staging.advance(self._clock())
        answers: dict[int, ForwardAnswer | ExpertCallError | WireError] = {}
        parts: dict[bytes, Part] = {}
        twins: dict[int, Part] = {}
        for position, call in enumerate(calls):
            try:
                assert call.layer == calls[0].layer, "calls of several layers cannot be merged"
                facts = forward_facts(call)
                self._commits.make_due(call.layer)
                self._staging.check_forward(call.call_id, facts)
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
        # computed again for others (one product of the forward's two), and where they alone would not fit.
        h_bytes = merged.slot_RK.numel() * self.shape.d_hidden * self.compute_dtype.itemsize
        keep = len(parts) == 1 and calls[parts[0].position].train and h_bytes <= self._staging.limit_bytes
        y_RD, saved = bank.forward(merged.x_RD, merged.slot_RK, merged.gate_RK, keep=keep)
        y_by_part = split(y_RD, [part.facts.n_rows for part in parts])
        if not _is_finite(y_RD) and self._run_without_broken(bank, merged.slot_RK, parts, calls, answers):
            return
        versions = bank.versions
        for part, y in zip(parts, y_by_part, strict=True):
            call = calls[part.position]
            if not _is_finite(y):
                answers[part.position] = WireError("x: what the experts make of these rows is not finite")
                continue
            if call.train:
                rows = _landed_rows(part.rows)
                self._staging.keep(call.call_id, part.facts, rows, _rows_bytes(rows), saved, _extra_bytes(saved))
            answers[part.position] = ForwardAnswer(
                y_RD=y,
                failed_experts=part.missing,
                versions=_versions_of(part, bank, versions),
                encoding=call.reply_encoding,
            )

    def _run_without_broken(
        self,
        bank: ExpertBank,
        slots_RK: Tensor,
        parts: Sequence[Part],
        calls: Sequence[ForwardCall],
        answers: dict[int, ForwardAnswer | ExpertCallError | WireError],
    ) -> bool:
        """If experts turn out to be broken: the parts again, on the others. Whether that was it."""
        if not self._note_broken(bank, slots_RK):
            return False
        left: list[Part] = []
        for part in parts:
            try:
                left.append(self._part(part.position, part.facts, part.rows))
            except ExpertCallError as error:
                answers[part.position] = error
        if left:
            self._run_forward(calls, left, answers)
        return True

    def _note_broken(self, bank: ExpertBank, slots_RK: Tensor | None = None) -> bool:
        found = bank.find_broken(slots_RK)
        if found:
            log.error("experts %s of layer %d are not finite: no call runs on them", some(sorted(found)), bank.layer)
        return bool(found)

    @property
    def broken(self) -> tuple[ExpertId, ...]:
        """Experts whose weights are not finite, which run no more until they are replaced."""
        return tuple(ExpertId(layer, i) for layer, bank in self._banks.items() for i in sorted(bank.broken))

    def backward_many(self, calls: Sequence[BackwardCall]) -> list[BackwardAnswer | ExpertCallError | WireError]:
        """One answer per call, in order; all of one layer. Each runs by itself, so that what it leaves for the weights'
        gradients has the same bits whatever came with it. Nothing is added to anything: see `commit`."""
        self._staging.advance(self._clock())
        answers: list[BackwardAnswer | ExpertCallError | WireError] = []
        for call in calls:
            assert call.layer == calls[0].layer, "calls of several layers cannot be merged"
            try:
                self._bank(call.layer)
                self._commits.make_due(call.layer)
                answers.append(self._run_backward(call))
            except (ExpertCallError, WireError) as error:
                answers.append(error)
        return answers

    def _run_backward(self, call: BackwardCall) -> BackwardAnswer:
        bank = self._banks[call.layer]
        facts = backward_facts(call, self.shape.d_model)
        input_bytes = 0 if call.rows is None else _rows_bytes(call.rows)
        found = self._staging.find(
            call.call_id, facts, call.rows, input_bytes=input_bytes, grad_bytes=call.grad_RD.nbytes
        )
        part = self._part(0, found.facts, found.inputs)
        merged = merge([part])
        dx_RD, dgate_RK, work, most = bank.backward(
            call.grad_RD, merged.x_RD, merged.slot_RK, merged.gate_RK, found.extra
        )
        if dx_RD.device.type == "cpu" and not _is_finite(dx_RD):
            if self._note_broken(bank, merged.slot_RK):
                return self._run_backward(call)
            raise WireError("grad: what the experts make of these rows is not finite")
        dgate_P = dgate_RK.reshape(-1)
        if merged.filled_RK is not None:  # by position: of a mask on a GPU the host would have to know the size
            dgate_P = dgate_P[bank.put(merged.filled_RK.reshape(-1).nonzero().flatten())]
        rows, grad = _landed_rows(found.inputs), Gradient(landed(call.grad_RD), most)
        self._staging.stage(call.call_id, replace(found, inputs=rows), grad, _rows_bytes(rows) + grad.grad_RD.nbytes)
        self._staging.add_extra(call.call_id, work, _extra_bytes(work))
        answer = BackwardAnswer(
            dx_RD=dx_RD,
            gate_grad_P=bank.fetched(dgate_P),
            versions=_versions_of(part, bank, bank.versions),
            encoding=call.reply_encoding,
        )
        if dx_RD.device != bank.device:
            bank.finish()
        return answer

    def commit(self, call: CommitCall) -> CommitAnswer:
        """Count the calls that it names, and its tokens in every expert; these step when that was the batch. Everything
        else that the trainer staged for this step, or earlier ones, is forgotten.

        BusyError: no room to remember the trainer. WireError: negative, or more tokens than the run's batch, by which
        the gradients of all would be divided."""
        answer, closed = self.begin_commit(call)
        if closed is not None:
            self.finish_commit(closed)
        return answer

    def begin_commit(self, call: CommitCall) -> tuple[CommitAnswer, Closed | None]:
        """As `commit`, but the step, if it is due, is left to `finish_commit`, or to `defer`. Other calls may come in
        between: they belong to the next step."""
        self._staging.advance(self._clock())
        return self._commits.begin(call)

    def share(self, closed: Closed, shared: Collection[ExpertId]) -> Share:
        """Our part of a step, for the replicas that make it as well: of the experts in `shared`."""
        return self._commits.share(closed, shared, self.origin)

    def finish_commit(self, closed: Closed, shares: Sequence[Share] = ()) -> None:
        """The step, on our calls and on what replicas add to them; `shares` of no experts but those hosted here.

        Raises what a layer's step raises, once every layer has had its turn: the step is over in any case.
        """
        self._commits.finish(closed, shares, self.origin)

    def defer(self, closed: Closed) -> None:
        """A step without replicas: each layer makes it before anything else happens there, or when `make_next` has its
        turn. The first layers come first, for the next forward needs them first."""
        self._commits.defer(closed)

    def make_next(self) -> bool:
        """Make the first layer's step that is due; whether more are."""
        return self._commits.make_next()

    def make_all_due(self) -> None:
        """Every layer's."""
        self._commits.make_all_due()

    def _to_count(self, staged: Staged[RoutedRows, Gradient, Reusable]) -> BankCall:
        """Experts that broke after the call's Backward have no slots any more; perhaps none has."""
        assert staged.grad is not None
        slot_P = self._banks[staged.facts.layer].slots(staged.inputs.expert_index_P)
        merged = merge([Part(position=0, facts=staged.facts, rows=staged.inputs, slot_P=slot_P, missing=())])
        return BankCall(staged.grad.grad_RD, merged.x_RD, merged.slot_RK, merged.gate_RK, staged.extra)

    def continue_at(self, committed_tokens: int) -> None:
        """Between two steps: in every layer as many tokens are committed towards the next one as a replica says, whose
        steps end at other commits. It may not say that a step is due."""
        for bank in self._banks.values():
            bank.committed_tokens = min(committed_tokens, bank.global_batch_tokens - 1)

    def fetch(self, layer: int, indices: Sequence[int], *, with_sums: bool = True) -> dict[str, Tensor]:
        """Copies of the experts' state, all of the layer when `indices` is empty; `with_sums` as in `ExpertBank.state`.
        UnknownExpertError."""
        self.check_hosted(layer, indices)
        self._commits.make_due(layer)
        bank = self._banks[layer]
        state = bank.state(sorted(set(indices)) or None, committed=self._commits.in_order(layer) if with_sums else None)
        if not all(_is_finite(value) for value in state.values() if value.is_floating_point()):
            self._note_broken(bank)
            state = bank.state(
                sorted(set(indices)) or None, committed=self._commits.in_order(layer) if with_sums else None
            )
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> int:
        """Take over those experts of `state` (see `ExpertBank.state`) that are hosted here; returns how many.
        CheckpointError as `ExpertBank.load_state`."""
        loaded = 0
        for layer, bank in self._banks.items():
            hosted = {str(ExpertId(layer, index)) for index in bank.indices}
            mine = {name: value for name, value in state.items() if split_name(name)[0] in hosted}
            if mine:
                self._commits.make_due(layer)
                self._commits.fold(layer)  # what was committed before is in their sums, or forgotten with them
                bank.load_state(mine)
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
        self._commits.make_due(layer)
        if layer in self._commits.open:
            raise BusyError(f"layer {layer} is in the middle of a step")
        self._bank(layer).replace_state(state)

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


def _extra_bytes(extra: Reusable | None) -> int:
    """With what a process grows by beside the payload: 5 KiB for the sort of a few pairs, 0.6 for every tensor."""
    return 0 if extra is None else extra.nbytes + 5 * 1024 + 640 * extra.n_tensors


def _is_finite(value: Tensor) -> bool:
    """True of what is on a GPU, too: nobody waits for it here."""
    return value.device.type != "cpu" or bool(torch.isfinite(value.sum())) or bool(value.isfinite().all())
