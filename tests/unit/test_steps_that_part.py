"""Replicas whose steps end at other commits: they count from the same ones again, and nobody can abuse that."""

from __future__ import annotations

import asyncio

import pytest
import torch
from replicas import ALL, RUN, SHAPE, Swarm, assert_equal, backward

from moe_net.errors import CheckpointError
from moe_net.types import PeerInfo
from moe_net.wire.messages import CommitCall
from moe_net.wire.share import Share, ShareCall, commit_key, share_from_state


@pytest.mark.parametrize("missing", ["a", "b", "c"])
@pytest.mark.parametrize("others", [1, 2])
async def test_a_replica_that_has_missed_a_commit_soon_shares_again(missing: str, others: int) -> None:
    """Three commits make a step: it ended its steps one commit later than the others, for ever."""
    swarm = Swarm()
    for name in "abc":
        swarm.add(name)
    third = -(-RUN.global_batch_tokens // 3)
    for step in range(15):
        away = missing if step < others else ""
        await swarm.commit(*(name for name in "abc" if name != away), tokens=third)
    hosts = [peer.host for peer in swarm.peers.values()]
    assert len({host.committed_tokens for host in hosts}) == 1
    for layer in (0, 1):
        for host in hosts[1:]:
            host.replace_state(layer, hosts[0].fetch(layer, (), with_sums=False))
    for step in range(15, 21):
        for i, host in enumerate(hosts):
            backward(host, step, 10 * step + i)
        await swarm.commit("a", "b", "c", tokens=third)
    for host in hosts[1:]:
        assert_equal(hosts[0], host)


async def test_who_says_where_its_steps_end_says_so_at_once_and_only_when_it_is_certain() -> None:
    swarm = Swarm()
    swarm.add("a")
    sharing = swarm.peers["a"].sharing
    calls = [CommitCall(trainer="t", step=step, tokens=RUN.global_batch_tokens // 2) for step in range(4)]
    keys = tuple(map(commit_key, calls))
    for call in calls[:2]:
        await sharing.commit(call)
    asked = asyncio.create_task(sharing.answer(ShareCall(batch=b"?" * 32, experts=ALL, commits=keys[1:3])))
    await asyncio.sleep(0)
    assert not asked.done(), "of the last commit it has not heard"
    await sharing.commit(calls[2])
    share = await asked
    assert (share.experts, share.committed_tokens) == ({}, calls[2].tokens)
    state = share.to_state()
    assert share_from_state(state, asked=ALL, shape=SHAPE).committed_tokens == calls[2].tokens
    with pytest.raises(CheckpointError, match="committed"):
        share_from_state(state | {"0.1.rows": torch.tensor([1, 0])}, asked=ALL, shape=SHAPE)
    # Of a batch of which none has ended a step here, it may yet hear the rest.
    with pytest.raises(TimeoutError):
        await sharing.answer(ShareCall(batch=b"?" * 32, experts=ALL, commits=keys[2:4]), limit_s=0.01)


@pytest.mark.parametrize("late", ["a", "b"])
async def test_commits_that_cross_on_their_way_part_nobody(late: str) -> None:
    """Each replica hears all of them: who took over how many another had, with one that was still to come, counted that
    one twice, and made steps of half a batch for a while."""
    swarm = Swarm()
    for name in "ab":
        swarm.add(name)
        swarm.peers[name].sharing._between_s.append(0.6)

    async def hear(name: str, *calls: tuple[str, int]) -> None:
        said = (CommitCall(trainer=t, step=step, tokens=RUN.global_batch_tokens // 2) for t, step in calls)
        await asyncio.gather(*map(swarm.peers[name].sharing.commit, said))

    orders = [("t", 0), ("t", 1), ("u", 0)], [("t", 0), ("u", 0), ("t", 1)]
    first = asyncio.create_task(hear("b" if late == "a" else "a", *orders[0]))
    await asyncio.sleep(0.02)  # one has stopped to wait when the other begins to
    await asyncio.gather(first, hear(late, *orders[1]))
    for call in [("u", 1), ("t", 2), ("u", 2), ("t", 3)]:
        await asyncio.gather(hear("a", call), hear("b", call))
        assert len({peer.host.committed_tokens for peer in swarm.peers.values()}) == 1
    assert {v for peer in swarm.peers.values() for v in peer.host.versions[0].values()} == {3}


async def test_nobody_makes_a_step_due_by_saying_so() -> None:
    swarm = Swarm()
    swarm.add("a")
    b = swarm.add("b")

    async def lie(peer: PeerInfo, call: ShareCall, *, timeout_s: float) -> Share:
        return Share(origin=1, clock=1, experts={}, committed_tokens=2**60)

    swarm.peers["b"].sharing.begin(lie, swarm.view)
    await swarm.commit("b")
    assert b.committed_tokens == RUN.global_batch_tokens - 1
