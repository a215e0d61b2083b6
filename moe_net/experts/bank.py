"""The experts of one layer that this peer hosts: weights, gradients and optimizer, stacked.

R rows, K experts per row, E experts of the bank (a "slot" is a position among them), D model width, F expert width,
H columns of the first projection (2F for SwiGLU: gate then up; F for GELU).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from moe_net.errors import CheckpointError
from moe_net.experts.calls import BankCall, Batch, Commit, Reusable, gradient_bound, leave_out_unsound, norm_of_each
from moe_net.experts.checks import pairs_bytes
from moe_net.experts.init import init_expert
from moe_net.experts.learned import Learned
from moe_net.experts.lineage import Lineage
from moe_net.experts.update import StackedAdamW
from moe_net.kernels.dispatch import moe_ffn_backward, moe_ffn_forward, moe_ffn_weight_grads
from moe_net.kernels.graphed import GraphedExperts
from moe_net.kernels.promise import is_promise, landed
from moe_net.kernels.types import ExpertWeights, Saved, WeightCall, WeightGrads, Work
from moe_net.optim import OptimizerConfig
from moe_net.types import ExpertId, ExpertShape
from moe_net.wire.share import ExpertShare
from moe_net.wire.state import LINEAGE_FIELD, STATE_FIELDS, SUM_FIELDS, check_state, tensor_name

logger = logging.getLogger(__name__)

KernelT = TypeVar("KernelT", Saved, Work)


def memory_bytes(n_experts: int, shape: ExpertShape, *, compute_bytes: int = 0) -> int:
    """What a bank takes for `n_experts`: weights, a step's gradients, two moments, 16 bytes a parameter, and copies of
    the weights of `compute_bytes` a parameter (2 on a GPU).

    Kept inputs and scratch of the calls in flight (`kernels.memory`) come on top, and while replicas make a step
    together 8 bytes a parameter (sums of the next step, copies of those that are shared) and 4 for every partner.
    """
    return n_experts * shape.d_model * (shape.d_hidden + shape.d_ff) * (16 + compute_bytes)


AT_ONCE_BYTES = 512 * 2**20
"""On a CPU more rows than take so much (`checks.pairs_bytes`) run one part after the other, for products of so many
rows gain nothing by still more."""


def _copy(value: Tensor) -> Tensor:
    """On the CPU, with memory of its own in the order of its indices, whatever a device keeps it in."""
    return torch.clone(value, memory_format=torch.contiguous_format).cpu()


class ExpertBank:
    """Experts of one layer. Used by one thread; the same calls in the same order give the same bits on a CPU."""

    def __init__(
        self,
        *,
        layer: int,
        indices: Sequence[int],
        shape: ExpertShape,
        optimizer: OptimizerConfig,
        global_batch_tokens: int,
        run: str,
        seed: int,
        init_std: float,
        device: torch.device | str = "cpu",
        origin: int = 0,
        compute_dtype: torch.dtype = torch.float32,
        at_once_bytes: int = AT_ONCE_BYTES,
    ) -> None:
        """Fresh experts `indices` of `layer` (see `experts.init`). `origin`: whose learning this is, among replicas
        (see `experts.lineage`). ValueError if indices are none, repeated or < 0.

        With another `compute_dtype` (bf16 is what a GPU is fast in) the experts run on rounded copies of their weights,
        which a step renews; weights, gradient sums and moments stay fp32. `at_once_bytes`: see `AT_ONCE_BYTES`.
        """
        self.indices = tuple(sorted(indices))
        if not self.indices or self.indices[0] < 0 or len(set(self.indices)) < len(self.indices):
            raise ValueError(f"indices of layer {layer} must be distinct, not negative and at least one: {indices}")
        if global_batch_tokens < 1:
            raise ValueError(f"global_batch_tokens must be at least 1, not {global_batch_tokens}")
        self.layer = layer
        self.shape = shape
        self.origin = origin
        self.global_batch_tokens = global_batch_tokens
        self.committed_tokens = 0
        """Towards the next step."""
        self._slot_of = {index: slot for slot, index in enumerate(self.indices)}
        # Of index i at i + 1; the first and the last stand for every index out of range.
        self._slot_at = np.full(self.indices[-1] + 3, -1, dtype=np.int32)
        self._slot_at[np.array(self.indices) + 1] = np.arange(len(self.indices))
        # As a view of [E, H, D]: what GPUs like (see `ExpertWeights`), and as good as any for a CPU.
        on_gpu = torch.device(device).type == "cuda"
        sizes = (len(self.indices), shape.d_hidden, shape.d_model)
        if on_gpu:
            w_in_EDH = torch.empty(sizes, device=device).transpose(1, 2)
        else:
            w_in_EDH = torch.empty(sizes[0], sizes[2], sizes[1], device=device)
        w_out_EFD = torch.empty(len(self.indices), shape.d_ff, shape.d_model, device=device)
        for slot, index in enumerate(self.indices):
            w_in_DH, w_out_FD = init_expert(ExpertId(layer, index), shape, run=run, seed=seed, init_std=init_std)
            w_in_EDH[slot] = w_in_DH
            w_out_EFD[slot] = w_out_FD
        self._weights = ExpertWeights(w_in_EDH, w_out_EFD, shape.activation)
        self._optimizer = StackedAdamW(w_in_EDH, w_out_EFD, optimizer)
        self._compute = self._weights
        if compute_dtype is not torch.float32:
            self._compute = ExpertWeights(w_in_EDH.to(compute_dtype), w_out_EFD.to(compute_dtype), shape.activation)
        self._graphed = GraphedExperts(self._compute) if on_gpu else None
        self._at_once_bytes = at_once_bytes
        self._generation = 0  # of the weights: counts everything that changes what a call gives
        self._base: WeightGrads | None = None
        """Sums of the next step that were made before their batch is complete, or came with a state."""
        self._base_rows_E = torch.zeros(len(self.indices), dtype=torch.int64)
        self._spare: list[WeightGrads] = []
        self.broken: frozenset[int] = frozenset()
        """Indices of experts whose weights are not finite: no call runs on them until they are replaced."""
        self._learned = Learned(self.indices, origin)

    @property
    def device(self) -> torch.device:
        return self._weights.w_in_EDH.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._compute.w_in_EDH.dtype

    @property
    def versions(self) -> dict[int, int]:
        """Expert index -> optimizer steps made."""
        return dict(zip(self.indices, self._optimizer.versions, strict=True))

    @property
    def clock(self) -> int:
        """Steps of the run that this bank knows to be over. States of replicas may be ahead of it, when these have
        heard of commits that we have not: what they have made is not made again when the commits come."""
        return self._learned.clock

    @property
    def lineages(self) -> dict[int, Lineage]:
        """Expert index -> what its weights have learned, and from whom."""
        return dict(zip(self.indices, self._learned.lineages, strict=True))

    def slots(self, expert_index: Tensor) -> Tensor:
        """int32 slots of the same shape, of indices on the CPU; -1 for one that is not hosted here, or broken."""
        index = expert_index.numpy()
        # The largest number plus one is negative, and out of range as well.
        return torch.from_numpy(self._slot_at.take(index + 1, mode="clip"))

    def forward(
        self, x_RD: Tensor, slots_RK: Tensor, gates_RK: Tensor, *, keep: bool
    ) -> tuple[Tensor, Reusable | None]:
        """Row r: sum of gate * expert(x_r) over its slots that are not -1; of x's dtype, on its device. Of a promise
        (`kernels.promise`) as the bank computes it.

        With `keep`, also what `backward` can use instead of running the first projection again, unless the call runs
        in pieces.
        """
        if pieces := self._pieces(slots_RK):
            ys = [self.forward(x_RD[rows], slots_RK[rows], gates_RK[rows], keep=False)[0] for rows in pieces]
            return torch.cat(ys), None
        x = x_RD if is_promise(x_RD) else self._rows(x_RD)
        if self._graphed is not None and self._graphed.takes(x, slots_RK):
            y_RD, kernel = self._graphed.forward(x, self._pinned(slots_RK), self._pinned(gates_RK), keep=keep)
        else:
            slots, gates = self.put(slots_RK), self.put(gates_RK)
            y_RD, kernel = moe_ffn_forward(self._rows(x), slots, gates, self._compute, keep=keep)
        reusable = None if kernel is None else Reusable(kernel, self._generation)
        return y_RD if is_promise(x) else y_RD.to(x_RD), reusable

    def finish(self) -> None:
        """Wait until what was returned is there: of rows on a GPU it comes when that has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _pieces(self, slots_RK: Tensor) -> list[slice]:
        """Rows that run one part after the other; none: all at once. The same rows always in the same parts."""
        n_rows, most = slots_RK.shape
        at_once = max(1, self._at_once_bytes // max(1, pairs_bytes(1, most, self.shape)))
        if self.device.type != "cpu" or n_rows <= at_once:
            return []
        return [slice(first, first + at_once) for first in range(0, n_rows, at_once)]

    def _rows(self, x_RD: Tensor) -> Tensor:
        """On the bank's device, in the dtype it computes in."""
        return landed(x_RD).to(self.device, self._compute.w_in_EDH.dtype, non_blocking=True)

    def put(self, value_R: Tensor) -> Tensor:
        """Where the experts are; a GPU's host does not wait for what it does before."""
        return self._pinned(value_R).to(self.device, non_blocking=True)

    def _pinned(self, value_RK: Tensor) -> Tensor:
        """From where it goes into a graph's buffers while the host goes on."""
        if value_RK.device.type != "cpu" or self.device.type != "cuda":
            return value_RK
        return torch.empty(value_RK.shape, dtype=value_RK.dtype, pin_memory=True).copy_(value_RK)

    def fetched(self, value_R: Tensor) -> Tensor:
        """On the CPU; of what comes from a GPU the values are there after `finish`."""
        if value_R.device.type == "cpu":
            return value_R
        return torch.empty(value_R.shape, dtype=value_R.dtype, pin_memory=True).copy_(value_R, non_blocking=True)

    def backward(
        self, dy_RD: Tensor, x_RD: Tensor, slots_RK: Tensor, gates_RK: Tensor, saved: Reusable | None
    ) -> tuple[Tensor, Tensor, Reusable | None, float | Tensor]:
        """(dx [R, D] where x is, dgates [R, K] where the experts are, what `BankCall` can use again, a bound of the
        norm of the weights' gradients) of the same forward.

        Of a `saved` that is older than the weights nothing is used: all gradients belong to the weights of now.
        """
        if pieces := self._pieces(slots_RK):
            parts = [self.backward(dy_RD[at], x_RD[at], slots_RK[at], gates_RK[at], None) for at in pieces]
            dx_RD, dgates_RK = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            return dx_RD, dgates_RK, None, sum(part[3] for part in parts)
        kernel = self._usable(saved, Saved)
        x, dy = self._rows(x_RD), dy_RD if is_promise(dy_RD) else self._rows(dy_RD)
        if self._graphed is not None and self._graphed.takes(x, slots_RK):
            slots, gates = self._pinned(slots_RK), self._pinned(gates_RK)
            dx_RD, dgates_RK, work = self._graphed.backward(dy, x, slots, gates, kernel, keep=True)
        else:
            slots, gates = self.put(slots_RK), self.put(gates_RK)
            dx_RD, dgates_RK, work = moe_ffn_backward(self._rows(dy), x, slots, gates, self._compute, kernel)
        assert dx_RD is not None
        assert work is not None
        n_pairs = int((slots_RK.numpy() >= 0).sum())
        most = gradient_bound(self._rows(dy), x, gates, work, n_pairs)
        return dx_RD.to(x_RD), dgates_RK.to(gates_RK.dtype), Reusable(work, self._generation), most

    def _usable(self, reusable: Reusable | None, kind: type[KernelT]) -> KernelT | None:
        """What it has, if it is of that kind, and of the weights of now."""
        if reusable is None or reusable.generation != self._generation or not isinstance(reusable.kernel, kind):
            return None
        return reusable.kernel

    def gradients(self, commits: Iterable[Commit]) -> WeightGrads | None:
        """The weights' gradients at the weights of now: of each commit in one product, these added in their order. The
        same bits for the same calls, whatever is left of their backwards. None of no pairs.

        A bound that held at the weights of a call's backward need not hold at those of now: what spoils an expert's sum
        is left out of it."""
        groups = [group for calls in commits for group in self._groups(calls)]
        sums = self._sum_up(groups)
        stale = any(self._usable(call.reusable, Work) is None for group in groups for call in group)
        if sums is None or not stale or bool(norm_of_each(sums).isfinite().all()):
            return sums
        logger.warning("layer %d: gradients that are not finite any more are left out", self.layer)
        return self._sum_up(groups, only_sound=True)

    def _sum_up(self, groups: Sequence[Commit], *, only_sound: bool = False) -> WeightGrads | None:
        sums: WeightGrads | None = None
        for group in groups:
            into = self._spare.pop() if self._spare else None
            new = moe_ffn_weight_grads([self._work(call) for call in group], self._compute, into=into)
            if only_sound:
                leave_out_unsound(new)
            if sums is None:
                sums = new
            else:
                sums = WeightGrads(*(a.float().add_(b) for a, b in zip(sums, new, strict=True)))
                self._use_again(new)
        return sums

    def _use_again(self, grads: WeightGrads) -> None:
        """Keep the memory of gradients that are over for the next ones."""
        if self.device.type == "cpu" and len(self._spare) < 2 and grads.w_in_EDH.dtype is torch.float32:
            self._spare.append(grads)

    def _groups(self, calls: Commit) -> Iterator[list[BankCall]]:
        """The calls, and pieces of calls, that have pairs, by what is made at once: all of them, unless that is too
        much. By sizes alone."""
        group: list[BankCall] = []
        n_bytes = 0
        for call in calls:
            for at in self._pieces(call.slots_RK) or [slice(None)]:
                part = call
                if at != slice(None):
                    part = BankCall(call.dy_RD[at], call.x_RD[at], call.slots_RK[at], call.gates_RK[at])
                if not bool((part.slots_RK >= 0).any()):
                    continue
                part_bytes = pairs_bytes(part.slots_RK.shape[0], part.slots_RK.shape[1], self.shape)
                if group and n_bytes + part_bytes > self._at_once_bytes:
                    yield group
                    group, n_bytes = [], 0
                group.append(part)
                n_bytes += part_bytes
        if group:
            yield group

    def _work(self, call: BankCall) -> WeightCall:
        slots = self.put(call.slots_RK)
        dy, x, work = self._rows(call.dy_RD), self._rows(call.x_RD), self._usable(call.reusable, Work)
        if work is None:
            *_, work = moe_ffn_backward(dy, x, slots, self.put(call.gates_RK), self._compute, None, rows=False)
        return WeightCall(dy, x, slots, work)

    def rows_by_slot(self, slots_RK: Tensor) -> Tensor:
        """int64 [E], pairs of each expert."""
        counts = np.bincount(slots_RK.cpu().numpy().reshape(-1) + 1, minlength=len(self.indices) + 1)
        return torch.from_numpy(counts[1:])

    def _rows_of(self, commits: Iterable[Commit]) -> Tensor:
        rows_E = torch.zeros(len(self.indices), dtype=torch.int64)
        for calls in commits:
            for call in calls:
                rows_E += self.rows_by_slot(call.slots_RK)
        return rows_E

    def fold(self, commits: Sequence[Commit]) -> None:
        """Make the sums of commits towards the next step now, so that their rows need not be kept: what comes is added
        to them."""
        self._base = _sum(self._base, self.gradients(commits))
        self._base_rows_E += self._rows_of(commits)

    def close(self, commits: Sequence[Commit], tokens: int) -> Batch:
        """A batch that is complete with `tokens`: what the experts shall `step` on."""
        rows_E = self._base_rows_E + self._rows_of(commits)
        batch = Batch(commits=commits, base=self._base, rows_E=tuple(rows_E.tolist()), tokens=tokens)
        self._base = None
        self._base_rows_E = torch.zeros_like(self._base_rows_E)
        self._learned.clock += 1
        self.committed_tokens = 0
        return batch

    def make(self, batch: Batch) -> WeightGrads:
        """The sums of a batch."""
        if batch.grads is None:
            has_base = [batch.base is not None and any(bool(g[slot].any()) for g in batch.base)
                        for slot in range(len(self.indices))]  # fmt: skip
            sums = _sum(batch.base, self.gradients(batch.commits))
            batch.grads = sums or WeightGrads(*(torch.zeros_like(w) for w in self._optimizer.w))
            batch.filled_E = tuple(rows > 0 or base for rows, base in zip(batch.rows_E, has_base, strict=True))
            batch.commits, batch.base = (), None
        return batch.grads

    def shares(self, batch: Batch, indices: Collection[int]) -> dict[int, ExpertShare]:
        """Copies of those of the batch's sums that hold anything, for replicas; on the CPU."""
        return self._learned.shares(batch, self.make(batch), indices) if indices else {}

    def step(
        self, batch: Batch, shares: Mapping[int, Mapping[int, ExpertShare]] | None = None, *, clock: int = 0
    ) -> None:
        """The experts' step on `batch`, and on what replicas add: index -> origin -> share. Replicas with the same
        weights that step on the same shares are the same to the bit afterwards.

        `clock`: as replicas have it with this step. Who joined later has not heard of all commits, and never will.
        """
        try:
            self._learned.step(self._optimizer, batch, self.make(batch), shares or {}, clock, broken=self.broken)
        finally:
            if batch.grads is not None:
                self._use_again(batch.grads)
                batch.grads = None
            self._weights_changed()

    def find_broken(self, slots_RK: Tensor | None = None) -> frozenset[int]:
        """Indices of experts whose weights are not finite, and were so far not known to be broken: from now on no call
        runs on them. With `slots_RK` only of those: a row is far cheaper than a look at all weights."""
        slots = range(len(self.indices)) if slots_RK is None else slots_RK.unique().tolist()
        looked_at = [slot for slot in slots if slot >= 0]
        broken = [slot for slot in looked_at if not all(_is_finite(w[slot]) for w in self._weights[:2])]
        found = frozenset(self.indices[slot] for slot in broken) - self.broken
        if found:
            self._set_broken(self.broken | found)
        return found

    def _set_broken(self, broken: frozenset[int]) -> None:
        self.broken = broken
        for index, slot in self._slot_of.items():
            self._slot_at[index + 1] = -1 if index in broken else slot
        self._generation += 1

    def _weights_changed(self) -> None:
        self._generation += 1
        if self._compute is not self._weights:
            # In place: the graphs hold these tensors.
            self._compute.w_in_EDH.copy_(self._weights.w_in_EDH)
            self._compute.w_out_EFD.copy_(self._weights.w_out_EFD)

    def _stacks(self) -> dict[str, Tensor]:
        optimizer = self._optimizer
        stacks = (*optimizer.w, *optimizer.m, *optimizer.v)
        return dict(zip(STATE_FIELDS[:-1], stacks, strict=True))

    def state(
        self, indices: Sequence[int] | None = None, *, committed: Sequence[Commit] | None = None
    ) -> dict[str, Tensor]:
        """Copies on the CPU by name (see `wire.state`): STATE_FIELDS, and LINEAGE_FIELD; all experts that are not
        broken unless `indices` is given.

        `committed`: the commits towards the next step. While tokens are committed to it, SUM_FIELDS come too, so that
        whoever loads the state makes that step as this bank would. KeyError for an index that is not hosted here.
        """
        stacks = self._stacks()
        sums: WeightGrads | None = None
        if committed is not None and self.committed_tokens > 0:
            sums = _sum(self._base, self.gradients(committed)) or WeightGrads(
                *(torch.zeros_like(w) for w in self._optimizer.w)
            )
        state: dict[str, Tensor] = {}
        for index in self.indices if indices is None else indices:
            slot = self._slot_of[index]
            if index in self.broken:
                continue
            for field, stack in stacks.items():
                state[self._name(index, field)] = _copy(stack[slot])
            state[self._name(index, "version")] = torch.tensor(self._optimizer.versions[slot])
            lineage = self._learned.lineages[slot]
            if lineage.seen:
                state[self._name(index, LINEAGE_FIELD)] = lineage.to_tensor()
            # Sums that are not finite make no step, and a snapshot with them would be refused as a whole.
            if sums is not None and all(bool(grad[slot].isfinite().all()) for grad in sums):
                for field, stack in zip(SUM_FIELDS[:-1], sums, strict=True):
                    state[self._name(index, field)] = _copy(stack[slot].float())
                state[self._name(index, "committed_tokens")] = torch.tensor(self.committed_tokens)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the experts in `state`, any of those hosted here.

        When these are all of them, or nothing has happened to the bank yet, its committed tokens become the most that
        any of them states (none: 0): this is a resume. Gradient sums come along where their committed tokens are
        the bank's; the others start again at zero. CheckpointError, before anything is changed, for names, dtypes or
        shapes that do not fit, values that are not finite, or negative ones that cannot be.
        """
        untouched = self._generation == 0 and self.committed_tokens == 0
        loaded = self._put_state(state)
        self._learned.clock = max([self._learned.clock, *(self.versions[index] for index in loaded)])
        committed_of = {index: int(state.get(self._name(index, "committed_tokens"), 0)) for index in loaded}
        if loaded and (untouched or len(loaded) == len(self.indices)):
            self.committed_tokens = max(committed_of.values())
        for index in loaded:
            slot, wanted = self._slot_of[index], 0 < committed_of[index] == self.committed_tokens
            if wanted and self._base is None:
                self._base = WeightGrads(*(torch.zeros_like(w) for w in self._optimizer.w))
            for field, grad in zip(SUM_FIELDS[:-1], self._base or (), strict=False):
                if wanted:
                    grad[slot].copy_(state[self._name(index, field)])
                else:
                    grad[slot].zero_()
            self._base_rows_E[slot] = 0

    def replace_state(self, state: Mapping[str, Tensor]) -> None:
        """Put the experts in `state` in the place of theirs while they learn: gradient sums and committed tokens stay.
        CheckpointError as `load_state`."""
        self._put_state(state)

    def _put_state(self, state: Mapping[str, Tensor]) -> list[int]:
        loaded = self._check_state(state)
        stacks = self._stacks()
        for index in loaded:
            slot = self._slot_of[index]
            for field, stack in stacks.items():
                stack[slot].copy_(state[self._name(index, field)])
            self._optimizer.versions[slot] = int(state[self._name(index, "version")])
            self._learned.take_over(slot, state.get(self._name(index, LINEAGE_FIELD)))
        if self.broken.intersection(loaded):
            self._set_broken(self.broken.difference(loaded))
        self._weights_changed()
        return loaded

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """CheckpointError when `load_state` would not take it."""
        self._check_state(state)

    def _check_state(self, state: Mapping[str, Tensor]) -> list[int]:
        """The indices of the experts in a `state` that fits."""
        fields = (*STATE_FIELDS, *SUM_FIELDS, LINEAGE_FIELD)
        known = {self._name(index, field): index for index in self.indices for field in fields}
        if unknown := sorted(state.keys() - known):
            raise CheckpointError(f"{unknown[0]} is no expert of this bank (layer {self.layer}, {self.indices})")
        loaded = sorted({known[name] for name in state})
        check_state(state, layer=self.layer, indices=loaded, shape=self.shape)
        return loaded

    def _name(self, index: int, field: str) -> str:
        return tensor_name(ExpertId(self.layer, index), field)


def _is_finite(value: Tensor) -> bool:
    """By its sum, for one call with huge values has all weights of a layer looked at, and that is much faster."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def _sum(a: WeightGrads | None, b: WeightGrads | None) -> WeightGrads | None:
    if a is None or b is None:
        return a or b
    return WeightGrads(*(one.float() + other for one, other in zip(a, b, strict=True)))
