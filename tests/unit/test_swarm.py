"""rpc/swarm: fail-over to replicas, retries that cannot count twice, commits in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch
from faulty_swarms import EXPERTS, GATES_TK, IDS_TK, RUN, X_TD, Clock, Faulty, forward, grads, swarm_of

from moe_net.client import make_banks
from moe_net.errors import DivergedError
from moe_net.experts.host import ExpertHost
from moe_net.placement.latency import LatencyConfig
from moe_net.placement.view import View
from moe_net.rpc.base import CallFailure
from moe_net.rpc.outlook import CallKind
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.trace import FaultEvent
from moe_net.types import PeerInfo
from moe_net.wire.messages import CommitCall, ForwardAnswer, ForwardCall


async def test_forward_fails_over_to_the_replica_and_equals_the_undisturbed_answer() -> None:
    quiet, _, _, _ = swarm_of(1)
    expected = await forward(quiet)
    swarm, transport, _, _ = swarm_of(2)
    first = swarm_of(2)
    await forward(first[0])
    preferred = first[1].log[0][1]
    transport.fault = lambda method, peer: CallFailure.UNREACHABLE if peer == preferred else None
    result = await forward(swarm)
    assert torch.equal(result.y_TD, expected.y_TD)
    assert result.answered_TK.all()
    assert [peer for _, peer, _ in transport.log] == [preferred, "p1" if preferred == "p0" else "p0"]
    assert (swarm.stats.retries, swarm.stats.dropped_pairs) == (1, 0)


async def test_forward_without_any_replica_drops_the_pairs_and_says_so() -> None:
    swarm, transport, _, _ = swarm_of(2)
    transport.fault = lambda method, peer: CallFailure.LATE
    result = await forward(swarm)
    assert not result.answered_TK.any()
    assert not result.y_TD.any()
    assert swarm.stats.dropped_pairs == IDS_TK.numel()


async def test_a_backward_whose_answer_was_lost_counts_once() -> None:
    outcomes = []
    for lose in (0, 1):
        swarm, transport, hosts, _ = swarm_of(1)
        result = await forward(swarm)
        left = [lose]

        def lost(method: str, peer: str, left: list[int] = left) -> CallFailure | None:
            left[0] -= 1
            return CallFailure.UNREACHABLE if left[0] >= 0 else None

        transport.lost_answer = lost
        dx_TD, dgate = await swarm.backward(result.answered, torch.ones_like(X_TD), IDS_TK.numel())
        assert sum(1 for method, _, _ in transport.log if method == "backward") == lose + 1
        outcomes.append((dx_TD, dgate, grads(hosts["p0"])))
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))
    assert outcomes[0][2].any()


async def test_backward_sends_the_inputs_when_the_server_has_lost_them() -> None:
    swarm, _, hosts, _ = swarm_of(1)
    expected_result = await forward(swarm)
    expected = await swarm.backward(expected_result.answered, torch.ones_like(X_TD), IDS_TK.numel())
    small, small_transport, small_hosts, _ = swarm_of(1)
    result = await forward(small)
    for call_id in list(small_hosts["p0"]._staging._calls):
        small_hosts["p0"]._staging._drop(call_id)
    got = await small.backward(result.answered, torch.ones_like(X_TD), IDS_TK.numel())
    sent = [call for method, _, call in small_transport.log if method == "backward"]
    assert [call.rows is None for call in sent] == [True, False]
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    torch.testing.assert_close(grads(small_hosts["p0"]), grads(hosts["p0"]))
    assert small.stats.lost_gradient_pairs == 0


async def until(condition: Callable[[], bool]) -> None:
    """Let the other tasks run until it holds; time here is the Clock's, so a bounded number of turns is enough."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never held")


async def settle(swarm: ExpertSwarm, peer_id: str) -> None:
    """Until the peer gets rows again."""
    await until(lambda: peer_id in swarm.view().peers)


def committed(transport: Faulty) -> list[tuple[str, int]]:
    return [(peer, call.step) for method, peer, call in transport.log if method == "commit"]  # type: ignore[attr-defined]


async def test_commits_reach_a_peer_in_order_and_rows_do_not_overtake_them() -> None:
    swarm, transport, hosts, _ = swarm_of(1)
    await forward(swarm)
    transport.fault = lambda method, peer: CallFailure.LATE if method in ("commit", "ping") else None
    await swarm.commit(0, 64)
    assert hosts["p0"].committed_tokens == 0
    assert not swarm.view().peers
    assert not swarm.live(0, 6).any()
    result = await forward(swarm, step=1)
    assert not result.answered_TK.any(), "rows of step 1 overtook the commit of step 0"
    await swarm.commit(1, 64)
    transport.log.clear()
    transport.fault = lambda method, peer: None
    await settle(swarm, "p0")
    assert committed(transport) == [("p0", 0), ("p0", 1)]
    assert set(hosts["p0"].versions[0].values()) == {2}
    assert swarm.live(0, 6).all()
    await swarm.close()


async def test_a_step_never_waits_for_a_suspended_peer_and_a_probe_brings_it_back() -> None:
    swarm, transport, _, clock = swarm_of(2)
    await forward(swarm)
    favourite = transport.asked("forward")[0]
    other = "p1" if favourite == "p0" else "p0"
    down = True
    transport.fault = lambda method, peer: CallFailure.LATE if down and peer == favourite else None
    assert (await forward(swarm)).answered_TK.all()
    transport.log.clear()
    for step in range(3):
        result = await forward(swarm, step)
        await swarm.backward(result.answered, torch.ones_like(X_TD), IDS_TK.numel())
        await swarm.commit(step, 64)
    assert {peer for method, peer, _ in transport.log if method != "ping"} == {other}
    down = False
    await settle(swarm, favourite)
    assert clock.now_s > 100.4, "it was asked before its backoff was over"
    assert [step for peer, step in committed(transport) if peer == favourite] == [0, 1, 2]
    assert ("peer_back", "unmasked") in transport.happened()
    await swarm.close()


async def test_a_full_queue_is_waited_for_when_nobody_else_has_the_experts() -> None:
    swarm, transport, _, _ = swarm_of(1)
    left = [2]

    def busy(method: str, peer: str) -> CallFailure | None:
        left[0] -= 1
        return CallFailure.BUSY if left[0] >= 0 else None

    transport.fault = busy
    assert (await forward(swarm)).answered_TK.all()
    assert (swarm.stats.dropped_pairs, swarm.stats.retries) == (0, 2)


async def test_a_full_queue_sends_the_load_elsewhere_at_once() -> None:
    swarm, transport, _, clock = swarm_of(2)
    await forward(swarm)
    favourite = transport.asked("forward")[0]
    other = "p1" if favourite == "p0" else "p0"
    transport.busy_s = 3.0
    transport.fault = lambda method, peer: CallFailure.BUSY if peer == favourite else None
    transport.log.clear()
    await forward(swarm)
    await forward(swarm)
    assert transport.asked("forward") == [favourite, other, other], "asked again while its queue is full"
    clock.now_s += 3.1
    transport.fault = lambda method, peer: None
    await forward(swarm)
    assert transport.asked("forward")[-1] == favourite


async def test_a_hedge_wins_when_the_primary_stalls() -> None:
    quiet, _, _, _ = swarm_of(1)
    expected = await forward(quiet)
    swarm, transport, _, _ = swarm_of(2)
    for _ in range(3):
        await forward(swarm)
    favourite = transport.asked("forward")[0]
    transport.stalled["forward", favourite] = asyncio.Event()
    result = await forward(swarm)
    assert torch.equal(result.y_TD, expected.y_TD)
    assert [one.peer.peer_id for one in result.answered] == ["p1" if favourite == "p0" else "p0"]
    assert (swarm.stats.hedges, swarm.stats.hedges_won, swarm.stats.dropped_pairs) == (1, 1, 0)
    assert ("forward_overdue", "hedge_won") in transport.happened()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
    assert favourite in swarm.view().peers, "late is not failed"


async def test_a_hedge_that_loses_is_counted_and_is_no_event() -> None:
    swarm, transport, _, _ = swarm_of(2)
    for _ in range(3):
        await forward(swarm)
    favourite = transport.asked("forward")[0]
    other = "p1" if favourite == "p0" else "p0"
    before, n_calls = transport.happened(), len(transport.asked("forward"))
    late = transport.stalled["forward", favourite] = asyncio.Event()
    transport.stalled["forward", other] = asyncio.Event()
    running = asyncio.create_task(forward(swarm))
    await until(lambda: len(transport.asked("forward")) == n_calls + 2)
    late.set()
    assert [one.peer.peer_id for one in (await running).answered] == [favourite]
    assert (swarm.stats.hedges, swarm.stats.hedges_won) == (1, 0)
    assert transport.happened() == before


async def test_hedges_stay_within_their_share_of_the_calls() -> None:
    swarm, transport, _, _ = swarm_of(2, hedge_fraction=0.05, hedge_burst=2.0)
    for _ in range(3):
        await forward(swarm)
    favourite = transport.asked("forward")[0]
    transport.stalled["forward", favourite] = asyncio.Event()
    for _ in range(2):
        await forward(swarm)
    third = asyncio.create_task(forward(swarm))
    await until(lambda: len(transport.asked("forward")) == 8)
    for _ in range(50):
        await asyncio.sleep(0)
    assert not third.done(), "the third late call was hedged beyond the cap"
    transport.stalled["forward", favourite].set()
    assert (await third).answered_TK.all()
    assert swarm.stats.hedges == 2


async def test_a_backward_that_fails_goes_to_the_replica_with_its_inputs_and_counts_there_alone() -> None:
    quiet, _, quiet_hosts, _ = swarm_of(1)
    result = await forward(quiet)
    expected = await quiet.backward(result.answered, torch.ones_like(X_TD), IDS_TK.numel())
    swarm, transport, hosts, _ = swarm_of(2)
    result = await forward(swarm)
    (one,) = result.answered
    favourite, other = one.peer.peer_id, "p1" if one.peer.peer_id == "p0" else "p0"
    transport.lost_answer = lambda method, peer: CallFailure.LATE if peer == favourite else None
    got = await swarm.backward(result.answered, torch.ones_like(X_TD), IDS_TK.numel())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    sent = [(peer, call.rows is None) for method, peer, call in transport.log if method == "backward"]
    assert sent == [(favourite, True), (other, False)]
    assert (swarm.stats.lost_gradient_pairs, swarm.stats.failovers) == (0, 1)
    transport.lost_answer = lambda method, peer: None
    await swarm.commit(0, 64)
    await settle(swarm, favourite)
    named = {peer: call.calls for method, peer, call in transport.log if method == "commit"}
    (moved,) = [call for method, peer, call in transport.log if method == "backward" and peer == other]
    assert named == {favourite: (), other: (moved.call_id,)}
    # The one counts it as the undisturbed host does, the other not at all: as one that never heard of it.
    untouched = ExpertHost(make_banks(RUN, EXPERTS))
    await quiet.commit(0, 64)
    untouched.commit(CommitCall(trainer="t", step=0, tokens=64))
    for host, like in ((hosts[other], quiet_hosts["p0"]), (hosts[favourite], untouched)):
        state, expected_state = host.fetch(0, []), like.fetch(0, [])
        assert all(torch.equal(state[name], value) for name, value in expected_state.items())
    await swarm.close()


async def test_of_a_hedged_backward_only_the_used_answer_counts() -> None:
    swarm, transport, _, _ = swarm_of(2)
    for _ in range(3):
        result = await forward(swarm)
        await swarm.backward(result.answered, torch.ones_like(X_TD), IDS_TK.numel())
    result = await forward(swarm)
    (one,) = result.answered
    favourite = one.peer.peer_id
    transport.stalled["backward", favourite] = asyncio.Event()
    dx_TD, _ = await swarm.backward(result.answered, torch.ones_like(X_TD), IDS_TK.numel())
    assert dx_TD.any()
    assert (swarm.stats.hedges, swarm.stats.hedges_won) == (1, 1)
    await swarm.commit(0, 64)
    named = {peer: call.calls for method, peer, call in transport.log if method == "commit"}
    assert one.call.call_id not in named[favourite]
    (other,) = set(named) - {favourite}
    (moved,) = [call for method, peer, call in transport.log if method == "backward" and peer == other]
    assert named[other] == (moved.call_id,)


async def test_a_gradient_that_nobody_acknowledged_does_not_count_and_is_counted_as_lost() -> None:
    swarm, transport, _, _ = swarm_of(1)
    result = await forward(swarm)
    transport.lost_answer = lambda method, peer: CallFailure.LATE
    dx_TD, dgate = await swarm.backward(result.answered, torch.ones_like(X_TD), IDS_TK.numel())
    assert not dx_TD.any()
    assert not dgate.any()
    assert swarm.stats.lost_gradient_pairs == IDS_TK.numel()
    await swarm.commit(0, 64)
    await settle(swarm, "p0")
    (commit,) = [call for method, _, call in transport.log if method == "commit"]
    assert commit.calls == ()  # type: ignore[attr-defined]
    await swarm.close()


async def test_what_a_peer_did_not_count_is_an_event_and_lost() -> None:
    swarm, transport, hosts, _ = swarm_of(1)
    result = await forward(swarm)
    await swarm.backward(result.answered, torch.ones_like(X_TD), IDS_TK.numel())
    for call_id in list(hosts["p0"]._staging._calls):
        hosts["p0"]._staging._drop(call_id)
    await swarm.commit(0, 64)
    assert swarm.stats.lost_gradient_pairs == IDS_TK.numel()
    (event,) = transport.events
    assert (event.what, event.peer, event.pairs, event.action) == ("gradient_gone", "p0", IDS_TK.numel(), "left_out")
    await swarm.close()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
async def test_our_own_nan_is_our_error_and_no_peer_is_blamed(bad: float) -> None:
    swarm, transport, _, _ = swarm_of(1)
    x_TD = X_TD.clone()
    x_TD[2, 3] = bad
    with pytest.raises(DivergedError, match="layer 0"):
        await swarm.forward(0, x_TD, IDS_TK, GATES_TK, step=0, train=True)
    result = await forward(swarm)
    with pytest.raises(DivergedError, match="gradients"):
        await swarm.backward(result.answered, x_TD, IDS_TK.numel())
    assert [method for method, _, _ in transport.log] == ["forward"]
    assert swarm.live(0, 6).all()


async def test_a_cancelled_step_leaves_nothing_running() -> None:
    swarm, transport, _, _ = swarm_of(1)
    reached = asyncio.Event()

    async def never(peer: PeerInfo, call: ForwardCall, *, timeout_s: float) -> ForwardAnswer:
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    transport.forward = never  # type: ignore[method-assign]
    work = asyncio.create_task(forward(swarm))
    await reached.wait()
    work.cancel()
    await asyncio.wait([work])
    assert work.cancelled()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_an_expert_on_a_slow_server_loses_within_the_bound_and_only_when_asked_for() -> None:
    experts = {"p0": EXPERTS[:3], "p1": EXPERTS[3:]}
    view = View(PeerInfo(peer_id=p, address="", experts=e) for p, e in experts.items())
    clock = Clock()
    transport = Faulty({p: ExpertHost(make_banks(RUN, e)) for p, e in experts.items()})
    swarm = ExpertSwarm(
        trainer="t", transport=transport, view=lambda: view, clock_s=clock, latency=LatencyConfig(min_samples=1)
    )
    for peer_id, took_s in {"p0": 0.1, "p1": 1.6}.items():
        swarm.outlook.answered(peer_id, CallKind.FORWARD, 4, took_s)
    assert swarm.latency_bias(0, 6, bound=0.0) is None
    bias_E = swarm.latency_bias(0, 6, bound=0.5)
    assert bias_E is not None
    assert bias_E.tolist() == [0.0, 0.0, 0.0, -0.5, -0.5, -0.5]


async def test_a_step_does_not_wait_for_an_overdue_commit_while_a_replica_has_heard() -> None:
    swarm, transport, _, _ = swarm_of(2)
    for step in range(3):
        await swarm.commit(step, 64)
    stall = transport.stalled["commit", "p0"] = asyncio.Event()
    await swarm.commit(3, 64)
    assert set(swarm.view().peers) == {"p1"}, "who has not heard of the step gets no rows"
    await swarm.commit(4, 64)
    assert committed(transport)[-1] == ("p1", 4)
    stall.set()
    await settle(swarm, "p0")
    assert [step for peer, step in committed(transport) if peer == "p0"] == [0, 1, 2, 3, 4]
    assert swarm.live(0, 6).all()
    await swarm.close()


async def test_a_step_waits_for_a_commit_that_only_one_peer_can_take() -> None:
    swarm, transport, _, _ = swarm_of(1)
    for step in range(3):
        await swarm.commit(step, 64)
    stall = transport.stalled["commit", "p0"] = asyncio.Event()
    work = asyncio.create_task(swarm.commit(3, 64))
    await until(lambda: len(committed(transport)) == 4)
    for _ in range(50):
        await asyncio.sleep(0)
    assert not work.done()
    stall.set()
    await work
    assert swarm.live(0, 6).all()


async def test_a_peer_that_answers_stays_when_the_directory_has_lost_it_and_goes_when_it_fails() -> None:
    peers = [PeerInfo(peer_id=f"p{i}", address="", experts=EXPERTS) for i in range(2)]
    directory = [View(peers)]
    transport, clock = Faulty({p.peer_id: ExpertHost(make_banks(RUN, EXPERTS)) for p in peers}), Clock()
    events: list[FaultEvent] = []
    swarm = ExpertSwarm(
        trainer="t", transport=transport, view=lambda: directory[0], clock_s=clock, sleep=clock.sleep,
        on_event=events.append,
    )  # fmt: skip
    await swarm.commit(0, 64)
    directory[0] = View()
    assert set(swarm.view().peers) == {"p0", "p1"}
    assert [(e.what, e.peer) for e in events] == [("peer_unlisted", "p0"), ("peer_unlisted", "p1")]
    transport.fault = lambda method, peer: CallFailure.LATE if peer == "p0" else None
    await swarm.commit(1, 64)
    assert set(swarm.view().peers) == {"p1"}
    assert (await forward(swarm, 2)).answered_TK.all()
    clock.now_s += 1000
    assert not swarm.view().peers, "nobody has heard of it for a quarter of an hour"
    await swarm.close()


async def test_tokens_are_shared_out_among_replicas_when_asked_for() -> None:
    quiet, _, _, _ = swarm_of(1)
    expected = await forward(quiet)
    swarm, transport, _, _ = swarm_of(2, spread=True)
    for _ in range(3):
        result = await forward(swarm)
        torch.testing.assert_close(result.y_TD, expected.y_TD)
        assert sorted(one.shipment.token_R.tolist() for one in result.answered) == [[0, 1], [2, 3]]
        assert {one.peer.peer_id for one in result.answered} == {"p0", "p1"}
    assert swarm.stats.rows == 3 * X_TD.shape[0], "a token's row goes to one of them only"
    assert [peer for _, peer, _ in transport.log] != ["p0", "p1"] * 3, "they take turns with the first tokens"


async def test_the_gradients_of_a_commit_that_is_refused_are_lost_and_counted() -> None:
    swarm, transport, _, _ = swarm_of(1)
    result = await forward(swarm)
    await swarm.backward(result.answered, torch.ones_like(X_TD), IDS_TK.numel())
    transport.fault = lambda method, peer: CallFailure.REFUSED if method == "commit" else None
    await swarm.commit(0, 64)
    assert swarm.stats.lost_gradient_pairs == IDS_TK.numel()
    assert ("gradient_gone", "left_out") in transport.happened()
    await swarm.close()
