"""What trainers may do to each other through a host: calls of experts that break, floods, numbers at the edge."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence

import pytest
import torch

from moe_net.experts.bank import ExpertBank
from moe_net.experts.host import ExpertHost
from moe_net.experts.staging import ENTRY_OVERHEAD_BYTES, FORGET_AFTER_S, CallFacts, Staging
from moe_net.optim import OptimizerConfig
from moe_net.types import ExpertShape
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitCall, ForwardCall, RoutedRows

D = 4


def new_host(*, layers: Sequence[int] = (0,), batch_tokens: int = 100, stage_bytes: int = 1 << 20) -> ExpertHost:
    banks = {
        layer: ExpertBank(
            layer=layer, indices=(0, 1), shape=ExpertShape(d_model=D, d_ff=3), global_batch_tokens=batch_tokens,
            optimizer=OptimizerConfig(warmup_steps=0, learning_rate=0.1), run="test", seed=1, init_std=0.5,
        )
        for layer in layers
    }  # fmt: skip
    return ExpertHost(banks, stage_bytes=stage_bytes)


def stage(host: ExpertHost, number: int, expert: int, *, trainer: str = "a", step: int = 0, layer: int = 0,
          rows: int = 2, x: float = 1.0, grad: float = 1.0) -> bytes:  # fmt: skip
    """The id of a call that waits for its commit."""
    call_id = number.to_bytes(16, "big")
    routed = RoutedRows(
        x_RD=torch.full((rows, D), x), experts_per_row_R=torch.ones(rows, dtype=torch.int32),
        expert_index_P=torch.full((rows,), expert, dtype=torch.int32), gate_P=torch.ones(rows),
    )  # fmt: skip
    call = BackwardCall(
        call_id=call_id, trainer=trainer, step=step, layer=layer, grad_RD=torch.full((rows, D), grad), rows=routed
    )
    (answer,) = host.backward_many([call])
    assert isinstance(answer, BackwardAnswer), answer
    return call_id


def commit(host: ExpertHost, *calls: bytes, trainer: str = "a", step: int = 0, tokens: int = 10):
    return host.commit(CommitCall(trainer=trainer, step=step, tokens=tokens, calls=calls))


def break_expert(host: ExpertHost, expert: int) -> None:
    """A bit flips."""
    bank = host._banks[0]
    bank._weights.w_in_EDH[expert].fill_(float("nan"))
    assert bank.find_broken() == {expert}


def test_a_call_whose_experts_broke_before_its_commit_is_told_and_the_rest_of_the_commit_counts():
    host = new_host()
    first, broken, last = stage(host, 1, 1), stage(host, 2, 0), stage(host, 3, 1)
    break_expert(host, 0)
    answer = commit(host, first, broken, last)
    assert answer.missing == (broken,)
    assert host.committed_tokens == 10
    commit(host, step=1, tokens=90)
    assert host._staging.n_bytes == 0
    assert host.versions[0][1] == 1


def test_a_trainer_that_never_committed_makes_room_for_another_once_it_was_silent_for_long():
    book: Staging[str, str, str, str] = Staging(limit_bytes=1 << 20, max_trainers=1)
    book.keep(b"1", CallFacts(trainer="silent", step=0, layer=0, n_rows=1), "x", 10)
    book.advance(FORGET_AFTER_S + 1)
    assert book.keep(b"2", CallFacts(trainer="new", step=0, layer=0, n_rows=1), "x", 10)
    assert book.n_calls == 1


def test_what_is_remembered_of_a_commit_does_not_grow_with_the_calls_it_names_in_vain():
    host = new_host(batch_tokens=10**9)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for n in range(20):
            names = tuple((n * 8192 + i).to_bytes(16, "big") for i in range(8192))
            assert commit(host, *names, trainer=f"t{n}", tokens=0).missing == names
            again = commit(host, *names, trainer=f"t{n}", tokens=0)
            assert again.repeated
            assert again.missing == names
            del names, again
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / 20 < 4096


def test_room_made_of_very_many_small_calls_takes_time_by_the_calls_alone():
    size = 976 + ENTRY_OVERHEAD_BYTES

    def seconds(n_trainers: int, n_calls: int, silent: bool) -> float:
        book: Staging[str, str, str, str] = Staging(limit_bytes=n_calls * size)
        for n in range(n_trainers):
            book.commit(f"t{n}", 0, ())
        facts = CallFacts(trainer="flood", step=0, layer=0, n_rows=1)
        for n in range(n_calls):
            call_id = n.to_bytes(16, "big")
            book.stage(call_id, book.find(call_id, facts, "x", input_bytes=0, grad_bytes=0), "g", 976)
        if silent:
            book.advance(1000.0)
        mine = CallFacts(trainer="t1", step=1, layer=0, n_rows=1)
        began = time.perf_counter()
        book.find(b"mine", mine, "x", input_bytes=0, grad_bytes=(n_calls // 4) * size)
        return time.perf_counter() - began

    for silent in (False, True):
        few, many = seconds(10, 4000, silent), seconds(10_000, 4000, silent)
        assert many < 10 * few + 0.05


def test_sums_that_cannot_be_made_keep_the_calls_and_their_bytes(monkeypatch: pytest.MonkeyPatch):
    host = new_host(stage_bytes=40_000)
    ids = [stage(host, n, 0, rows=2) for n in range(4)]
    bank = host._banks[0]

    def fail(_commits: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(bank, "gradients", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            commit(host, *ids)
    assert commit(host, *ids).missing == ()
    commit(host, step=1, tokens=90)
    assert host._staging.n_bytes == 0
    assert host.versions[0][0] == 1
    assert host._banks[0]._optimizer.m[0][0].abs().sum() > 0, "the calls counted nothing"


def test_a_step_that_fails_leaves_the_commit_that_met_it_to_be_sent_again(monkeypatch: pytest.MonkeyPatch):
    host = new_host(layers=(0, 1))
    call = stage(host, 1, 0)
    _, closed = host.begin_commit(CommitCall(trainer="a", step=0, tokens=100, calls=(call,)))
    assert closed is not None
    host.defer(closed)
    later = stage(host, 2, 0, step=1, layer=1)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(host._banks[0], "make", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            commit(host, later, step=1, tokens=100)
    answer = commit(host, later, step=1, tokens=100)
    assert answer.stepped
    assert answer.missing == ()
    assert host.committed_tokens == 0


def test_steps_that_are_due_do_not_change_how_the_next_batch_is_added_up():
    host = new_host(stage_bytes=60_000, batch_tokens=100)
    ids = [stage(host, n, 0) for n in range(7)]
    small = stage(host, 20, 0, trainer="b", step=0)
    _, closed = host.begin_commit(CommitCall(trainer="a", step=0, tokens=100, calls=tuple(ids)))
    assert closed is not None
    host.defer(closed)
    commit(host, small, trainer="b", tokens=1)
    assert host._banks[0]._base is None, "folded, for bytes of a step that was due"


def test_a_row_that_is_not_finite_has_only_its_own_experts_weights_looked_at():
    host = new_host()
    host._banks[0]._weights.w_in_EDH[1].fill_(float("nan"))
    call_id = bytes(16)
    routed = RoutedRows(
        x_RD=torch.full((1, D), 1e30), experts_per_row_R=torch.ones(1, dtype=torch.int32),
        expert_index_P=torch.zeros(1, dtype=torch.int32), gate_P=torch.ones(1),
    )  # fmt: skip
    host.forward_many([ForwardCall(call_id=call_id, trainer="a", step=0, layer=0, rows=routed)])
    assert host.broken == ()
