"""What a step holds when trainers are not at the same step, and what one of them cannot do to the others."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_net.errors import ExpertCallError, UnknownExpertError, WireError
from moe_net.experts.bank import ExpertBank
from moe_net.experts.host import ExpertHost
from moe_net.optim import OptimizerConfig
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
    "gates of rows of zeros": lambda call: (call.rows.x_RD.zero_(), call.rows.gate_P.fill_(3e38)),
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


def backward_with_inputs(call: ForwardCall, grad: float) -> BackwardCall:
    return BackwardCall(
        call_id=call.call_id, trainer=call.trainer, step=call.step, layer=call.layer,
        grad_RD=torch.full_like(call.rows.x_RD, grad), rows=call.rows,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("x", "gate", "grad"),
    [
        (1e6, 3e38, 1e-29),
        (0.0, 3e38, 1e18),
        (0.0, 1e30, 1e15),
        (1e-29, 3e38, 1e10),
        (1e14, 1e10, 1e-25),
        (1e5, 1, 1e20),
    ],
)
def test_values_whose_squares_or_products_leave_fp32_cost_nobody_else_a_step(
    x: float, gate: float, grad: float
) -> None:
    """Inputs that no Forward has seen."""
    host, right = new_host(), new_host()
    hostile, sound = call_of("x", 0), call_of("b", 0)
    hostile.rows.x_RD.fill_(x)
    hostile.rows.gate_P.fill_(gate)
    (answer,) = host.backward_many([backward_with_inputs(hostile, grad)])
    told = commit(host, hostile, tokens=2)
    assert {*told.missing, *told.not_finite} == {hostile.call_id}
    assert (told.missing == ()) == isinstance(answer, BackwardAnswer)
    right.commit(CommitCall(trainer="x", step=0, tokens=2))
    for each in (host, right):
        stage(each, sound)
        assert commit(each, sound).stepped
    assert_same(host, right)


def test_many_gradients_that_are_just_small_enough_make_a_step() -> None:
    host = new_host(batch_tokens=1000)
    for n in range(1000):
        call = call_of(f"x{n}", 0)
        call.rows.x_RD.fill_(1.0)
        host.backward_many([backward_with_inputs(call, 1e13)])
        assert commit(host, call, tokens=1).not_finite == ()
    assert host.versions[0] == dict.fromkeys(range(N_EXPERTS), 1)
    assert all(value.isfinite().all() for value in everything(host).values())


def test_a_gradient_that_grows_past_all_bounds_after_its_backward_costs_nobody_else_a_step() -> None:
    """Rows that an expert does not see, until it has made a step."""
    width = 24

    def new() -> ExpertHost:
        bank = ExpertBank(
            layer=0, indices=range(2), shape=ExpertShape(d_model=width, d_ff=4),
            optimizer=OptimizerConfig(warmup_steps=0, learning_rate=0.01), global_batch_tokens=4,
            run="test", seed=1, init_std=0.5,
        )  # fmt: skip
        return ExpertHost({0: bank})

    def backward(host: ExpertHost, trainer: str, step: int, x_RD: Tensor, experts: list[int], grad: float) -> bytes:
        rows = RoutedRows(
            x_RD=x_RD,
            experts_per_row_R=torch.ones(len(experts), dtype=torch.int32),
            expert_index_P=torch.tensor(experts, dtype=torch.int32),
            gate_P=torch.ones(len(experts)),
        )
        call = ForwardCall(call_id=f"{trainer:>8}{step:8}".encode(), trainer=trainer, step=step, layer=0, rows=rows)
        (answer,) = host.backward_many([backward_with_inputs(call, grad)])
        assert isinstance(answer, BackwardAnswer)
        return call.call_id

    host, right = new(), new()
    q_DD, _ = torch.linalg.qr(host._banks[0]._weights.w_in_EDH[0].double(), mode="complete")
    unseen_RD = torch.stack([4e13 * q_DD[:, -1], torch.zeros(width)]).float()
    values = torch.Generator().manual_seed(0)
    sound = [torch.randn(4, width, generator=values) for _ in range(2)]
    hostile = backward(host, "x", 0, unseen_RD, [0, 1], 1e-6)
    for step, x_RD in enumerate(sound):
        for each in (host, right):
            call_id = backward(each, "b", step, x_RD, [0, 1, 0, 1], 1.0)
            if each is host and step == 1:
                told = each.commit(CommitCall(trainer="x", step=0, tokens=0, calls=(hostile,)))
                assert (told.missing, told.not_finite) == ((), ()), "it was in bounds"
            assert each.commit(CommitCall(trainer="b", step=step, tokens=4, calls=(call_id,))).stepped
    assert host.versions[0] == {0: 2, 1: 2}
    state, expected = (each.fetch(0, (), with_sums=False) for each in (host, right))
    assert all(torch.equal(state[name], value) for name, value in expected.items() if "lineage" not in name)


def test_a_huge_row_changes_no_bit_of_what_others_get_that_ran_with_it() -> None:
    host, right = new_host(), new_host()
    hostile, sound = call_of("x", 0), call_of("b", 0)
    hostile.rows.x_RD[0] = 3e38
    refused, mine = host.forward_many([hostile, sound])
    _, expected = right.forward_many([call_of("x", 0), sound])
    assert isinstance(refused, WireError)
    assert isinstance(mine, ForwardAnswer)
    assert isinstance(expected, ForwardAnswer)
    assert torch.equal(mine.y_RD, expected.y_RD)
    assert host.broken == ()


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
    assert host.versions[2] == dict.fromkeys(range(N_EXPERTS), 1), "other layers step"
    repairing = right.fetch(0, (1,))
    if when == "before the forward":
        host.replace_state(0, repairing)
    else:
        assert host.load_state(repairing) == 1
    assert host.broken == ()
    again = call_of("c", 1, experts=(1, 1))
    mine, expected = (each.forward_many([again])[0] for each in (host, right))
    assert isinstance(mine, ForwardAnswer)
    assert isinstance(expected, ForwardAnswer)
    assert torch.equal(mine.y_RD, expected.y_RD)
    assert isinstance(stage(host, again), BackwardAnswer)
    assert commit(host, again, tokens=4).stepped
    assert host.versions[0][1] == 1, "it steps again"


def test_neighbours_of_a_broken_expert_step_as_if_it_were_sound() -> None:
    host, right = new_host(batch_tokens=6), new_host(batch_tokens=6)
    calls = [call_of("a", 0, experts=(0, 1, 2, 1)), call_of("b", 0, experts=(1, 3)), call_of("c", 0, layer=2)]
    for each in (host, right):
        for call in calls:
            stage(each, call)
        if each is host:
            spoil(host, 1, float("nan"))
            host.forward_many([call_of("z", 0, experts=(0, 1))])  # somebody finds out
            assert host.broken == (ExpertId(0, 1),)
        assert [commit(each, call).missing for call in calls] == [(), (), ()]
    mine, expected = everything(host), everything(right)
    assert mine.keys() == {name for name in expected if not name.startswith("0.1.")}
    assert all(torch.equal(value, expected[name]) for name, value in mine.items())


@pytest.mark.parametrize("found", ["before the commit", "after the commit", "never"])
def test_an_expert_that_breaks_after_a_backward_costs_others_nothing_and_the_commit_counts(found: str) -> None:
    host, right = new_host(batch_tokens=6), new_host(batch_tokens=6)
    lost, other, sound = call_of("a", 0, experts=(1, 1)), call_of("a", 0, layer=2), call_of("b", 0, experts=(0, 2))
    other = replace(other, call_id=b"of another layer")
    finding = call_of("z", 0, experts=(0, 1))
    named = CommitCall(trainer="a", step=0, tokens=4, calls=(lost.call_id, other.call_id))
    for call in (lost, other, sound):
        stage(host, call)
    spoil(host, 1, float("nan"))
    if found == "before the commit":
        host.forward_many([finding])
    told = host.commit(named)
    assert told.committed_tokens == 4
    assert told.missing == ((lost.call_id,) if found == "before the commit" else ())
    if found == "after the commit":
        host.forward_many([finding])
    assert commit(host, sound).stepped
    assert host._staging.n_bytes == (host._staging._calls[finding.call_id].n_bytes if found != "never" else 0)
    for call in (other, sound):
        stage(right, call)
    right.commit(replace(named, calls=(other.call_id,)))
    commit(right, sound)
    mine, expected = everything(host), everything(right)
    assert mine.keys() == {name for name in expected if not name.startswith("0.1.")}
    assert all(torch.equal(value, expected[name]) for name, value in mine.items())
