"""An expert host against single experts written out, its merging against single calls, its refusals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_net.errors import BusyError, InputsGoneError, StaleStepError, UnknownExpertError, WireError
from moe_net.experts.bank import ExpertBank
from moe_net.experts.host import ExpertHost
from moe_net.experts.merging import pad_pairs
from moe_net.experts.staging import ENTRY_OVERHEAD_BYTES, FORGET_AFTER_S, Staging
from moe_net.kernels.types import Saved
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

D, F_ = 6, 5
SHAPE = ExpertShape(d_model=D, d_ff=F_)
HOSTED = (0, 1, 3)
NUMBERS = itertools.count()


def new_bank(layer: int = 0, *, batch_tokens: int = 1000, std: float = 0.5) -> ExpertBank:
    return ExpertBank(
        layer=layer, indices=HOSTED, shape=SHAPE, optimizer=OptimizerConfig(warmup_steps=0, learning_rate=0.1),
        global_batch_tokens=batch_tokens, run="test", seed=1, init_std=std,
    )  # fmt: skip


def new_host(*, stage_bytes: int = 1 << 24, batch_tokens: int = 1000) -> ExpertHost:
    banks = {layer: new_bank(layer, batch_tokens=batch_tokens) for layer in (0, 2)}
    return ExpertHost(banks, stage_bytes=stage_bytes)


def rows_of(experts: Sequence[Sequence[int]], seed: int = 0) -> RoutedRows:
    draw = torch.Generator().manual_seed(seed)
    flat = [e for row in experts for e in row]
    return RoutedRows(
        x_RD=torch.randn(len(experts), D, generator=draw),
        experts_per_row_R=torch.tensor([len(row) for row in experts], dtype=torch.int32),
        expert_index_P=torch.tensor(flat, dtype=torch.int32),
        gate_P=torch.rand(len(flat), generator=draw) + 0.1,
    )


def forward_call(experts: Sequence[Sequence[int]], *, layer: int = 0, step: int = 0, seed: int = 0) -> ForwardCall:
    call_id = next(NUMBERS).to_bytes(16, "big")
    return ForwardCall(call_id=call_id, trainer="t", step=step, layer=layer, rows=rows_of(experts, seed))


def backward_call(of: ForwardCall, *, resend: bool = False) -> BackwardCall:
    grad = torch.randn(of.rows.x_RD.shape, generator=torch.Generator().manual_seed(7))
    return BackwardCall(
        call_id=of.call_id, trainer=of.trainer, step=of.step, layer=of.layer, grad_RD=grad,
        rows=of.rows if resend else None,
    )  # fmt: skip


def forward(host: ExpertHost, *calls: ForwardCall) -> list[ForwardAnswer]:
    answers = host.forward_many(calls)
    assert all(isinstance(a, ForwardAnswer) for a in answers), answers
    return [a for a in answers if isinstance(a, ForwardAnswer)]


def backward(host: ExpertHost, *calls: BackwardCall) -> list[BackwardAnswer]:
    answers = host.backward_many(calls)
    assert all(isinstance(a, BackwardAnswer) for a in answers), answers
    return [a for a in answers if isinstance(a, BackwardAnswer)]


def commit(host: ExpertHost, *calls: ForwardCall | BackwardCall, step: int = 0, tokens: int = 1) -> CommitAnswer:
    return host.commit(CommitCall(trainer="t", step=step, tokens=tokens, calls=tuple(call.call_id for call in calls)))


def grad_sums(host: ExpertHost) -> Tensor:
    """The gradients of all that was committed towards the next step, in one vector; of layers with none zeros."""
    state = {n: v for layer in host.versions for n, v in host.fetch(layer, ()).items()}
    return torch.cat([v.flatten() for n, v in sorted(state.items()) if n.split(".")[2] in ("g_in", "g_out")])


def exact(
    rows: RoutedRows, grad_RD: Tensor, hosted: Sequence[int] = HOSTED
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(y, dx, dgate, weight gradients) by autograd, pair by pair."""
    state = {n: v.requires_grad_() for n, v in new_bank().state().items() if n.split(".")[2] in ("w_in", "w_out")}
    x_RD = rows.x_RD.clone().requires_grad_()
    gate_P = rows.gate_P.clone().requires_grad_()
    pair = 0
    sums: list[Tensor] = []
    for r, count in enumerate(rows.experts_per_row_R.tolist()):
        y = torch.zeros(D)
        for _ in range(count):
            e = int(rows.expert_index_P[pair])
            if e in hosted:
                gate, up = (x_RD[r] @ state[f"0.{e}.w_in"]).chunk(2)
                y = y + gate_P[pair] * ((F.silu(gate) * up) @ state[f"0.{e}.w_out"])
            pair += 1
        sums.append(y)
    y_RD = torch.stack(sums)
    (y_RD * grad_RD).sum().backward()
    grads = {n: v.grad if v.grad is not None else torch.zeros_like(v) for n, v in state.items()}
    assert x_RD.grad is not None
    assert gate_P.grad is not None
    return y_RD.detach(), x_RD.grad, gate_P.grad, grads


MIXED = [[0, 3], [1], [3, 1, 0], [0]]


@pytest.mark.parametrize("experts", [MIXED, [[0, 1], [1, 3], [3, 0]], [[1]]], ids=["ragged", "top-2", "one"])
@pytest.mark.parametrize("resend", [False, True])
def test_values_and_all_gradients_equal_the_experts_written_out(experts: list[list[int]], resend: bool) -> None:
    host = new_host()
    call = forward_call(experts)
    if resend:
        call = replace(call, train=False)  # keeps nothing
    back = backward_call(call, resend=resend)
    y_RD, dx_RD, dgate_P, grads = exact(call.rows, back.grad_RD)
    (answer,) = forward(host, call)
    torch.testing.assert_close(answer.y_RD, y_RD)
    (result,) = backward(host, back)
    torch.testing.assert_close(result.dx_RD, dx_RD)
    torch.testing.assert_close(result.gate_grad_P, dgate_P)
    commit(host, back)
    state = host.fetch(0, ())
    for e in HOSTED:
        torch.testing.assert_close(state[f"0.{e}.g_in"], grads[f"0.{e}.w_in"])
        torch.testing.assert_close(state[f"0.{e}.g_out"], grads[f"0.{e}.w_out"])
    used = {e for row in experts for e in row}
    assert answer.versions == result.versions == dict.fromkeys(sorted(used), 0)


def test_experts_not_hosted_leave_the_sum_and_are_named() -> None:
    host = new_host()
    call = forward_call([[0, 2], [9, 3], [2, 9]])
    back = backward_call(call)
    y_RD, dx_RD, dgate_P, _ = exact(call.rows, back.grad_RD)
    (answer,) = forward(host, call)
    assert answer.failed_experts == (2, 9)
    assert answer.versions == {0: 0, 3: 0}
    torch.testing.assert_close(answer.y_RD, y_RD)
    (result,) = backward(host, back)
    torch.testing.assert_close(result.dx_RD, dx_RD)
    torch.testing.assert_close(result.gate_grad_P, dgate_P)
    assert result.gate_grad_P[[1, 2, 4, 5]].abs().max() == 0


def test_merged_calls_get_what_they_would_get_alone() -> None:
    calls = [forward_call(MIXED, seed=1), forward_call([[0, 1], [3, 1]], seed=2), forward_call([[1, 2]], seed=3)]
    alone, together = new_host(), new_host()
    for one, merged in zip([forward(alone, c)[0] for c in calls], forward(together, *calls), strict=True):
        torch.testing.assert_close(merged.y_RD, one.y_RD)
        assert (merged.failed_experts, merged.versions) == (one.failed_experts, one.versions)
    backs = [backward_call(c) for c in calls]
    for one, merged in zip([backward(alone, b)[0] for b in backs], backward(together, *backs), strict=True):
        torch.testing.assert_close(merged.dx_RD, one.dx_RD)
        torch.testing.assert_close(merged.gate_grad_P, one.gate_grad_P)
    commit(alone, *backs)
    commit(together, *backs)
    assert torch.equal(grad_sums(together), grad_sums(alone))


def test_one_bad_call_does_not_hurt_those_merged_with_it() -> None:
    host, alone = new_host(), new_host()
    good = [forward_call(MIXED), forward_call([[1]])]
    wide = replace(good[0], call_id=b"w" * 16, rows=replace(good[0].rows, x_RD=torch.zeros(4, D + 1)))
    uneven = replace(good[0], call_id=b"u" * 16, rows=replace(good[0].rows, gate_P=torch.ones(2)))
    strange = forward_call([[7], [8, 9]])
    answers = host.forward_many([wide, good[0], strange, uneven, good[1]])
    kinds = [type(a) for a in answers]
    assert kinds == [WireError, ForwardAnswer, UnknownExpertError, WireError, ForwardAnswer]
    backs = [backward_call(c) for c in good]
    gone = backward_call(forward_call([[0]]))
    stale = replace(backward_call(good[1]), call_id=b"s" * 16, step=0, trainer="other")
    host.commit(CommitCall(trainer="other", step=0, tokens=0))
    results = host.backward_many([gone, backs[0], stale, backs[1]])
    assert [type(r) for r in results] == [InputsGoneError, BackwardAnswer, StaleStepError, BackwardAnswer]
    forward(alone, *good)
    backward(alone, *backs)
    for each in (host, alone):
        assert commit(each, *backs).missing == ()
    assert torch.equal(grad_sums(host), grad_sums(alone))


def test_equal_call_ids_within_one_batch_run_once() -> None:
    host, once = new_host(), new_host()
    call = forward_call(MIXED)
    first, second = forward(host, call, call)
    assert torch.equal(first.y_RD, second.y_RD)
    back = backward_call(call)
    one, two = backward(host, back, back)
    assert torch.equal(one.dx_RD, two.dx_RD)
    forward(once, call)
    backward(once, back)
    for each in (host, once):
        commit(each, back)
    assert torch.equal(grad_sums(host), grad_sums(once))
    other = replace(call, trainer="u")
    assert isinstance(new_host().forward_many([call, other])[1], WireError)


@pytest.mark.parametrize("resend", [False, True])
def test_a_retry_gets_the_same_answer_and_counts_once(resend: bool) -> None:
    host, once = new_host(), new_host()
    call = forward_call(MIXED)
    for each in (host, once):
        forward(each, call)
        (first,) = backward(each, backward_call(call))
    (again,) = backward(host, backward_call(call, resend=resend))
    assert torch.equal(again.dx_RD, first.dx_RD)
    assert torch.equal(again.gate_grad_P, first.gate_grad_P)
    for each in (host, once):
        commit(each, call)
    assert torch.equal(grad_sums(host), grad_sums(once))


def test_only_calls_that_are_named_count_and_each_once() -> None:
    host, other = new_host(batch_tokens=1), new_host(batch_tokens=1)
    used, unused, strange = forward_call(MIXED, seed=1), forward_call([[1, 3]], seed=2), forward_call([[0]])
    for each, calls in ((host, (used, unused)), (other, (used,))):
        forward(each, *calls)
        backward(each, *(backward_call(call) for call in calls))
    answer = commit(host, used, strange, used)
    assert (answer.missing, answer.not_finite, answer.stepped) == ((strange.call_id,), (), True)
    commit(other, used)
    for layer in (0, 2):
        state, expected = host.fetch(layer, ()), other.fetch(layer, ())
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert host._staging.n_bytes == 0
    (late,) = host.backward_many([backward_call(unused, resend=True)])
    assert isinstance(late, StaleStepError)


def test_the_order_in_which_commits_and_calls_come_changes_no_bit() -> None:
    calls = [
        replace(forward_call([[e, (e + 1) % 2]], seed=seed), trainer=trainer)
        for seed, (e, trainer) in enumerate(itertools.product((0, 1), ("a", "b", "c")))
    ]
    of = {trainer: tuple(call.call_id for call in calls if call.trainer == trainer) for trainer in "abc"}
    states: list[dict[str, Tensor]] = []
    for order in ("abc", "cab"):
        host = new_host(batch_tokens=3)
        for call in calls if order == "abc" else reversed(calls):
            forward(host, call)
            backward(host, backward_call(call))
        for trainer in order:
            answer = host.commit(CommitCall(trainer=trainer, step=0, tokens=1, calls=of[trainer]))
        assert answer.stepped
        states.append(host.fetch(0, ()))
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_a_batch_for_which_there_is_no_room_is_summed_up_early() -> None:
    small, large = new_host(stage_bytes=1 << 15, batch_tokens=40), new_host(batch_tokens=40)
    for step in range(40):
        call = forward_call([[0, 1], [3, 1]], step=step, seed=step)
        for host in (small, large):
            forward(host, call)
            backward(host, backward_call(call))
            assert commit(host, call, step=step).missing == ()
        assert small._staging.n_bytes <= 1 << 15
    for name, value in large.fetch(0, ()).items():
        torch.testing.assert_close(small.fetch(0, ())[name], value)
    assert small.versions == large.versions
    assert small.versions[0][0] == 1


def test_layers_whose_step_is_due_make_it_before_anything_else_happens_there() -> None:
    host, at_once = new_host(batch_tokens=1), new_host(batch_tokens=1)
    calls = [forward_call([[0, 1]], layer=layer) for layer in (0, 2)]
    for each in (host, at_once):
        for call in calls:
            forward(each, call)
            backward(each, backward_call(call))
    commit(at_once, *calls)
    answer, closed = host.begin_commit(
        CommitCall(trainer="t", step=0, tokens=1, calls=tuple(call.call_id for call in calls))
    )
    assert answer.stepped
    assert closed is not None
    host.defer(closed)
    assert host.versions == {layer: dict.fromkeys(HOSTED, 0) for layer in (0, 2)}
    later = forward_call([[0, 1]], layer=2, step=1)
    assert torch.equal(forward(host, later)[0].y_RD, forward(at_once, later)[0].y_RD)
    assert host.versions == {0: dict.fromkeys(HOSTED, 0), 2: dict.fromkeys(HOSTED, 1)}
    assert not host.make_next()
    for layer in (0, 2):
        assert all(torch.equal(host.fetch(layer, ())[n], v) for n, v in at_once.fetch(layer, ()).items())


def test_pre_activations_of_a_single_call_are_used_and_inputs_are_not_copied() -> None:
    host = new_host()
    call = forward_call([[0, 1], [1, 3]])
    forward(host, call)
    kept = host._staging._calls[call.call_id]
    assert kept.inputs is call.rows
    assert kept.extra is not None
    assert isinstance(kept.extra.kernel, Saved)
    # Poisoned on purpose: the gradient must come from what was saved.
    for h_nH in kept.extra.kernel.blocks:
        h_nH.zero_()
    (result,) = backward(host, backward_call(call))
    assert result.dx_RD.abs().max() == 0


def test_a_commit_steps_every_layer_once_the_batch_is_complete() -> None:
    host = new_host(batch_tokens=10)
    call = forward_call([[0]])
    forward(host, call)
    backward(host, backward_call(call))
    first = commit(host, call, tokens=6)
    assert (first.repeated, first.stepped, first.committed_tokens) == (False, False, 6)
    again = host.commit(CommitCall(trainer="t", step=0, tokens=6))
    assert (again.repeated, again.stepped, again.committed_tokens) == (True, False, 6)
    other = host.commit(CommitCall(trainer="u", step=0, tokens=4))
    assert (other.repeated, other.stepped, other.committed_tokens) == (False, True, 0)
    assert host.versions == {layer: dict.fromkeys(HOSTED, 1) for layer in (0, 2)}
    (answer,) = forward(host, forward_call([[0, 3]], step=1))
    assert answer.versions == {0: 1, 3: 1}
    late = host.backward_many([backward_call(call, resend=True)])[0]
    assert isinstance(late, StaleStepError)


def test_evaluation_leaves_nothing_behind() -> None:
    host = new_host()
    call = replace(forward_call(MIXED), train=False)
    forward(host, call)
    assert isinstance(host.backward_many([backward_call(call)])[0], InputsGoneError)


def test_unknown_layers_and_a_full_book_are_answers() -> None:
    host = new_host()
    call = forward_call([[0]], layer=1)
    assert isinstance(host.forward_many([call])[0], UnknownExpertError)
    assert isinstance(host.backward_many([backward_call(call, resend=True)])[0], UnknownExpertError)
    with pytest.raises(UnknownExpertError, match="layer 1"):
        host.fetch(1, ())
    with pytest.raises(UnknownExpertError, match="experts 2 of layer 0"):
        host.fetch(0, (0, 2))
    with pytest.raises(WireError, match="negative"):
        host.commit(CommitCall(trainer="t", step=0, tokens=-1))
    full = ExpertHost({0: new_bank()}, stage_bytes=3 * ENTRY_OVERHEAD_BYTES)
    calls = [forward_call([[0]]), forward_call([[1]]), forward_call([[1]])]
    answers = [full.backward_many([backward_call(c, resend=True)])[0] for c in calls]
    assert [type(a) for a in answers] == [BackwardAnswer, BackwardAnswer, BusyError]


@pytest.mark.parametrize("tokens", [11, 2**63, 2**64 - 1])
def test_a_commit_of_more_tokens_than_the_batch_is_refused_and_closes_nothing(tokens: int) -> None:
    host = new_host(batch_tokens=10)
    call = forward_call([[0]])
    forward(host, call)
    with pytest.raises(WireError, match=f"{tokens}, but the run's global_batch_tokens, of all trainers, is 10"):
        host.commit(CommitCall(trainer="t", step=0, tokens=tokens))
    assert host.committed_tokens == 0
    backward(host, backward_call(call))
    assert host.commit(CommitCall(trainer="t", step=0, tokens=10)).stepped


def test_a_host_forgets_who_has_been_silent_for_an_hour_when_it_needs_the_room() -> None:
    now_s = 1000.0
    staging: Any = Staging(limit_bytes=1 << 20, max_trainers=1)
    host = ExpertHost({0: new_bank()}, staging=staging, clock=lambda: now_s)
    host.commit(CommitCall(trainer="silent", step=0, tokens=1))
    with pytest.raises(BusyError):
        host.commit(CommitCall(trainer="new", step=0, tokens=1))
    now_s += FORGET_AFTER_S
    assert not host.commit(CommitCall(trainer="new", step=0, tokens=1)).repeated
    now_s += FORGET_AFTER_S
    call = replace(forward_call([[0]]), trainer="newest")
    forward(host, call)
    backward(host, replace(backward_call(call), trainer="newest"))
    assert staging.n_trainers == 1


def test_state_goes_from_one_host_to_another() -> None:
    source, target = new_host(batch_tokens=1), new_host()
    call = forward_call(MIXED)
    forward(source, call)
    backward(source, backward_call(call))
    commit(source, call)
    state = source.fetch(0, ()) | source.fetch(2, (3,))
    assert target.load_state(state | {"9.0.w_in": torch.zeros(1)}) == 4
    for name, value in target.fetch(0, ()).items():
        assert torch.equal(value, source.fetch(0, ())[name])
    assert target.versions == {0: dict.fromkeys(HOSTED, 1), 2: {0: 0, 1: 0, 3: 1}}


@given(counts=st.lists(st.integers(1, 4), max_size=8))
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_padding_keeps_every_pair_in_its_row_and_order(counts: list[int]) -> None:
    count_R = torch.tensor(counts, dtype=torch.int32)
    n_pairs = sum(counts)
    slot_RK, gate_RK, filled = pad_pairs(count_R, torch.arange(n_pairs), torch.arange(n_pairs) + 0.5)
    assert slot_RK.shape == gate_RK.shape
    ids = iter(range(n_pairs))
    expected = [[next(ids) for _ in range(count)] for count in counts]
    assert [[s for s in row if s >= 0] for row in slot_RK.tolist()] == expected
    assert [
        [g for g, s in zip(gs, ss, strict=True) if s >= 0]
        for gs, ss in zip(gate_RK.tolist(), slot_RK.tolist(), strict=True)
    ] == [[i + 0.5 for i in row] for row in expected]
    if filled is not None:
        assert torch.equal(slot_RK[filled], torch.arange(n_pairs))


def test_a_host_needs_experts_of_one_shape() -> None:
    with pytest.raises(ValueError, match="at least one bank"):
        ExpertHost({})
    other = ExpertBank(
        layer=1, indices=[0], shape=ExpertShape(d_model=D, d_ff=9), optimizer=OptimizerConfig(),
        global_batch_tokens=1, run="test", seed=1, init_std=0.02,
    )  # fmt: skip
    with pytest.raises(ValueError, match="one shape"):
        ExpertHost({0: new_bank(), 1: other})
