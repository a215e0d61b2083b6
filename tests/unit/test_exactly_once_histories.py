"""Each acknowledged gradient is in exactly one replica's sums, bit for bit, whatever the network does to the calls.

Two hosts with the same experts, two trainers that do as ours: retry, fail over to the other host with the inputs sent
again, and void at the commit whatever they sent elsewhere. The oracle knows no books: it is told which calls a host
added, in order, and runs the kernel on them, one by one, into sums that began at zero.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from moe_net.errors import InputsGoneError, StaleStepError
from moe_net.experts.bank import ExpertBank
from moe_net.experts.host import ExpertHost
from moe_net.experts.merging import pad_pairs
from moe_net.kernels.dispatch import moe_ffn_backward
from moe_net.optim import OptimizerConfig
from moe_net.types import ExpertShape
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitCall, ForwardCall, RoutedRows

D, F, N_EXPERTS, LAYERS = 4, 3, 3, (0, 2)
BATCH_TOKENS = 1000
TWO = (0, 1)
FATES = st.sampled_from(["answered", "answered", "request lost", "reply lost", "reply lost", "delayed", "twice"])


def new_banks() -> dict[int, ExpertBank]:
    return {
        layer: ExpertBank(
            layer=layer, indices=range(N_EXPERTS), shape=ExpertShape(d_model=D, d_ff=F),
            optimizer=OptimizerConfig(warmup_steps=0, learning_rate=0.1), global_batch_tokens=BATCH_TOKENS,
            run="test", seed=1, init_std=0.5,
        )
        for layer in LAYERS
    }  # fmt: skip


@dataclass(eq=False)
class Call:
    """One Forward with its Backward, as its trainer sees it."""

    forward: ForwardCall
    backward: BackwardCall
    asked: int
    """The host that answered Forward."""
    acknowledged: int | None = None
    """The host whose acknowledgement counts."""
    sent_to: set[int] = field(default_factory=set[int])
    """Hosts that got a Backward, as far as the trainer can tell."""

    @property
    def id(self) -> bytes:
        return self.forward.call_id

    def resent(self) -> BackwardCall:
        b = self.backward
        return BackwardCall(
            call_id=b.call_id, trainer=b.trainer, step=b.step, layer=b.layer, grad_RD=b.grad_RD, rows=self.forward.rows
        )


class Oracle:
    """What one host's banks must be."""

    def __init__(self) -> None:
        self.banks = new_banks()
        self.order: list[Call] = []
        """What is in the sums."""
        self.added: set[bytes] = set()
        """What has been added and not been voided, ever."""
        self.tokens = 0

    def add(self, call: Call) -> None:
        self.order.append(call)
        self.added.add(call.id)
        self._run(call)

    def _run(self, call: Call) -> None:
        rows, optimizer = call.forward.rows, self.banks[call.forward.layer]._optimizer
        slots_RK, gates_RK, _ = pad_pairs(rows.experts_per_row_R, rows.expert_index_P.long(), rows.gate_P)
        weights = self.banks[call.forward.layer]._weights
        moe_ffn_backward(
            call.backward.grad_RD, rows.x_RD, slots_RK, gates_RK, weights, None, weight_grads=optimizer.grads
        )

    def void(self, ids: set[bytes]) -> int:
        n_before = len(self.order)
        self.order = [call for call in self.order if call.id not in ids]
        self.added -= ids
        if len(self.order) < n_before:
            for bank in self.banks.values():
                for grad in bank._optimizer.grads:
                    grad.zero_()
            for call in self.order:
                self._run(call)
        return n_before - len(self.order)

    def commit(self, tokens: int) -> bool:
        self.tokens += tokens
        if self.tokens < BATCH_TOKENS:
            return False
        for bank in self.banks.values():
            bank._optimizer.step(self.tokens)
        self.order.clear()
        self.tokens = 0
        return True


def looked_at(host: ExpertHost) -> dict[int, ExpertBank]:
    """Its banks, as whoever looks at their sums finds them; the host goes on as if nobody had."""
    if host._voiding.stale:
        host = copy.deepcopy(host)
        host._voiding.renew()
    return host._banks  # type: ignore[return-value]


def tensors(banks: dict[int, ExpertBank]) -> list[Tensor]:
    optimizers = [bank._optimizer for bank in banks.values()]
    return [t for o in optimizers for stacks in (o.w, o.m, o.v, o.grads) for t in stacks]


class Histories(RuleBasedStateMachine):
    """Everything that can happen to calls, between two hosts and two trainers."""

    def __init__(self) -> None:
        super().__init__()
        # Room for the inputs of two calls: most are gone by the time of their Backward.
        self.hosts = [ExpertHost(new_banks(), cache_bytes=2600, reply_bytes=2600) for _ in TWO]
        self.oracles = [Oracle() for _ in TWO]
        self.step = [0, 0]
        self.open: list[list[Call]] = [[], []]
        """Of each trainer's current step."""
        self.closed: list[Call] = []
        self.delayed: list[tuple[int, Call, BackwardCall]] = []
        self.owed: dict[tuple[int, int], set[bytes]] = {(t, h): set() for t in TWO for h in TWO}
        """Voids of trainer t that host h has not heard of, because its commits were lost."""
        self.last_commit: dict[tuple[int, int], tuple[CommitCall, Any]] = {}
        self.committed = {(t, h): -1 for t in TWO for h in TWO}
        self.numbers = iter(range(10**6))

    def deliver(self, host: int, call: Call, message: BackwardCall) -> BackwardAnswer | None:
        """The host's answer; None when it wants the inputs, or nothing any more."""
        answer = self.hosts[host].backward_many([message])[0]
        if isinstance(answer, StaleStepError):
            assert message.step <= self.committed[int(message.trainer), host]
            return None
        if isinstance(answer, InputsGoneError):
            assert message.rows is None
            return None
        assert isinstance(answer, BackwardAnswer)
        if not answer.repeated:
            assert call.id not in self.oracles[host].added
            self.oracles[host].add(call)
        assert call.id in self.oracles[host].added
        return answer

    def send(self, host: int, call: Call, message: BackwardCall, fate: str) -> None:
        """One try of the trainer, whose network does `fate` to it."""
        call.sent_to.add(host)
        if fate == "delayed":
            self.delayed.append((host, call, message))
        if fate in ("request lost", "delayed"):
            return
        answer = self.deliver(host, call, message)
        if answer is None and message.rows is None:
            message = call.resent()
            answer = self.deliver(host, call, message)
        if fate == "twice":
            again = self.deliver(host, call, message)
            assert (again is None) == (answer is None)
        if answer is not None and fate != "reply lost":
            call.acknowledged = host

    @rule(
        trainer=st.sampled_from(TWO),
        host=st.sampled_from(TWO),
        layer=st.sampled_from(LAYERS),
        n_rows=st.integers(1, 5),
        fate=st.one_of(st.none(), FATES),
    )
    def forward(self, trainer: int, host: int, layer: int, n_rows: int, fate: str | None) -> None:
        """And, unless `fate` is None, the first try of its Backward."""
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
        named = {
            "call_id": number.to_bytes(16, "big"), "trainer": str(trainer), "step": self.step[trainer], "layer": layer
        }  # fmt: skip
        backward = BackwardCall(**named, grad_RD=torch.randn(n_rows, D, generator=values))
        call = Call(ForwardCall(**named, rows=rows), backward, asked=host)
        self.hosts[host].forward_many([call.forward])
        self.open[trainer].append(call)
        if fate is not None:
            self.send(host, call, backward, fate)

    @precondition(lambda self: any(c.acknowledged is None for t in TWO for c in self.open[t]))
    @rule(data=st.data(), fate=FATES)
    def backward(self, data: st.DataObject, fate: str) -> None:
        """The first try, or a retry, at the host that answered Forward."""
        waiting = [c for t in TWO for c in self.open[t] if c.acknowledged is None and c.sent_to <= {c.asked}]
        if waiting:
            call = data.draw(st.sampled_from(waiting))
            self.send(call.asked, call, call.backward, fate)

    @precondition(lambda self: any(c.acknowledged is None and c.sent_to for t in TWO for c in self.open[t]))
    @rule(data=st.data(), fate=FATES)
    def fail_over(self, data: st.DataObject, fate: str) -> None:
        waiting = [c for t in TWO for c in self.open[t] if c.acknowledged is None and c.sent_to]
        call = data.draw(st.sampled_from(waiting))
        self.send(1 - call.asked, call, call.resent(), fate)

    @precondition(lambda self: self.delayed)
    @rule(data=st.data(), keep=st.booleans())
    def late(self, data: st.DataObject, keep: bool) -> None:
        """A message arrives that nobody waits for, perhaps not for the last time."""
        n = data.draw(st.integers(0, len(self.delayed) - 1))
        host, call, message = self.delayed[n] if keep else self.delayed.pop(n)
        self.deliver(host, call, message)

    def step_is_harmless(self, trainer: int) -> bool:
        """No other trainer may void what a step would bake into the weights: that is not undone bit for bit."""
        other = 1 - trainer
        return not any(self.owed[other, h] for h in TWO) and not any(
            c.sent_to - {c.acknowledged} for c in self.open[other]
        )

    # Often enough: a history of commits alone has nothing to get wrong.
    @precondition(lambda self: sum(map(len, self.open)) >= 5)
    @rule(trainer=st.sampled_from(TWO), lost=st.sampled_from([None, None, None, 0, 1]), step=st.booleans())
    def commit(self, trainer: int, lost: int | None, step: bool) -> None:
        """Both hosts hear of it, unless one can't be reached at all; that one learns the voids with the next commit."""
        tokens = BATCH_TOKENS if step and lost is None and self.step_is_harmless(trainer) else 1
        calls, self.open[trainer] = self.open[trainer], []
        number, self.step[trainer] = self.step[trainer], self.step[trainer] + 1
        self.closed += calls
        for host in TWO:
            owed = self.owed[trainer, host]
            owed |= {c.id for c in calls if host in c.sent_to and c.acknowledged != host}
            if host == lost:
                continue
            message = CommitCall(trainer=str(trainer), step=number, tokens=tokens, void=tuple(sorted(owed)))
            answer = self.hosts[host].commit(message)
            assert answer.voided == self.oracles[host].void(owed)
            assert answer.void_failed == 0
            assert answer.stepped == self.oracles[host].commit(tokens)
            self.last_commit[trainer, host] = message, answer
            self.committed[trainer, host] = number
            owed.clear()
            mine = [c for c in self.closed if c.forward.trainer == str(trainer) and c.forward.step <= number]
            for call in mine:
                assert (call.id in self.oracles[host].added) == (call.acknowledged == host)

    @precondition(lambda self: self.last_commit and sum(map(len, self.open)) >= 3)
    @rule(data=st.data())
    def commit_again(self, data: st.DataObject) -> None:
        trainer, host = data.draw(st.sampled_from(sorted(self.last_commit)))
        message, answer = self.last_commit[trainer, host]
        again = self.hosts[host].commit(message)
        assert again.repeated
        assert (again.voided, again.void_failed) == (answer.voided, answer.void_failed)

    @rule(host=st.sampled_from(TWO), layer=st.sampled_from(LAYERS))
    def fetch(self, host: int, layer: int) -> None:
        state, expected = self.hosts[host].fetch(layer, ()), self.oracles[host].banks[layer]
        for slot, index in enumerate(expected.indices):
            for name, stack in zip(("g_in", "g_out"), expected._optimizer.grads, strict=True):
                if self.oracles[host].tokens:
                    assert torch.equal(state[f"{layer}.{index}.{name}"], stack[slot])

    @invariant()
    def sums_and_weights_are_those_of_the_oracle_bit_for_bit(self) -> None:
        for host, oracle in zip(self.hosts, self.oracles, strict=True):
            for mine, expected in zip(tensors(looked_at(host)), tensors(oracle.banks), strict=True):
                assert torch.equal(mine, expected)


Histories.TestCase.settings = settings(
    max_examples=250, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
test_each_acknowledged_gradient_is_in_exactly_one_replica_bit_for_bit = Histories.TestCase
