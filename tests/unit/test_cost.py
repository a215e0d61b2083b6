"""What one call may cost a host beside its message: a row is small beside what many experts make of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_net.errors import LimitError
from moe_net.experts import bank as bank_module
from moe_net.experts.bank import AT_ONCE_BYTES, ExpertBank
from moe_net.experts.checks import check_cost, pairs_bytes
from moe_net.experts.host import ExpertHost
from moe_net.optim import OptimizerConfig
from moe_net.types import ExpertShape
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitCall, ForwardAnswer, ForwardCall, RoutedRows

D, N_EXPERTS = 6, 5
SHAPE = ExpertShape(d_model=D, d_ff=4)
NUMBERS = itertools.count()


def new_host(*, at_once_bytes: int = AT_ONCE_BYTES, **settings: Any) -> ExpertHost:
    bank = ExpertBank(
        layer=0, indices=range(N_EXPERTS), shape=SHAPE, optimizer=OptimizerConfig(), global_batch_tokens=1000,
        run="test", seed=1, init_std=0.5, at_once_bytes=at_once_bytes,
    )  # fmt: skip
    return ExpertHost({0: bank}, **settings)


def rows_of(n_rows: int, n_experts: int) -> RoutedRows:
    draw = torch.Generator().manual_seed(n_rows)
    return RoutedRows(
        x_RD=torch.randn(n_rows, D, generator=draw),
        experts_per_row_R=torch.full((n_rows,), n_experts, dtype=torch.int32),
        expert_index_P=torch.arange(n_experts, dtype=torch.int32).repeat(n_rows),
        gate_P=torch.rand(n_rows * n_experts, generator=draw),
    )


def call(rows: RoutedRows) -> ForwardCall:
    return ForwardCall(call_id=next(NUMBERS).to_bytes(16, "big"), trainer="t", step=0, layer=0, rows=rows)


def backward_of(forward: ForwardCall) -> BackwardCall:
    grad_RD = torch.randn(forward.rows.x_RD.shape, generator=torch.Generator().manual_seed(7))
    return BackwardCall(call_id=forward.call_id, trainer="t", step=0, layer=0, grad_RD=grad_RD)


def sums(host: ExpertHost, *calls: ForwardCall) -> list[Tensor]:
    """The gradients of these calls."""
    host.commit(CommitCall(trainer="t", step=0, tokens=1, calls=tuple(call.call_id for call in calls)))
    return [value for name, value in sorted(host.fetch(0, ()).items()) if name.endswith(("g_in", "g_out"))]


def test_two_thousand_rows_of_eight_wide_experts_pass_and_three_million_pairs_do_not() -> None:
    wide = ExpertShape(d_model=4096, d_ff=14336)
    new_host().check_cost(rows_of(2048, N_EXPERTS))
    check_cost(rows_of(2048, 8), wide, new_host()._pairs_bytes)
    with pytest.raises(LimitError, match="65536 rows of up to 51 experts take 4278190080 bytes"):
        check_cost(rows_of(65536, 51), ExpertShape(d_model=64, d_ff=128), new_host()._pairs_bytes)


def test_a_row_of_many_experts_does_not_widen_the_rows_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty rows of an expert each, filled up to as many as one stranger's row has, would take as many times more."""
    host, alone = new_host(pairs_bytes=pairs_bytes(60, 2, SHAPE)), new_host()
    ran: list[tuple[int, int]] = []
    forward = ExpertBank.forward

    def noting_forward(self: ExpertBank, x: Tensor, slots: Tensor, gates: Tensor, *, keep: bool) -> Any:
        ran.append((slots.shape[0], slots.shape[1]))
        return forward(self, x, slots, gates, keep=keep)

    calls = [call(rows_of(n_rows, n_experts)) for n_rows, n_experts in ((30, 1), (30, 1), (1, 5), (20, 2))]
    backwards = [backward_of(one) for one in calls]
    with monkeypatch.context() as patch:
        patch.setattr(ExpertBank, "forward", noting_forward)
        answers = host.forward_many(calls)
    staged = host.backward_many(backwards)
    assert ran == [(60, 1), (21, 5)]
    groups: list[Sequence[int]] = [(0, 1), (2, 3)]
    for group in groups:
        expected = alone.forward_many([calls[i] for i in group])
        for i, other in zip(group, expected, strict=True):
            mine = answers[i]
            assert isinstance(mine, ForwardAnswer)
            assert isinstance(other, ForwardAnswer)
            assert torch.equal(mine.y_RD, other.y_RD)
        for i, other in zip(group, alone.backward_many([backwards[i] for i in group]), strict=True):
            mine = staged[i]
            assert isinstance(mine, BackwardAnswer)
            assert isinstance(other, BackwardAnswer)
            assert torch.equal(mine.dx_RD, other.dx_RD)
            assert torch.equal(mine.gate_grad_P, other.gate_grad_P)
    assert all(map(torch.equal, sums(host, *calls), sums(alone, *calls)))


def test_pre_activations_that_alone_exceed_the_cache_are_not_made() -> None:
    large, small = call(rows_of(200, 4)), call(rows_of(3, 1))
    host = new_host(stage_bytes=200 * 4 * SHAPE.d_hidden * 4 - 1)
    kept: list[bool] = []
    bank = host._banks[0]
    forward = bank.forward

    def noting(x: Tensor, slots: Tensor, gates: Tensor, *, keep: bool) -> Any:
        kept.append(keep)
        return forward(x, slots, gates, keep=keep)

    bank.forward = noting  # type: ignore[method-assign]
    for one in (large, small):
        host.forward_many([one])
    assert kept == [False, True]
    back = replace(backward_of(large), rows=large.rows)
    assert isinstance(host.backward_many([back])[0], BackwardAnswer)


def test_very_many_pairs_run_one_part_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(50, 4)
    parts, whole = new_host(at_once_bytes=pairs_bytes(20, 4, SHAPE)), new_host()
    sizes: list[int] = []
    forward, backward = bank_module.moe_ffn_forward, bank_module.moe_ffn_backward

    def noting_forward(x: Tensor, *more: Any, **options: Any) -> Any:
        sizes.append(x.shape[0])
        return forward(x, *more, **options)

    def noting_backward(dy: Tensor, *more: Any, **options: Any) -> Any:
        sizes.append(dy.shape[0])
        return backward(dy, *more, **options)

    asked = call(rows)
    (expected,), (expected_back,) = whole.forward_many([asked]), whole.backward_many([backward_of(asked)])
    monkeypatch.setattr(bank_module, "moe_ffn_forward", noting_forward)
    monkeypatch.setattr(bank_module, "moe_ffn_backward", noting_backward)
    (answer,), (back,) = parts.forward_many([asked]), parts.backward_many([backward_of(asked)])
    assert sizes == [20, 20, 10] * 2
    assert isinstance(answer, ForwardAnswer)
    assert isinstance(expected, ForwardAnswer)
    assert isinstance(back, BackwardAnswer)
    assert isinstance(expected_back, BackwardAnswer)
    torch.testing.assert_close(answer.y_RD, expected.y_RD)
    torch.testing.assert_close(back.dx_RD, expected_back.dx_RD)
    torch.testing.assert_close(back.gate_grad_P, expected_back.gate_grad_P)
    sizes.clear()
    torch.testing.assert_close(sums(parts, asked), sums(whole, asked))
    assert sizes == [20, 20, 10], "and again, for nothing was kept of them"
