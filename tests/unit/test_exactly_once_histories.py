"""A step is the sum over the committed calls and nothing else, bit for bit, whatever the network does to the calls.

Two hosts with the same experts and one to four trainers that do as ours: retry, send the inputs again, ask the other
host, use one answer, and name in their commits the calls whose answers they used. Trainers die at any moment, fall
silent, send values that are huge; commits get lost and come later, and there may be so little room that hosts let go of
what they staged. One host makes its steps at once, the other layer by layer between what comes. The oracle knows no
staging: it is told what was committed and what the hosts said was missing or not finite, and runs the kernel on those
calls, commit by commit in order, at the weights of the step.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from moe_net.errors import BusyError, InputsGoneError, StaleStepError, WireError
from moe_net.experts.bank import ExpertBank
from moe_net.experts.host import ExpertHost
from moe_net.experts.merging import pad_pairs
from moe_net.kernels.dispatch import moe_ffn_backward, moe_ffn_weight_grads
from moe_net.kernels.types import WeightCall, WeightGrads
from moe_net.optim import OptimizerConfig
from moe_net.types import ExpertShape
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitAnswer, CommitCall, ForwardCall, RoutedRows

D, F, N_EXPERTS, LAYERS = 4, 3, 3, (0, 2)
BATCH_TOKENS = 9
HOSTS = (0, 1)
FATES = st.sampled_from(["answered", "answered", "request lost", "reply lost", "delayed", "twice"])


def new_banks() -> dict[int, ExpertBank]:
    return {
        layer: ExpertBank(
            layer=layer, indices=range(N_EXPERTS), shape=ExpertShape(d_model=D, d_ff=F),
            optimizer=OptimizerConfig(warmup_steps=0, learning_rate=0.1), global_batch_tokens=BATCH_TOKENS,
            run="test", seed=1, init_std=0.5,
        )
        for layer in LAYERS
    }  # fmt: skip


class Host(ExpertHost):
    """A real one that says when it had to make sums early, and may leave steps for later."""

    def __init__(self, *, stage_bytes: int, clock: Callable[[], float], defers: bool) -> None:
        super().__init__(new_banks(), stage_bytes=stage_bytes, clock=clock)
        self.defers = defers
        self.folded = False
        fold = self._commits.fold

        def noting(layer: int) -> None:
            self.folded = True
            fold(layer)

        self._commits.fold = noting  # type: ignore[method-assign]

    def commit(self, call: CommitCall) -> CommitAnswer:
        answer, closed = self.begin_commit(call)
        if closed is not None:
            self.defer(closed) if self.defers else self.finish_commit(closed)
        return answer

    @property
    def due(self) -> set[int]:
        """Layers whose step is still to be made."""
        return self._commits.open


@dataclass(eq=False)
class Call:
    """One Forward with its Backward, as its trainer sees it."""

    forward: ForwardCall
    grad_RD: Tensor
    asked: int
    """The host that answered Forward."""
    used: int | None = None
    """The host whose answer the trainer goes on with."""

    @property
    def id(self) -> bytes:
        return self.forward.call_id

    def backward(self, *, resend: bool) -> BackwardCall:
        f = self.forward
        return BackwardCall(
            call_id=f.call_id, trainer=f.trainer, step=f.step, layer=f.layer, grad_RD=self.grad_RD,
            rows=f.rows if resend else None,
        )  # fmt: skip


@dataclass(eq=False)
class Trainer:
    name: str
    step: int = 0
    open: list[Call] = field(default_factory=list[Call])
    owed: dict[int, list[tuple[CommitCall, dict[bytes, Call]]]] = field(
        default_factory=lambda: defaultdict[int, list[tuple[CommitCall, dict[bytes, Call]]]](list)
    )
    """Commits that a host has not heard of, in order."""


HUGE: dict[str, Callable[[Call], object]] = {
    "rows": lambda call: call.forward.rows.x_RD.fill_(3e38),
    "gates": lambda call: call.forward.rows.gate_P.fill_(3e38),
    "gradients": lambda call: call.grad_RD.mul_(1e25),
    "gradient": lambda call: call.grad_RD[0, 0].fill_(-3e38),
    "gates of zeros": lambda call: (call.forward.rows.x_RD.zero_(), call.forward.rows.gate_P.fill_(3e38)),
}


class Oracle:
    """What one host's experts must be."""

    def __init__(self) -> None:
        self.banks = new_banks()
        self.committed: dict[tuple[str, int], list[Call]] = {}
        self.base: dict[int, WeightGrads | None] = dict.fromkeys(LAYERS)
        self.tokens = 0

    def commit(self, commit: CommitCall, calls: list[Call], *, folded: bool) -> bool:
        self.committed[commit.trainer, commit.step] = calls
        self.tokens += commit.tokens
        if self.tokens < BATCH_TOKENS:
            if folded:
                self.base = {layer: self._sums(layer) for layer in LAYERS}
                self.committed = {}
            return False
        for layer, bank in self.banks.items():
            optimizer = bank._optimizer
            sums = self._sums(layer) or WeightGrads(*(torch.zeros_like(w) for w in optimizer.w))
            optimizer.step(self.tokens, WeightGrads(*(grad.clone() for grad in sums)))
        self.committed, self.base, self.tokens = {}, dict.fromkeys(LAYERS), 0
        return True

    def _sums(self, layer: int) -> WeightGrads | None:
        """One product for each commit, and these added in the order of (trainer, step)."""
        weights, groups = self.banks[layer]._weights, []
        for _, calls in sorted(self.committed.items()):
            work: list[WeightCall] = []
            for call in calls:
                rows = call.forward.rows
                if call.forward.layer == layer:
                    slots, gates, _ = pad_pairs(rows.experts_per_row_R, rows.expert_index_P, rows.gate_P)
                    *_, made = moe_ffn_backward(call.grad_RD, rows.x_RD, slots, gates, weights, None, rows=False)
                    work.append(WeightCall(call.grad_RD, rows.x_RD, slots, made))
            if work:
                groups.append(moe_ffn_weight_grads(work, weights))
        total: WeightGrads | None = None
        for group in groups:
            total = group if total is None else _sum(total, group)
        base = self.base[layer]
        return total if base is None else base if total is None else _sum(base, total)


def _sum(a: WeightGrads, b: WeightGrads) -> WeightGrads:
    return WeightGrads(*(one + other for one, other in zip(a, b, strict=True)))


def tensors(bank: ExpertBank) -> list[Tensor]:
    optimizer = bank._optimizer
    return [stack for stacks in (optimizer.w, optimizer.m, optimizer.v) for stack in stacks]


class Histories(RuleBasedStateMachine):
    """Everything that can happen to calls."""

    @initialize(n_trainers=st.integers(1, 4), limit=st.sampled_from([14_000, 40_000, 1 << 22]))
    def begin(self, n_trainers: int, limit: int) -> None:
        self.limit = limit
        self.now_s = 0.0
        self.hosts = [Host(stage_bytes=limit, clock=lambda: self.now_s, defers=bool(host)) for host in HOSTS]
        self.oracles = [Oracle() for _ in HOSTS]
        self.names = itertools.count()
        self.trainers = [self.new_trainer() for _ in range(n_trainers)]
        self.delayed: list[tuple[int, BackwardCall]] = []
        self.heard: list[tuple[int, CommitCall, CommitAnswer]] = []
        self.numbers = itertools.count()
        self.huge: set[bytes] = set()

    def new_trainer(self) -> Trainer:
        # Not in the order in which they come.
        number = next(self.names)
        return Trainer(f"{(7 * number) % 10}-{number}")

    def deliver(self, host: int, message: BackwardCall) -> BackwardAnswer | None:
        """The host's answer; None when it wants the inputs, has no room, or wants nothing any more."""
        answer = self.hosts[host].backward_many([message])[0]
        if message.call_id not in self.huge:
            assert not isinstance(answer, WireError), answer
        assert isinstance(answer, BackwardAnswer | StaleStepError | InputsGoneError | BusyError | WireError), answer
        if isinstance(answer, InputsGoneError):
            assert message.rows is None
        if isinstance(answer, BusyError):
            assert self.limit < 1 << 22
        return answer if isinstance(answer, BackwardAnswer) else None

    def send(self, host: int, call: Call, fate: str, *, resend: bool = False) -> None:
        """One try of the trainer, whose network does `fate` to it."""
        message = call.backward(resend=resend)
        if fate == "delayed":
            self.delayed.append((host, message))
        if fate in ("request lost", "delayed"):
            return
        answer = self.deliver(host, message)
        if answer is None and not resend:
            message = call.backward(resend=True)
            answer = self.deliver(host, message)
        if fate == "twice":
            self.deliver(host, message)
        if answer is not None and fate != "reply lost":
            call.used = host

    @rule(
        data=st.data(), host=st.sampled_from(HOSTS), layer=st.sampled_from(LAYERS), n_rows=st.integers(1, 5),
        fate=st.one_of(st.none(), FATES), twice=st.booleans(), huge=st.sampled_from([None, None, None, *HUGE]),
    )  # fmt: skip
    def forward(
        self, data: st.DataObject, host: int, layer: int, n_rows: int, fate: str | None, twice: bool, huge: str | None
    ) -> None:
        """Perhaps two, and, unless `fate` is None, the first try of the Backward."""
        call = self.new_call(data.draw(st.sampled_from(self.trainers)), host, layer, n_rows, huge)
        self.hosts[host].forward_many([call.forward] * (1 + twice))
        if fate is not None:
            self.send(host, call, fate)

    def new_call(self, trainer: Trainer, host: int, layer: int, n_rows: int, huge: str | None = None) -> Call:
        number = next(self.numbers)
        draw = random.Random(number)
        experts = [draw.sample(range(N_EXPERTS), draw.randint(1, 2)) for _ in range(n_rows)]
        flat = [e for row in experts for e in row]
        values = torch.Generator().manual_seed(number)
        rows = RoutedRows(
            x_RD=torch.randn(n_rows, D, generator=values),
            experts_per_row_R=torch.tensor([len(row) for row in experts], dtype=torch.int32),
            expert_index_P=torch.tensor(flat, dtype=torch.int32),
            gate_P=torch.rand(len(flat), generator=values) + 0.1,
        )
        call = Call(
            ForwardCall(
                call_id=number.to_bytes(16, "big"), trainer=trainer.name, step=trainer.step, layer=layer, rows=rows
            ),
            torch.randn(n_rows, D, generator=values),
            asked=host,
        )
        if huge is not None:
            HUGE[huge](call)
            self.huge.add(call.id)
        trainer.open.append(call)
        return call

    @rule(data=st.data(), host=st.sampled_from(HOSTS), order=st.permutations(range(4)))
    def everybody_ends_a_step(self, data: st.DataObject, host: int, order: list[int]) -> None:
        """After a call each, whose forwards run together, so that one batch has commits of all, which come in any
        order."""
        calls = [self.new_call(trainer, host, 0, 3) for trainer in self.trainers]
        self.hosts[host].forward_many([call.forward for call in calls])
        for call in calls:
            self.send(host, call, "answered")
        for n in order:
            if n < len(self.trainers):
                self._commit(self.trainers[n], 3, set(HOSTS))

    @precondition(lambda self: any(call.used is None for t in self.trainers for call in t.open))
    @rule(data=st.data(), fate=FATES, elsewhere=st.booleans())
    def backward(self, data: st.DataObject, fate: str, elsewhere: bool) -> None:
        """The first try or a retry, or the other host is asked; whoever answers last is used."""
        waiting = [call for t in self.trainers for call in t.open if call.used is None]
        call = data.draw(st.sampled_from(waiting))
        self.send(1 - call.asked if elsewhere else call.asked, call, fate, resend=elsewhere)

    @precondition(lambda self: any(call.used is not None for t in self.trainers for call in t.open))
    @rule(data=st.data(), fate=FATES)
    def hedge(self, data: st.DataObject, fate: str) -> None:
        """A call that was answered goes to the other host as well, and that answer may win."""
        answered = [call for t in self.trainers for call in t.open if call.used is not None]
        call = data.draw(st.sampled_from(answered))
        assert call.used is not None
        self.send(1 - call.used, call, fate, resend=True)

    @precondition(lambda self: self.delayed)
    @rule(data=st.data(), keep=st.booleans())
    def late(self, data: st.DataObject, keep: bool) -> None:
        """A message arrives that nobody waits for, perhaps not for the last time."""
        n = data.draw(st.integers(0, len(self.delayed) - 1))
        host, message = self.delayed[n] if keep else self.delayed.pop(n)
        self.deliver(host, message)

    @rule(data=st.data(), tokens=st.sampled_from([0, 2, 3, 3, BATCH_TOKENS]), hear=st.sets(st.sampled_from(HOSTS)))
    def commit(self, data: st.DataObject, tokens: int, hear: set[int]) -> None:
        """The trainer ends its step. Hosts in `hear` hear of it, and of all that they were owed, now; others later."""
        self._commit(data.draw(st.sampled_from(self.trainers)), tokens, hear)

    def _commit(self, trainer: Trainer, tokens: int, hear: set[int]) -> None:
        for host in HOSTS:
            calls = {call.id: call for call in trainer.open if call.used == host}
            commit = CommitCall(trainer=trainer.name, step=trainer.step, tokens=tokens, calls=tuple(calls))
            trainer.owed[host].append((commit, calls))
        trainer.open, trainer.step = [], trainer.step + 1
        for host in hear:
            self.hear(trainer, host)

    @rule(data=st.data(), host=st.sampled_from(HOSTS))
    def hear_late(self, data: st.DataObject, host: int) -> None:
        self.hear(data.draw(st.sampled_from(self.trainers)), host)

    def hear(self, trainer: Trainer, host: int) -> None:
        for commit, calls in trainer.owed.pop(host, []):
            self.hosts[host].folded = False
            answer = self.hosts[host].commit(commit)
            assert not answer.repeated
            assert set(answer.not_finite) == (calls.keys() & self.huge) - set(answer.missing)
            assert set(answer.missing) <= calls.keys()
            assert not answer.missing or self.limit < 1 << 22, "there was room for all"
            counted = [c for call_id, c in calls.items() if call_id not in {*answer.missing, *answer.not_finite}]
            assert answer.stepped == self.oracles[host].commit(commit, counted, folded=self.hosts[host].folded)
            self.heard.append((host, commit, answer))

    @precondition(lambda self: self.heard)
    @rule(data=st.data())
    def commit_again(self, data: st.DataObject) -> None:
        host, commit, answer = data.draw(st.sampled_from(self.heard))
        again = self.hosts[host].commit(commit)
        assert again.repeated
        last = max(other.step for h, other, _ in self.heard if h == host and other.trainer == commit.trainer)
        if commit.step == last:
            told = (answer.stepped, answer.missing, answer.not_finite)
            assert (again.stepped, again.missing, again.not_finite) == told

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """With what it has staged, and what hosts have not heard of; another one comes."""
        n = data.draw(st.integers(0, len(self.trainers) - 1))
        self.trainers[n] = self.new_trainer()

    @rule(passes_s=st.sampled_from([10.0, 200.0]))
    def wait(self, passes_s: float) -> None:
        """Who has been silent for long may lose what it has staged."""
        self.now_s += passes_s

    @rule()
    def make_the_step_of_a_layer(self) -> None:
        self.hosts[1].make_next()

    def teardown(self) -> None:
        """Everybody alive ends its step, and a last commit the batch: then nothing is left but what the dead staged."""
        if not hasattr(self, "trainers"):
            return
        last = self.new_trainer()
        for trainer in [*self.trainers, last]:
            self._commit(trainer, BATCH_TOKENS if trainer is last else 0, set(HOSTS))
        living = {trainer.name for trainer in self.trainers}
        for host in self.hosts:
            host.make_all_due()
            assert host._staging.held_bytes == 0
            assert not living & {call.facts.trainer for call in host._staging._calls.values()}
        self.weights_are_those_of_the_oracle_bit_for_bit()
        self.what_is_kept_is_counted_and_within_its_limit()

    @invariant()
    def weights_are_those_of_the_oracle_bit_for_bit(self) -> None:
        for host, oracle in zip(self.hosts, self.oracles, strict=True):
            assert host.committed_tokens == oracle.tokens
            for layer in LAYERS:
                if layer not in host.due:
                    for mine, expected in zip(tensors(host._banks[layer]), tensors(oracle.banks[layer]), strict=True):
                        assert torch.equal(mine, expected)

    @invariant()
    def what_is_kept_is_counted_and_within_its_limit(self) -> None:
        for host in self.hosts:
            staging = host._staging
            assert staging.n_bytes <= self.limit
            held = sum(one.n_bytes for layer in host._commits._committed.values() for one in layer.values())
            held += host._commits._due_bytes
            assert staging.held_bytes == held
            assert staging.n_bytes == held + sum(call.n_bytes for call in staging._calls.values())
            for call in staging._calls.values():
                assert call.facts.step > staging.last_committed_step(call.facts.trainer), "nobody can name it any more"
            staged = {name: t.staged_bytes for name, t in staging._trainers.items() if t.staged_bytes}
            summed: defaultdict[str, int] = defaultdict(int)
            for call in staging._calls.values():
                summed[call.facts.trainer] += call.row_bytes if call.grad is not None else 0
            assert staged == {name: n_bytes for name, n_bytes in summed.items() if n_bytes}


Histories.TestCase.settings = settings(
    max_examples=250, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
test_a_step_is_the_sum_over_the_committed_calls_bit_for_bit = Histories.TestCase
