"""Replicas that make a step together equal one peer with all the rows; whoever does not answer is not waited for."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replicas import ALL, RUN, SHAPE, D, Swarm, assert_close, assert_equal, backward, commit_of, everything, times_asked
from torch import Tensor

from moe_net.client import make_banks
from moe_net.errors import BusyError, CheckpointError, InputsGoneError
from moe_net.experts.host import ExpertHost
from moe_net.experts.replicate import average
from moe_net.rpc.base import CallError, CallFailure
from moe_net.types import ExpertId
from moe_net.wire.messages import CommitCall
from moe_net.wire.share import ExpertShare, Share, ShareCall, share_from_state
from moe_peer.sharing import (
    MAX_SKIPPED,
    MAX_WAIT_S,
    MAX_WAITING_COMMITS,
    MAX_WAITING_SHARES,
    MIN_WAIT_S,
    ShareFiles,
)

FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("names", ["ab", "abc"])
async def test_replicas_that_share_the_rows_equal_one_peer_with_all_of_them(names: str) -> None:
    swarm, one = Swarm(), ExpertHost(make_banks(RUN, ALL, origin=99))
    for name in names:
        swarm.add(name)
    for step in range(6):
        for i, name in enumerate(names):
            seed = 10 * step + i
            backward(swarm.peers[name].host, step, seed)
            backward(one, step, seed)
        answers = await swarm.commit(*names)
        assert all(answer.stepped for answer in answers)
        one.commit(commit_of(one, step=step))
    first, *others = [swarm.peers[name].host for name in names]
    for other in others:
        assert_equal(first, other)
    assert_close(first, one)


async def test_no_state_is_taken_over_in_the_middle_of_a_step() -> None:
    """A partner that has made the step already has our rows of it in its state: taken over now, our own step would add
    them once more."""
    swarm = Swarm()
    mine, other = swarm.add("a"), swarm.add("b")
    backward(mine, 0, 1)
    _, closed = mine.begin_commit(commit_of(mine, step=0))
    assert closed is not None
    before = everything(mine)
    with pytest.raises(BusyError, match="layer 0 is in the middle of a step"):
        mine.replace_state(0, other.fetch(0, (), with_sums=False))
    assert all(torch.equal(value, before[name]) for name, value in everything(mine).items())
    mine.finish_commit(closed)
    mine.replace_state(0, mine.fetch(0, (), with_sums=False))


async def test_our_own_step_is_made_whatever_a_partner_sends() -> None:
    swarm, alone = Swarm(), ExpertHost(make_banks(RUN, ALL, origin=1))
    mine = swarm.add("a")
    swarm.add("b")

    async def crash() -> None:
        raise RuntimeError("a bug that only this partner's answers reach")

    swarm.broken["b"] = crash
    for host in (mine, alone):
        backward(host, 0, 1)
    (answer,) = await swarm.commit("a")
    alone.commit(commit_of(alone, step=0))
    assert answer.stepped
    assert_equal(mine, alone)


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("what", ["step", "shares"])
async def test_a_step_that_fails_is_over_like_any_other(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stayed in the middle for ever: no replica's state was taken over any more."""
    swarm = Swarm()
    mine, other = swarm.add("a"), swarm.add("b")
    bank = mine._banks[0]
    backward(mine, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(bank._optimizer if what == "step" else bank, what, fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            await swarm.commit("a")
    assert set(mine.versions[1].values()) == {1}, "the other layer's step is made"
    for layer in (0, 1):
        mine.replace_state(layer, other.fetch(layer, (), with_sums=False))
    backward(mine, 1, 2)
    assert (await swarm.commit("a"))[0].stepped
    assert set(mine.versions[0].values()) == {1}, "of the state that it has taken over"


async def test_commits_without_tokens_leave_nothing_behind_and_do_not_part_replicas() -> None:
    swarm = Swarm()
    swarm.add("a")
    swarm.add("b")
    for _ in range(3):
        await swarm.commit("a", tokens=0)  # "b" never hears of these
    backward(swarm.peers["a"].host, 3, 1)
    answers = await swarm.commit("a", "b")
    assert all(answer.stepped for answer in answers)
    assert_equal(swarm.peers["a"].host, swarm.peers["b"].host)


async def test_a_replica_without_rows_takes_part_in_the_favourites_steps() -> None:
    swarm = Swarm()
    favourite, idle, alone = swarm.add("a"), swarm.add("b"), ExpertHost(make_banks(RUN, ALL, origin=1))
    for step in range(4):
        for host in (favourite, alone):
            backward(host, step, step)
        await swarm.commit("a", "b")
        alone.commit(commit_of(alone, step=step))
    assert_equal(favourite, idle)
    assert_equal(favourite, alone)


async def test_a_dead_partner_is_left_out_at_once_and_asked_more_and_more_seldom() -> None:
    async def refuse() -> None:
        raise CallError(CallFailure.UNREACHABLE, "dead", "refused")

    assert await times_asked(20, refuse) == 4, "after 1, 3 and 7 steps without it"
    assert MAX_SKIPPED == 63


async def test_a_frozen_partner_costs_its_limit_and_what_it_missed_is_made_up_for() -> None:
    swarm = Swarm()
    a, b = swarm.add("a"), swarm.add("b")
    stuck = asyncio.Event()
    swarm.broken["b"] = stuck.wait
    backward(a, 0, 1)
    backward(b, 0, 2)
    swarm.peers["a"].sharing._between_s.append(0.01)
    assert swarm.peers["a"].sharing.limit_s("b") == MIN_WAIT_S
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    assert (await swarm.commit("a"))[0].stepped
    assert loop.time() - began_s >= MIN_WAIT_S * 0.9
    # b hears of the same commit later: it still gets a's part, and has then seen all that a has.
    swarm.step = 0
    await swarm.commit("b")
    mine, theirs = (host._banks[0].lineages for host in (a, b))
    assert all(mine[index].unseen_by(theirs[index]) == 0 for index in mine)
    assert any(theirs[index].unseen_by(mine[index]) > 0 for index in mine)
    mean = average(a.fetch(0, ()), b.fetch(0, ()))
    assert all(torch.equal(mean[name], value) for name, value in b.fetch(0, ()).items())
    stuck.set()


async def test_a_gradient_that_no_commit_names_is_in_nobodys_step() -> None:
    swarm = Swarm()
    a, b = swarm.add("a"), swarm.add("b")
    one = ExpertHost(make_banks(RUN, ALL, origin=99))
    kept = backward(a, 0, 1)
    backward(one, 0, 1)
    backward(a, 0, 2)  # its answer came too late: the other one's was used
    for host in (b, one):
        backward(host, 0, 2)
    await swarm.commit("a", "b", calls={"a": (kept,)})
    one.commit(commit_of(one, step=0))
    assert_equal(a, b)
    assert_close(a, one)


async def test_what_comes_while_replicas_are_asked_belongs_to_the_next_step() -> None:
    swarm = Swarm()
    a, b = swarm.add("a"), swarm.add("b")
    late = asyncio.Event()
    swarm.broken["b"] = late.wait
    backward(a, 0, 1)
    swarm.peers["a"].sharing._between_s.append(10.0)
    committing = asyncio.create_task(swarm.commit("a", "b"))
    while not swarm.peers["b"].asked:  # noqa: ASYNC110  its turn comes without an event
        await asyncio.sleep(0)
    backward(a, 0, 5, trainer="u")
    late.set()
    await committing
    assert_equal(a, b)
    one = ExpertHost(make_banks(RUN, ALL, origin=99))
    backward(one, 0, 1)
    one.commit(commit_of(one, step=0))
    assert_close(a, one)
    answer = a.commit(commit_of(a, step=0, trainer="u", tokens=1))
    assert (answer.missing, answer.committed_tokens) == ((), 1)
    assert a.fetch(0, ())["0.0.g_in"].norm() + a.fetch(0, ())["0.1.g_in"].norm() > 0


async def test_replicas_that_close_other_batches_do_not_mix_them() -> None:
    swarm = Swarm()
    a, b = swarm.add("a"), swarm.add("b")
    half = RUN.global_batch_tokens // 2
    backward(a, 0, 1)
    backward(b, 0, 2)
    # a closes with t and u, b with u and t's second.
    await swarm.peers["a"].sharing.commit(commit_of(a, step=0, tokens=half))
    await swarm.peers["b"].sharing.commit(commit_of(b, step=0, trainer="u", tokens=half))
    answers = await asyncio.gather(
        swarm.peers["a"].sharing.commit(commit_of(a, step=0, trainer="u", tokens=half)),
        swarm.peers["b"].sharing.commit(commit_of(b, step=1, tokens=half)),
    )
    assert all(answer.stepped for answer in answers)
    mine, theirs = (host._banks[0].lineages for host in (a, b))
    assert all(set(lineage.seen) <= {1} for lineage in mine.values())
    assert all(set(lineage.seen) <= {2} for lineage in theirs.values())
    with pytest.raises(InputsGoneError):
        await swarm.peers["a"].sharing.answer(ShareCall(batch=b"", experts=ALL))
    with pytest.raises(TimeoutError):
        await swarm.peers["a"].sharing.answer(ShareCall(batch=b"?" * 32, experts=ALL), limit_s=0.01)


async def test_a_newcomer_that_has_missed_commits_counts_steps_as_the_others_do() -> None:
    swarm = Swarm()
    a, b = swarm.add("a"), swarm.add("b", shares=False)
    for step in range(5):
        if step == 3:
            for layer in (0, 1):
                b.load_state(a.fetch(layer, (), with_sums=False))
        backward(a, step, step)
        await swarm.commit("a")
    # They meet: b is ahead of the commits that it has heard of, and will hear of no others.
    swarm.peers["b"].sharing.begin(swarm.ask, swarm.view)
    for layer in (0, 1):
        b.replace_state(layer, a.fetch(layer, (), with_sums=False))
    swarm.peers["a"].sharing._partners.clear()
    for step in range(5, 8):
        backward(a, step, step)
        backward(b, step, 100 + step)
        await swarm.commit("a", "b")
        assert_equal(a, b)
    assert b.versions[0] == dict.fromkeys(range(RUN.model.n_experts), 8)


async def test_a_caller_that_leaves_does_not_leave_half_a_commit() -> None:
    swarm = Swarm()
    a, b = swarm.add("a"), swarm.add("b")
    late = asyncio.Event()
    swarm.broken["b"] = late.wait
    backward(a, 0, 1)
    backward(b, 0, 2)
    call = commit_of(a, step=0)
    caller = asyncio.create_task(swarm.peers["a"].sharing.commit(call))
    while not swarm.peers["b"].asked:  # noqa: ASYNC110
        await asyncio.sleep(0)
    caller.cancel()
    late.set()
    await swarm.commit("b")
    await swarm.peers["a"].sharing.close()
    assert_equal(a, b)
    assert a.commit(call).repeated


async def test_a_stranger_who_asks_for_no_real_batch_does_not_keep_replicas_out() -> None:
    swarm = Swarm()
    host = swarm.add("a")
    sharing = swarm.peers["a"].sharing
    call = CommitCall(trainer="t", step=0, tokens=RUN.global_batch_tokens)
    batch = hashlib.sha256(json.dumps([["t", 0, call.tokens]]).encode()).digest()

    def asks(caller: str, batch: bytes) -> asyncio.Task[Share]:
        return asyncio.create_task(sharing.answer(ShareCall(batch=batch, experts=ALL), caller=caller))

    partners = [asks(f"partner {i}", batch) for i in range(4)]
    strangers = [asks("stranger", bytes([i]) * 32) for i in range(3 * MAX_WAITING_SHARES)]
    partners += [asks(f"late partner {i}", batch) for i in range(4)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(sharing._waiting) == MAX_WAITING_SHARES
    assert sum(task.done() for task in strangers) == 2 * MAX_WAITING_SHARES + 8
    with pytest.raises(BusyError, match="32 wait for a step to end"):
        await strangers[0]
    backward(host, 0, 1)
    await sharing.commit(call)
    assert all(share.origin == host.origin for share in await asyncio.gather(*partners))
    for task in strangers:
        task.cancel()
    await asyncio.gather(*strangers, return_exceptions=True)
    assert not sharing._waiting


async def test_one_file_is_made_for_all_who_are_sent_it_and_few_others_are_there() -> None:
    """Sixteen callers had sixteen copies of the same hundred megabytes made."""
    gate, made = asyncio.Event(), 0

    async def make(share: Share) -> tuple[bytes, bytes]:
        nonlocal made
        made += 1
        await gate.wait()
        return bytes(len(share.experts)), b""

    files = ShareFiles(make, n_experts=2)
    entered = asyncio.Semaphore(0)
    leave = asyncio.Event()

    def share(*indices: int) -> Share:
        one = ExpertShare(rows=1, rows_before=0, g_in=torch.zeros(1), g_out=torch.zeros(1))
        return Share(origin=1, clock=1, experts={ExpertId(0, index): one for index in indices})

    async def use(which: Share) -> bytes:
        async with files.of(b"batch", which) as (data, _):
            entered.release()
            await leave.wait()
            return data

    users = [asyncio.create_task(use(share(0, 1))) for _ in range(16)]
    gone = [asyncio.create_task(use(share(0, 2))) for _ in range(3)]
    users += [asyncio.create_task(use(share(index))) for index in range(4)]
    await asyncio.sleep(0)
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    with pytest.raises(BusyError, match="8 experts are on their way, at most 8 may be"):
        await use(share(4))
    gate.set()
    for _ in users:
        await entered.acquire()
    assert made == 6
    leave.set()
    files_of = await asyncio.gather(*users)
    assert all(data is files_of[0] for data in files_of[:16])
    assert not files._files


async def test_callers_that_leave_before_their_turn_leave_nothing_behind_and_few_may_wait() -> None:
    """Each left a task with its call behind: a caller that hung up again and again, over a gigabyte of them."""
    swarm = Swarm()
    a, _ = swarm.add("a"), swarm.add("b")
    late = asyncio.Event()
    swarm.broken["b"] = late.wait
    sharing = swarm.peers["a"].sharing
    backward(a, 0, 1)
    sharing._between_s.append(10.0)
    first = asyncio.create_task(swarm.commit("a"))
    while not swarm.peers["b"].asked:  # noqa: ASYNC110
        await asyncio.sleep(0)
    before = len(asyncio.all_tasks())
    for step in range(1, 1 + 4 * MAX_WAITING_COMMITS):
        call = CommitCall(trainer="u", step=step, tokens=1)
        gone = asyncio.create_task(sharing.commit(call))
        await asyncio.sleep(0)
        gone.cancel()
        assert isinstance((await asyncio.gather(gone, return_exceptions=True))[0], asyncio.CancelledError)
    assert len(asyncio.all_tasks()) == before
    calls = [CommitCall(trainer="v", step=step, tokens=1) for step in range(MAX_WAITING_COMMITS - 1)]
    waiting = [asyncio.create_task(sharing.commit(call)) for call in calls]
    await asyncio.sleep(0)
    with pytest.raises(BusyError, match="Commit: 32 are on their way"):
        await sharing.commit(CommitCall(trainer="w", step=0, tokens=1))
    late.set()
    assert (await first)[0].stepped
    assert [answer.committed_tokens for answer in await asyncio.gather(*waiting)] == list(range(1, 1 + len(calls)))
    assert not a.commit(CommitCall(trainer="u", step=0, tokens=0)).repeated, "none of those that left was made"


async def test_the_wait_is_learned_and_bounded() -> None:
    swarm = Swarm()
    swarm.add("a")
    sharing = swarm.peers["a"].sharing
    assert sharing.limit_s("b") == MAX_WAIT_S
    sharing._between_s.append(1.2)
    assert sharing.limit_s("b") == pytest.approx(0.6)
    swarm.add("b")
    backward(swarm.peers["b"].host, 0, 1)
    await swarm.commit("a", "b")
    assert sharing.limit_s("b") == MIN_WAIT_S
    sharing._partners["b"].answered(0.2)
    sharing._between_s.clear()
    assert sharing.limit_s("b") == pytest.approx(0.8)


@given(deaths=st.lists(st.sets(st.sampled_from("abc"), max_size=2), min_size=1, max_size=6))
@FEW
def test_nothing_is_learned_twice_or_lost_whoever_misses_which_step(deaths: list[set[str]]) -> None:
    """Every life step by step: who is away hears of no commit and answers nobody; then they meet in any order."""

    async def history() -> None:
        swarm = Swarm()
        for name in "abc":
            swarm.add(name)
        learned = dict.fromkeys("abc", 0)

        async def refuse() -> None:
            raise CallError(CallFailure.UNREACHABLE, "?", "away")

        for step, away in enumerate(deaths):
            swarm.broken = dict.fromkeys(away, refuse)
            there = [name for name in "abc" if name not in away]
            for name in there:
                backward(swarm.peers[name].host, step, 100 * step + ord(name), rows=4)
                learned[name] += 4
            await swarm.commit(*there)
        hosts = [swarm.peers[name].host for name in "abc"]
        for host in hosts:
            for lineage in host._banks[0].lineages.values():
                for origin, seen in lineage.seen.items():
                    own = hosts[origin - 1]._banks[0].lineages
                    assert seen.rows <= sum(one.rows_of(origin) for one in own.values())
        for _ in range(2):
            for a, b in ((0, 1), (1, 2), (0, 2)):
                mean = average(hosts[a].fetch(0, ()), hosts[b].fetch(0, ()))
                for host in (hosts[a], hosts[b]):
                    host.replace_state(0, mean)
        for host in hosts:
            lineages = host._banks[0].lineages.values()
            for i, name in enumerate("abc", start=1):
                assert sum(lineage.rows_of(i) for lineage in lineages) == learned[name]
            met, first = host.fetch(0, ()), hosts[0].fetch(0, ())
            assert all(torch.equal(value, first[name]) for name, value in met.items())

    asyncio.run(history())


def share_state() -> dict[str, Tensor]:
    zeros = {"0.1.g_in": torch.zeros(D, SHAPE.d_hidden), "0.1.g_out": torch.zeros(SHAPE.d_ff, D)}
    return {"origin": torch.tensor(5), "clock": torch.tensor(1), "0.1.rows": torch.tensor([3, 0]), **zeros}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"origin": torch.tensor(0)}, "origin"),
        ({"origin": torch.tensor([5])}, "origin"),
        ({"clock": torch.tensor(-1)}, "clock"),
        ({"0.1.rows": torch.tensor([-1, 0])}, "rows is -1"),
        ({"0.1.rows": torch.tensor([1, -1])}, "after -1"),
        ({"0.1.rows": torch.tensor([1, 2**60])}, "must be"),
        ({"0.1.rows": torch.tensor(1)}, "rows is missing, or not"),
        ({"0.1.g_in": torch.zeros(1)}, "g_in is missing, or not"),
        ({"0.1.g_out": torch.full((SHAPE.d_ff, D), torch.nan)}, "has a norm over"),
        ({"0.1.g_in": torch.full((D, SHAPE.d_hidden), 1e30)}, "has a norm over"),
        ({"0.2.rows": torch.tensor([1, 0])}, "more in it"),
        ({"0.1.more": torch.tensor(0)}, "more in it"),
        ({"else": torch.tensor(0)}, "more in it"),
    ],
)
def test_a_share_that_cannot_be_is_refused(change: dict[str, Tensor], reason: str) -> None:
    asked = [ExpertId(0, 0), ExpertId(0, 1)]
    assert share_from_state(share_state(), asked=asked, shape=SHAPE).experts.keys() == {ExpertId(0, 1)}
    with pytest.raises(CheckpointError, match=reason):
        share_from_state(share_state() | change, asked=asked, shape=SHAPE)
