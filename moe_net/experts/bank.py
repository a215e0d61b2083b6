"""The experts of one layer that this peer hosts: weights, gradients and optimizer, stacked.

R rows, K experts per row, E experts of the bank (a "slot" is a position among them), D model width, F expert width,
H columns of the first projection (2F for SwiGLU: gate then up; F for GELU).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_net.errors import CheckpointError
from moe_net.experts.checks import pairs_bytes
from moe_net.experts.init import init_expert
from moe_net.experts.lineage import Lineage
from moe_net.experts.update import StackedAdamW
from moe_net.kernels.dispatch import moe_ffn_backward, moe_ffn_forward
from moe_net.kernels.graphed import NAME as GRAPHED
from moe_net.kernels.graphed import GraphedExperts
from moe_net.kernels.promise import is_promise, landed
from moe_net.kernels.types import ExpertWeights, Saved, WeightGrads
from moe_net.optim import OptimizerConfig
from moe_net.types import ExpertId, ExpertShape
from moe_net.wire.share import ExpertShare
from moe_net.wire.state import LINEAGE_FIELD, STATE_FIELDS, SUM_FIELDS, check_state, tensor_name


def memory_bytes(n_experts: int, shape: ExpertShape, *, compute_bytes: int = 0) -> int:
    """What a bank keeps for `n_experts`: weights, gradient sums and two moments, 16 bytes a parameter, and copies of
    the weights of `compute_bytes` a parameter (2 on a GPU).

    Kept inputs and scratch of the calls in flight (`kernels.memory`) come on top, and while replicas make a step
    together 8 bytes a parameter (sums of the next step, copies of those that are shared) and 4 for every partner.
    """
    return n_experts * shape.d_model * (shape.d_hidden + shape.d_ff) * (16 + compute_bytes)


AT_ONCE_BYTES = 512 * 2**20
"""On a CPU more rows than take so much (`checks.pairs_bytes`) run one part after the other, unless pre-activations
are kept. Products of so many rows gain nothing by still more."""


def _copy(value: Tensor) -> Tensor:
    """On the CPU, with memory of its own in the order of its indices, whatever a device keeps it in."""
    return torch.clone(value, memory_format=torch.contiguous_format).cpu()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClosedSums:
    """What the experts of one bank shall step on."""

    grads: WeightGrads
    rows_E: tuple[int, ...]
    """Pairs that they are of."""
    filled_E: tuple[bool, ...]
    """Whether they hold anything: also what was taken out of a step that is over, which is of no rows."""
    tokens: int
    detached: bool
    """Whether the bank sums up in others meanwhile."""


@dataclass(frozen=True, slots=True, eq=False)
class BankSaved:
    """What a forward keeps for its backward, and the state of the weights that it belongs to."""

    kernel: Saved | None
    generation: int

    @property
    def nbytes(self) -> int:
        return 0 if self.kernel is None else self.kernel.nbytes


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
        self._graphed = GraphedExperts(self._compute, self._optimizer.grads) if on_gpu else None
        self._at_once_bytes = at_once_bytes
        self._clock = 0
        self._generation = 0  # of the weights: counts everything that changes them
        # Pairs (row, expert) whose gradients are in the sums, and that were ever stepped on here.
        self._summed_rows_E = torch.zeros(len(self.indices), dtype=torch.int64)
        self._stepped_rows_E = torch.zeros(len(self.indices), dtype=torch.int64)
        self._made_up_E = torch.zeros(len(self.indices), dtype=torch.bool)  # see `make_up`
        self._lineages = [Lineage(own=origin)] * len(self.indices)

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
        return self._clock

    @property
    def lineages(self) -> dict[int, Lineage]:
        """Expert index -> what its weights have learned, and from whom."""
        return dict(zip(self.indices, self._lineages, strict=True))

    def slots(self, expert_index: Tensor) -> Tensor:
        """int32 slots of the same shape, of indices on the CPU; -1 for one that is not hosted here."""
        index = expert_index.numpy()
        # The largest number plus one is negative, and out of range as well.
        return torch.from_numpy(self._slot_at.take(index + 1, mode="clip"))

    def forward(
        self, x_RD: Tensor, slots_RK: Tensor, gates_RK: Tensor, *, keep: bool
    ) -> tuple[Tensor, BankSaved | None]:
        """Row r: sum of gate * expert(x_r) over its slots that are not -1; of x's dtype, on its device. Of a promise
        (`kernels.promise`) as the bank computes it.

        With `keep`, also what `backward` can use instead of running the first projection again.
        """
        if not keep and (pieces := self._pieces(slots_RK)):
            ys = [self.forward(x_RD[rows], slots_RK[rows], gates_RK[rows], keep=False)[0] for rows in pieces]
            return torch.cat(ys), None
        x = x_RD if is_promise(x_RD) else self._rows(x_RD)
        if self._graphed is not None and self._graphed.takes(x, slots_RK):
            y_RD, kernel = self._graphed.forward(x, self._pinned(slots_RK), self._pinned(gates_RK), keep=keep)
        else:
            slots, gates = self.put(slots_RK), self.put(gates_RK)
            y_RD, kernel = moe_ffn_forward(self._rows(x), slots, gates, self._compute, keep=keep)
        return y_RD if is_promise(x) else y_RD.to(x_RD), BankSaved(kernel, self._generation) if keep else None

    def finish(self) -> None:
        """Wait until what was returned is there: of rows on a GPU it comes when that has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def settle(self) -> None:
        """Begin what the answer of a backward did not wait for: the addition of its gradients."""
        if self._graphed is not None:
            self._graphed.settle()

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
        self,
        dy_RD: Tensor,
        x_RD: Tensor,
        slots_RK: Tensor,
        gates_RK: Tensor,
        saved: BankSaved | None,
        *,
        accumulate: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """(dx [R, D] where x is, dgates [R, K] where the experts are) of the same forward; adds to the experts'
        gradient sums unless told not to, of a promise after `settle`.

        Of a `saved` that is older than the weights nothing is used: all gradients belong to the weights of now.
        """
        kernel = saved.kernel if saved is not None and saved.generation == self._generation else None
        if kernel is not None and not accumulate and kernel.backend == GRAPHED:
            kernel = None  # graphs add
        if kernel is None and (pieces := self._pieces(slots_RK)):
            of_pieces = [
                self.backward(dy_RD[rows], x_RD[rows], slots_RK[rows], gates_RK[rows], None, accumulate=accumulate)
                for rows in pieces
            ]
            return torch.cat([dx for dx, _ in of_pieces]), torch.cat([dgates for _, dgates in of_pieces])
        x, dy = self._rows(x_RD), dy_RD if is_promise(dy_RD) else self._rows(dy_RD)
        if accumulate and self._graphed is not None and self._graphed.takes(x, slots_RK):
            slots, gates = self._pinned(slots_RK), self._pinned(gates_RK)
            dx_RD, dgates_RK, _ = self._graphed.backward(dy, x, slots, gates, kernel)
        else:
            slots, gates = self.put(slots_RK), self.put(gates_RK)
            sums = self._optimizer.grads if accumulate else None
            dx_RD, dgates_RK = moe_ffn_backward(
                self._rows(dy), x, slots, gates, self._compute, kernel, weight_grads=sums
            )
        if accumulate:  # while the device works
            self._summed_rows_E += self._rows_by_slot(slots_RK)
        return dx_RD.to(x_RD), dgates_RK.to(gates_RK.dtype)

    def subtract(self, dy_RD: Tensor, x_RD: Tensor, slots_RK: Tensor, gates_RK: Tensor) -> None:
        """Take a gradient that was added out of the sums, as it would be at the weights of now: exact up to rounding
        (of the sum, and of what was added since) if these have not changed."""
        self.backward(-dy_RD, x_RD, slots_RK, gates_RK, None)
        self._summed_rows_E -= 2 * self._rows_by_slot(slots_RK)

    def make_up(self, dy_RD: Tensor, x_RD: Tensor, slots_RK: Tensor, gates_RK: Tensor) -> None:
        """As `subtract`, for a gradient of a step that is over: its rows were counted then, and stay so."""
        rows_E = self._rows_by_slot(slots_RK)
        self.backward(-dy_RD, x_RD, slots_RK, gates_RK, None)
        self._summed_rows_E -= rows_E
        self._made_up_E |= rows_E > 0

    def clear_grads(self) -> None:
        """The gradient sums start again at zero."""
        self.settle()
        self._optimizer.zero_grads()
        self._summed_rows_E.zero_()
        self._made_up_E.zero_()

    def _rows_by_slot(self, slots_RK: Tensor) -> Tensor:
        counts = np.bincount(slots_RK.cpu().numpy().reshape(-1) + 1, minlength=len(self.indices) + 1)
        return torch.from_numpy(counts[1:])

    def commit(self, tokens: int) -> bool:
        """Count `tokens` whose gradients are complete; True if that was the batch, and the experts made their step."""
        closed = self.close(tokens)
        if closed is not None:
            self.step(closed)
        return closed is not None

    def close(self, tokens: int, *, detach: bool = False) -> ClosedSums | None:
        """Count `tokens` as `commit` does; if that was the batch, what the experts shall `step` on. With `detach` other
        calls may come before that: their gradients belong to the next step."""
        if tokens < 0:
            raise ValueError(f"cannot commit {tokens} tokens")
        self.settle()
        self.committed_tokens += tokens
        if self.committed_tokens < self.global_batch_tokens:
            return None
        closed = ClosedSums(
            grads=self._optimizer.detach_grads() if detach else self._optimizer.grads,
            rows_E=tuple(self._summed_rows_E.tolist()),
            filled_E=tuple(((self._summed_rows_E > 0) | self._made_up_E).tolist()),
            tokens=self.committed_tokens,
            detached=detach,
        )
        self._clock += 1
        self._summed_rows_E.zero_()
        self._made_up_E.zero_()
        self.committed_tokens = 0
        return closed

    def shares(self, closed: ClosedSums, indices: Collection[int]) -> dict[int, ExpertShare]:
        """Copies of those of the closed sums that hold anything, for replicas; on the CPU."""
        shares: dict[int, ExpertShare] = {}
        for slot, filled in enumerate(closed.filled_E):
            g_in, g_out = (grad[slot] for grad in closed.grads)
            wanted = filled and self.indices[slot] in indices
            if wanted and bool(g_in.isfinite().all()) and bool(g_out.isfinite().all()):
                shares[self.indices[slot]] = ExpertShare(
                    rows=closed.rows_E[slot],
                    rows_before=int(self._stepped_rows_E[slot]),
                    g_in=_copy(g_in),
                    g_out=_copy(g_out),
                )
        return shares

    def step(
        self, closed: ClosedSums, shares: Mapping[int, Mapping[int, ExpertShare]] | None = None, *, clock: int = 0
    ) -> None:
        """The experts' step on `closed`, and on what replicas add: index -> origin -> share. Replicas with the same
        weights that step on the same shares are the same to the bit afterwards.

        `clock`: as replicas have it with this step. Who joined later has not heard of all commits, and never will.
        """
        self._clock = max(self._clock, min(clock, max(self._optimizer.versions) + 1))
        made = False
        try:
            self._step_on(closed, {self._slot_of[index]: parts for index, parts in (shares or {}).items()})
            made = True
        finally:
            if not made:  # the batch is over: what its sums hold is no part of the next one
                for grad in closed.grads:
                    grad.zero_()
            self._weights_changed()

    def _step_on(self, closed: ClosedSums, parts_of: Mapping[int, Mapping[int, ExpertShare]]) -> None:
        """With the parts of replicas by slot."""
        for slot, parts in parts_of.items():
            self._add_shares(closed, slot, parts)
        # Those that a replica has brought to this step already have nothing to make up for.
        still = {
            slot
            for slot, version in enumerate(self._optimizer.versions)
            if version >= self._clock and not closed.filled_E[slot] and not parts_of.get(slot)
        }
        # Not of an expert whose sum was not finite: it has learned nothing from those rows.
        for slot in self._optimizer.step(closed.tokens, closed.grads, still=still, latest=self._clock):
            self._stepped_rows_E[slot] += closed.rows_E[slot]
            version, lineage = self._optimizer.versions[slot], self._lineages[slot]
            lineage = lineage.plus(self.origin, closed.rows_E[slot], version)
            for origin, share in parts_of.get(slot, {}).items():
                # A lineage says how many of an origin's rows, from its first: not so if we lack some before these.
                if lineage.rows_of(origin) == share.rows_before:
                    lineage = lineage.plus(origin, share.rows, version)
            self._lineages[slot] = lineage

    def _add_shares(self, closed: ClosedSums, slot: int, parts: Mapping[int, ExpertShare]) -> None:
        """In the order of origins, ours among them: addition of floats is not associative."""
        for which, own in enumerate(closed.grads):
            terms = {origin: (share.g_in, share.g_out)[which] for origin, share in parts.items()}
            if closed.filled_E[slot]:
                terms[self.origin] = own[slot].clone()
            own[slot].zero_()
            for _, term in sorted(terms.items(), key=lambda one: one[0]):
                own[slot].add_(term.to(own.device))

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

    def _sums(self) -> dict[str, Tensor]:
        self.settle()
        return dict(zip(SUM_FIELDS[:-1], self._optimizer.grads, strict=True))

    def state(self, indices: Sequence[int] | None = None, *, with_sums: bool = False) -> dict[str, Tensor]:
        """Copies on the CPU by name (see `wire.state`): STATE_FIELDS, and LINEAGE_FIELD; all experts unless `indices`
        is given.

        `with_sums`: while tokens are committed towards the next step, SUM_FIELDS too, so that whoever loads the state
        makes that step as this bank would. Sums without committed tokens are of steps that may never be committed.
        KeyError for an index that is not hosted here.
        """
        stacks, sums = self._stacks(), self._sums()
        state: dict[str, Tensor] = {}
        for index in self.indices if indices is None else indices:
            slot = self._slot_of[index]
            for field, stack in stacks.items():
                state[self._name(index, field)] = _copy(stack[slot])
            state[self._name(index, "version")] = torch.tensor(self._optimizer.versions[slot])
            if self._lineages[slot].seen:
                state[self._name(index, LINEAGE_FIELD)] = self._lineages[slot].to_tensor()
            # Sums that are not finite make no step, and a snapshot with them would be refused as a whole.
            if with_sums and self.committed_tokens > 0 and all(bool(g[slot].isfinite().all()) for g in sums.values()):
                for field, stack in sums.items():
                    state[self._name(index, field)] = torch.clone(
                        stack[slot], memory_format=torch.contiguous_format
                    ).cpu()
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
        loaded, sums = self._put_state(state), self._sums()
        self._clock = max([self._clock, *(self.versions[index] for index in loaded)])
        committed_of = {index: int(state.get(self._name(index, "committed_tokens"), 0)) for index in loaded}
        if loaded and (untouched or len(loaded) == len(self.indices)):
            self.committed_tokens = max(committed_of.values())
        for index in loaded:
            slot = self._slot_of[index]
            for field, stack in sums.items():
                if 0 < committed_of[index] == self.committed_tokens:
                    stack[slot].copy_(state[self._name(index, field)])
                else:
                    stack[slot].zero_()
            self._summed_rows_E[slot] = 0
            self._made_up_E[slot] = False

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
            said = Lineage.from_tensor(state.get(self._name(index, LINEAGE_FIELD)), own=self.origin)
            self._lineages[slot] = said.capped(self.origin, int(self._stepped_rows_E[slot])) if self.origin else said
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
