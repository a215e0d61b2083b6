"""Taking a gradient out again: bit for bit from the journal, up to rounding without it, counted when impossible."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_net.experts.bank import ExpertBank
from moe_net.experts.callbook import ENTRY_OVERHEAD_BYTES, CallFacts
from moe_net.experts.host import ExpertHost
from moe_net.experts.journal import Journal, Undo
from moe_net.experts.voiding import READING_S, READING_SHARE
from moe_net.optim import OptimizerConfig
from moe_net.types import ExpertShape
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitAnswer, CommitCall, RoutedRows

D = 6
NUMBERS = itertools.count()


def facts(trainer: str = "t", step: int = 0, layer: int = 0) -> CallFacts:
    return CallFacts(trainer=trainer, step=step, layer=layer, n_rows=1)


def filled(*names: str, limit_entries: int = 99) -> Journal[str, str]:
    journal: Journal[str, str] = Journal(limit_bytes=limit_entries * (ENTRY_OVERHEAD_BYTES + 10))
    for dispatch, name in enumerate(names):
        journal.add(name.encode(), facts(), name, "dy", 10, dispatch=dispatch)
        journal.trim()
    return journal


def replayed(journal: Journal[str, str], undo: Undo[str, str], layer: int = 0) -> list[list[str]]:
    assert undo.replay
    return [[entry.inputs for entry in together] for together in journal.replay(layer)]


def nobody_committed(trainer: str) -> int:
    return -1


def test_calls_are_replayed_in_their_order_without_the_voided_and_once_only() -> None:
    journal = filled("a", "b", "c", "d")
    undo, gone = journal.void([(b"b", facts()), (b"x", facts())])
    assert replayed(journal, undo[0]) == [["a"], ["c"], ["d"]]
    assert (undo[0].subtract, gone) == ([], 1)
    assert journal.void([(b"b", facts())]) == ({}, 1)
    undo, _ = journal.void([(b"a", facts())])
    assert replayed(journal, undo[0]) == [["c"], ["d"]]


def test_layers_are_undone_each_for_itself() -> None:
    journal = filled("a", "b")
    journal.add(b"other", facts(layer=1), "other", "dy", 10, dispatch=7)
    undo, _ = journal.void([(b"a", facts())])
    assert undo.keys() == {0}
    assert replayed(journal, undo[0]) == [["b"]]


def test_after_an_eviction_calls_are_subtracted_until_the_next_step() -> None:
    journal = filled("a", "b", "c", "d", limit_entries=3)
    undo, gone = journal.void([(b"a", facts()), (b"c", facts())])
    assert gone == 1
    assert not undo[0].replay
    assert [e.inputs for e in undo[0].subtract] == ["c"]
    journal.stepped(0, lambda _: 0)
    assert (len(journal), journal.n_bytes) == (0, 0)
    journal.add(b"e", facts(step=1), "e", "dy", 10, dispatch=9)
    undo, _ = journal.void([(b"e", facts(step=1))])
    assert replayed(journal, undo[0]) == []


def test_what_was_added_at_other_weights_is_subtracted_and_not_brought_back_by_a_later_replay() -> None:
    journal = filled("old")
    journal.stepped(0, nobody_committed)
    for name in ("new", "newer"):
        journal.add(name.encode(), facts(step=1), name, "dy", 10, dispatch=9)
    undo, _ = journal.void([(b"old", facts())])
    assert not undo[0].replay
    assert ([e.inputs for e in undo[0].make_up], undo[0].subtract) == (["old"], [])
    undo, _ = journal.void([(b"new", facts(step=1))])
    assert not undo[0].replay
    assert [e.inputs for e in undo[0].subtract] == ["new"]


def test_averaged_weights_end_replays_until_the_next_step() -> None:
    journal = filled("a", "b")
    journal.weights_changed(0, nobody_committed)
    undo, gone = journal.void([(b"a", facts())])
    assert (undo[0].replay, gone) == (False, 0)
    assert [e.inputs for e in undo[0].subtract] == ["a"]


def test_a_committed_call_is_kept_for_replays_until_the_step_and_not_longer() -> None:
    journal = filled("a", "b")
    journal.committed("t", 0)
    assert len(journal) == 2
    journal.add(b"open", facts("u", step=4), "open", "dy", 10, dispatch=9)
    journal.stepped(0, lambda trainer: 0 if trainer == "t" else 3)
    assert len(journal) == 1
    journal.committed("u", 4)
    assert (len(journal), journal.n_bytes) == (0, 0)


def test_a_flood_takes_no_more_than_the_limit() -> None:
    journal = filled(limit_entries=5)
    for number in range(1000):
        journal.add(number.to_bytes(16, "big"), facts(f"t{number}", layer=number % 3), "", "", 0, dispatch=number)
        journal.trim()
        if number % 7 == 0:
            journal.stepped(number % 3, nobody_committed)
        assert journal.n_bytes <= 5 * (ENTRY_OVERHEAD_BYTES + 10)
        assert len(journal) <= 5
    journal.add(b"huge", facts(), "", "", 1 << 20, dispatch=0)
    journal.trim()
    assert len(journal) == 5, "what does not fit alone evicts nobody"


def new_host(
    *, journal_bytes: int = 1 << 24, batch_tokens: int = 1000, clock: Callable[[], float] = time.monotonic
) -> ExpertHost:
    bank = ExpertBank(
        layer=0, indices=(0, 1, 3), shape=ExpertShape(d_model=D, d_ff=5),
        optimizer=OptimizerConfig(warmup_steps=0, learning_rate=1e-3), global_batch_tokens=batch_tokens,
        run="test", seed=1, init_std=0.5,
    )  # fmt: skip
    return ExpertHost({0: bank}, journal_bytes=journal_bytes, clock=clock)


def call(seed: int, *, trainer: str = "t", step: int = 0) -> BackwardCall:
    draw = torch.Generator().manual_seed(seed)
    rows = RoutedRows(
        x_RD=torch.randn(3, D, generator=draw),
        experts_per_row_R=torch.tensor([2, 1, 2], dtype=torch.int32),
        expert_index_P=torch.tensor([0, 3, 1, 1, 0], dtype=torch.int32),
        gate_P=torch.rand(5, generator=draw),
    )
    grad_RD = torch.randn(3, D, generator=draw)
    return BackwardCall(
        call_id=next(NUMBERS).to_bytes(16, "big"), trainer=trainer, step=step, layer=0, grad_RD=grad_RD, rows=rows
    )


def add(host: ExpertHost, *calls: BackwardCall) -> None:
    assert all(isinstance(answer, BackwardAnswer) for answer in host.backward_many(calls))


def commit(host: ExpertHost, *void: BackwardCall, trainer: str = "t", step: int = 0, tokens: int = 1) -> CommitAnswer:
    return host.commit(CommitCall(trainer=trainer, step=step, tokens=tokens, void=tuple(c.call_id for c in void)))


def sums(host: ExpertHost) -> Tensor:
    host._voiding.renew()
    return torch.cat([grad.flatten() for grad in host._banks[0]._optimizer.grads]).clone()


def test_one_of_several_that_ran_together_is_taken_out_as_if_the_others_had_run_without_it() -> None:
    host, without = new_host(), new_host()
    first, second, third, alone = (call(seed) for seed in range(4))
    add(host, first, second, third)
    add(host, alone)
    add(without, first, third)
    add(without, alone)
    answer = commit(host, second)
    assert (answer.voided, answer.void_failed) == (1, 0)
    assert torch.equal(sums(host), sums(without))


def test_voids_are_made_up_for_once_however_many_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row added and voided, again and again, had all gradients of the step added anew each time."""
    host, without = new_host(batch_tokens=5), new_host(batch_tokens=5)
    honest, later = [call(seed) for seed in range(8)], call(50)
    add(host, *honest)
    add(without, *honest)
    ran = 0
    backward = ExpertBank.backward

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal ran
        ran += 1
        return backward(*arguments, **options)

    monkeypatch.setattr(ExpertBank, "backward", counting)
    for step in range(20):
        void = call(100 + step, trainer="evil", step=step)
        add(host, void)
        assert commit(host, void, trainer="evil", step=step, tokens=0).voided == 1
    assert ran == 20, "no call but those that were sent"
    add(host, later)
    add(without, later)
    ran = 0
    assert commit(host, tokens=5).stepped
    assert ran == 2, "two dispatches of the honest one"
    commit(without, tokens=5)
    for name, value in without.fetch(0, ()).items():
        assert torch.equal(host.fetch(0, ())[name], value)


def test_who_voids_and_fetches_again_and_again_has_few_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, took_s, backward = 1000.0, 0.0, ExpertBank.backward

    def slow(*arguments: Any, **options: Any) -> Any:
        nonlocal now_s, took_s
        now_s, took_s = now_s + 0.1, took_s + 0.1
        return backward(*arguments, **options)

    host, without = new_host(batch_tokens=5, clock=lambda: now_s), new_host(batch_tokens=5)
    for host_of in (host, without):
        for seed in range(10):
            add(host_of, call(seed))
        commit(host_of)
    monkeypatch.setattr(ExpertBank, "backward", slow)
    began_s = now_s
    for step in range(200):
        void = call(100 + step, trainer="evil", step=step)
        add(host, void)
        assert commit(host, void, trainer="evil", step=step, tokens=0).voided == 1
        host.fetch(0, ())
        now_s += 0.1
    calls_s = 200 * 0.1
    assert took_s - calls_s <= READING_S + 1.1 + READING_SHARE * (now_s - began_s)
    now_s += 100
    host.fetch(0, ())
    assert not host._voiding.stale, "after a while there is time for another"
    void = call(500, trainer="evil", step=200)
    add(host, void)
    commit(host, void, trainer="evil", step=200, tokens=0)
    for one in (host, without):
        assert commit(one, step=1, tokens=5).stepped
        assert not one._voiding.stale
    for name, value in without.fetch(0, ()).items():
        assert torch.equal(host.fetch(0, ())[name], value), "a step is made without what was voided, always"


@pytest.mark.parametrize("look", ["eviction", "other weights", "snapshot", "load"])
def test_whatever_would_lose_a_replay_waits_for_it(look: str) -> None:
    host, without = new_host(journal_bytes=5 * (ENTRY_OVERHEAD_BYTES + 300)), new_host()
    first, void, *others = (call(seed) for seed in range(8))
    for one in (first, void, *others[:2]):
        add(host, one)
    for one in (first, *others[:2]):
        add(without, one)
    assert commit(host, void, trainer="t").voided == 1
    commit(without)
    assert host._voiding.stale == {0}
    if look == "eviction":
        for seed in range(10, 15):
            more = call(seed, trainer="u")
            for one in (host, without):
                add(one, more)
        assert len(host._journal) < len(without._journal)
    elif look == "other weights":
        for one in (host, without):
            one.replace_state(0, one.fetch(0, (), with_sums=False))
    elif look == "snapshot":
        theirs = without.fetch(0, ())
        assert all(torch.equal(value, theirs[name]) for name, value in host.fetch(0, ()).items())
    else:
        for one in (host, without):
            one.load_state(one.fetch(0, (1,), with_sums=False))
    assert not host._voiding.stale
    assert torch.equal(sums(host), sums(without))
    assert sums(host).any()


def test_the_void_comes_before_the_step_that_its_commit_makes() -> None:
    host, without = new_host(batch_tokens=5), new_host(batch_tokens=5)
    kept, void = call(1), call(2)
    add(host, kept, void)
    add(without, kept)
    assert commit(host, void, tokens=5).stepped
    commit(without, tokens=5)
    for name, value in without.fetch(0, ()).items():
        assert torch.equal(host.fetch(0, ())[name], value)
    assert host._banks[0].lineages == without._banks[0].lineages
    assert {i: lineage.seen[0].rows for i, lineage in host._banks[0].lineages.items()} == {0: 2, 1: 2, 3: 1}


@pytest.mark.parametrize("journal_bytes", [2 * ENTRY_OVERHEAD_BYTES, 0])
def test_without_the_whole_journal_it_is_subtracted_or_counted(journal_bytes: int) -> None:
    host, without = new_host(journal_bytes=journal_bytes), new_host()
    first, void = call(1), call(2)
    add(host, first)
    add(host, void)
    add(without, first)
    answer = commit(host, void)
    if journal_bytes:
        assert (answer.voided, answer.void_failed) == (1, 0)
        torch.testing.assert_close(sums(host), sums(without))
        assert host._banks[0]._summed_rows_E.tolist() == without._banks[0]._summed_rows_E.tolist()
    else:
        assert (answer.voided, answer.void_failed) == (0, 1)
    again = commit(host, void)
    assert again.repeated
    assert (again.voided, again.void_failed) == (answer.voided, answer.void_failed)


def test_a_gradient_that_another_trainers_commit_stepped_on_is_subtracted_from_the_next_sums() -> None:
    host = new_host(batch_tokens=5)
    void, mine = call(1), call(2, trainer="u")
    add(host, void)
    add(host, mine)
    assert commit(host, trainer="u", tokens=5).stepped
    answer = commit(host, void)
    assert (answer.voided, answer.void_failed) == (1, 0)
    alone = new_host()
    add(alone, void)
    # At weights that one step of 1e-3 has moved.
    torch.testing.assert_close(sums(host), -sums(alone), rtol=0.1, atol=0.05)


def test_rows_of_a_step_that_is_over_are_not_taken_from_another_trainers_of_now() -> None:
    host = new_host(batch_tokens=5)
    bank = host._banks[0]
    void = call(1)
    add(host, void)
    add(host, call(2, trainer="u"))
    assert commit(host, trainer="u", tokens=5).stepped
    add(host, call(3, trainer="u", step=1))
    rows_E, before = bank._summed_rows_E.tolist(), sums(host)
    assert commit(host, void).voided == 1
    assert bank._summed_rows_E.tolist() == rows_E == [2, 2, 1]
    assert not torch.equal(sums(host), before), "the gradient is taken out all the same"
    assert commit(host, trainer="u", step=1, tokens=5).stepped
    assert {i: lineage.seen[0].rows for i, lineage in bank.lineages.items()} == {0: 6, 1: 6, 3: 3}


def test_rows_of_this_step_are_taken_out_with_the_gradient_whatever_the_weights_were() -> None:
    host = new_host()
    void = call(1)
    add(host, void)
    add(host, call(2, trainer="u"))
    host.replace_state(0, host.fetch(0, (), with_sums=False))
    assert commit(host, void).voided == 1
    assert host._banks[0]._summed_rows_E.tolist() == [2, 2, 1]


def test_what_could_not_be_added_is_not_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums got its negative, and rows were counted below zero, which lineages and shares then named."""
    host = new_host()
    bank, lost = host._banks[0], call(1)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(bank, "backward", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            host.backward_many([lost])
    host.replace_state(0, host.fetch(0, (), with_sums=False))
    answer = commit(host, lost)
    assert (answer.voided, answer.void_failed) == (0, 1)
    assert bank._summed_rows_E.tolist() == [0, 0, 0]
    assert not sums(host).any()


def test_nobody_voids_a_strangers_gradient_or_one_of_a_later_step() -> None:
    host = new_host()
    theirs, later, unknown = call(1, trainer="u"), call(2, step=5), call(3)
    add(host, theirs, later)
    before = sums(host)
    answer = commit(host, theirs, later, unknown, unknown)
    assert (answer.voided, answer.void_failed) == (0, 0)
    assert torch.equal(sums(host), before)


def test_a_repeated_commit_with_other_voids_changes_nothing() -> None:
    host = new_host()
    void = call(1)
    add(host, void)
    commit(host)
    before = sums(host)
    answer = commit(host, void)
    assert (answer.repeated, answer.voided) == (True, 0)
    assert torch.equal(sums(host), before)
