"""What a step holds when trainers are not at the same step, and what one of them cannot do to the others."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moe_net.errors import ExpertCallError, UnknownExpertError, WireError
from moe_net.experts.bank import ExpertBank
from moe_net.experts.host import ExpertHost
from moe_net.optim import OptimizerConfig
from moe_net.types import ExpertShape
from moe_net.wire.messages import (
    BackwardAnswer,
    BackwardCall,
    CommitAnswer,
    CommitCall,
    ForwardAnswer,
    ForwardCall,
    RoutedRows,
)

D, N_EXPERTS, LAYERS = 6, 4, (0, 2)


def new_host(batch_tokens: int = 4) -> ExpertHost:
    return ExpertHost({
        layer: ExpertBank(
            layer=layer, indices=range(N_EXPERTS), shape=ExpertShape(d_model=D, d_ff=5),
            optimizer=OptimizerConfig(warmup_steps=0, learning_rate=0.01), global_batch_tokens=batch_tokens,
            run="test", seed=1, init_std=0.5,
        )
        for layer in LAYERS
    })  # fmt: skip


def rows_of(experts: Sequence[int], seed: int) -> RoutedRows:
    n_rows = len(experts)
    return RoutedRows(
        x_RD=torch.randn(n_rows, D, generator=torch.Generator().manual_seed(seed)),
        experts_per_row_R=torch.ones(n_rows, dtype=torch.int32),
        expert_index_P=torch.tensor(experts, dtype=torch.int32),
        gate_P=torch.ones(n_rows),
    )


def call_of(trainer: str, step: int, layer: int = 0, experts: Sequence[int] = (0, 1)) -> ForwardCall:
    seed = zlib.crc32(f"{trainer} {step} {layer}".encode())
    rows = rows_of(experts, seed)
    return ForwardCall(call_id=f"{trainer:>8}{step:8}".encode(), trainer=trainer, step=step, layer=layer, rows=rows)


def stage(host: ExpertHost, call: ForwardCall, *, scale: float = 1.0) -> BackwardAnswer | Exception:
    """Forward and backward of a call."""
    (answer,) = host.forward_many([call])
    if not isinstance(answer, ForwardAnswer):
        return answer
    (back,) = host.backward_many([
        BackwardCall(
            call_id=call.call_id, trainer=call.trainer, step=call.step, layer=call.layer,
            grad_RD=scale * torch.ones_like(call.rows.x_RD),
        )
    ])  # fmt: skip
    return back


def commit(host: ExpertHost, call: ForwardCall, tokens: int = 2) -> CommitAnswer:
    return host.commit(CommitCall(trainer=call.trainer, step=call.step, tokens=tokens, calls=(call.call_id,)))


def everything(host: ExpertHost) -> dict[str, Tensor]:
    return {name: value for layer in LAYERS for name, value in host.fetch(layer, (), with_sums=False).items()}


def assert_same(a: ExpertHost, b: ExpertHost) -> None:
    mine, other = everything(a), everything(b)
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("what", ["a trainer that is a step ahead", "a trainer that dies"])
def test_a_step_holds_nothing_that_nobody_committed(what: str) -> None:
    host, right = new_host(), new_host()
    a, b = call_of("a", 0), call_of("b", 0)
    ahead = call_of("a", 1) if what == "a trainer that is a step ahead" else call_of("c", 0)
    for each in (host, right):
        stage(each, a)
        stage(each, b)
        commit(each, a)
        if each is host:
            stage(each, ahead)
        assert commit(each, b).stepped
    assert_same(host, right)
    if ahead.trainer == "a":  # and then it counts
        for each in (host, right):
            if each is right:
                stage(each, ahead)
            assert commit(each, ahead, tokens=4).missing == ()
        assert host.versions[0] == dict.fromkeys(range(N_EXPERTS), 2)


HUGE = {
    "rows": lambda call: call.rows.x_RD.fill_(3e38),
    "one value": lambda call: call.rows.x_RD[0, 0].fill_(3e38),
    "rows whose norm overflows": lambda call: call.rows.x_RD.fill_(1e25),
    "gates": lambda call: call.rows.gate_P.fill_(3e38),
}


@pytest.mark.parametrize("scale", [1.0, 3e38, 1e25])
@pytest.mark.parametrize("what", [*HUGE, "grads"])
def test_values_that_are_huge_cost_their_own_trainer_its_gradient_and_nobody_else_a_step(
    what: str, scale: float
) -> None:
    """Several of them, too, which are finite one by one."""
    if what == "grads" and scale == 1.0:
        scale = -3e38
    host, right = new_host(), new_host()
    for step in range(150):
        sound = call_of("b", step)
        for each in (host, right):
            assert isinstance(stage(each, sound), BackwardAnswer)
        hostile = [call_of(name, step) for name in ("x", "y")]
        for call in hostile:
            if what in HUGE:
                HUGE[what](call)
            answer = stage(host, call, scale=scale)
            told = commit(host, call, tokens=1)
            assert isinstance(answer, ExpertCallError | WireError | BackwardAnswer)
            if isinstance(answer, BackwardAnswer):
                assert told.not_finite == (call.call_id,), "its trainer is told"
            else:
                assert told.missing == (call.call_id,)
            right.commit(CommitCall(trainer=call.trainer, step=step, tokens=1))
        for each in (host, right):
            assert commit(each, sound).stepped
    assert host.versions[0] == dict.fromkeys(range(N_EXPERTS), 150)
    assert_same(host, right)


def spoil(host: ExpertHost, index: int, value: float) -> None:
    host._banks[0]._weights.w_out_EFD[index, 0, 0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", ["before the forward", "before the backward"])
def test_an_expert_that_is_not_finite_costs_its_neighbours_nothing(when: str, value: float) -> None:
    host, right = new_host(), new_host()
    alone = call_of("a", 0, experts=(0, 2, 3))
    mixed = call_of("b", 0, experts=(0, 1, 3))
    expected = [right.forward_many([call])[0] for call in (alone, mixed)]
    if when == "before the forward":
        spoil(host, 1, value)
    answers = host.forward_many([alone, mixed])
    for answer, other in zip(answers, expected, strict=True):
        assert isinstance(answer, ForwardAnswer)
        assert isinstance(other, ForwardAnswer)
        rows = torch.tensor([0, 2])
        torch.testing.assert_close(answer.y_RD[rows], other.y_RD[rows])
    if when == "before the backward":
        spoil(host, 1, value)
    else:
        assert [answer.failed_experts for answer in answers if isinstance(answer, ForwardAnswer)] == [(), (1,)]
    for call in (alone, mixed):
        back = stage(host, call)
        assert isinstance(back, BackwardAnswer)
        assert back.dx_RD.isfinite().all()
    assert host.broken != ()
    (refused,) = host.forward_many([call_of("c", 0, experts=(1, 1))])
    assert isinstance(refused, UnknownExpertError)
    before = host.fetch(0, ())
    assert {name.split(".")[1] for name in before} == {"0", "2", "3"}, "its neighbours can be fetched"
    for call in (alone, mixed):
        assert commit(host, call).missing == ()
    assert host.versions[0] == {0: 1, 1: 0, 2: 1, 3: 1}
    state = right.fetch(0, (1,))
    host.replace_state(0, state)
    assert host.broken == ()
    assert isinstance(host.forward_many([call_of("c", 1, experts=(1, 1))])[0], ForwardAnswer)
