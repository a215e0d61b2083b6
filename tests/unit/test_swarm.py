"""rpc/swarm: fail-over to replicas, retries that cannot count twice, commits in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch
from swarms import small_run

from moe_net.client import make_banks
from moe_net.errors import DivergedError
from moe_net.experts.host import ExpertHost
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.local import LocalTransport
from moe_net.rpc.policy import CallPolicy
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.types import PeerInfo
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitAnswer, CommitCall, ForwardAnswer, ForwardCall

RUN = small_run()
EXPERTS = tuple(e for e in RUN.model.expert_ids if e.layer == 0)
IDS_TK = torch.tensor([[0, 3], [5, 1], [2, 4], [0, 1]])
GATES_TK = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
X_TD = torch.randn(4, RUN.model.d_model, generator=torch.Generator().manual_seed(1))

Fault = Callable[[str, str], CallFailure | None]


class Faulty(LocalTransport):
    """Asks `fault(method, peer)` before each call, `lost_answer` after it; keeps a log."""

    def __init__(self, hosts: dict[str, ExpertHost]) -> None:
        super().__init__(hosts)
        self.log: list[tuple[str, str, object]] = []
        self.fault: Fault = lambda method, peer: None
        self.lost_answer: Fault = lambda method, peer: None

    def _check(self, fault: Fault, method: str, peer: PeerInfo) -> None:
        failure = fault(method, peer.peer_id)
        if failure is not None:
            raise CallError(failure, peer.peer_id, "injected")

    async def forward(self, peer: PeerInfo, call: ForwardCall, *, timeout_s: float) -> ForwardAnswer:
        self.log.append(("forward", peer.peer_id, call))
        self._check(self.fault, "forward", peer)
        return await super().forward(peer, call, timeout_s=timeout_s)

    async def backward(self, peer: PeerInfo, call: BackwardCall, *, timeout_s: float) -> BackwardAnswer:
        self.log.append(("backward", peer.peer_id, call))
        self._check(self.fault, "backward", peer)
        answer = await super().backward(peer, call, timeout_s=timeout_s)
        self._check(self.lost_answer, "backward", peer)
        return answer

    async def commit(self, peer: PeerInfo, call: CommitCall, *, timeout_s: float) -> CommitAnswer:
        self.log.append(("commit", peer.peer_id, call.step))
        self._check(self.fault, "commit", peer)
        return await super().commit(peer, call, timeout_s=timeout_s)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def swarm_of(replicas: int, *, cache_bytes: int = 2**20) -> tuple[ExpertSwarm, Faulty, dict[str, ExpertHost], Clock]:
    """Peers p0, p1, ..: each hosts the whole layer."""
    peers = [PeerInfo(peer_id=f"p{i}", address="", experts=EXPERTS) for i in range(replicas)]
    hosts = {p.peer_id: ExpertHost(make_banks(RUN, EXPERTS), cache_bytes=cache_bytes) for p in peers}
    transport, view, clock = Faulty(hosts), View(peers), Clock()
    policy = CallPolicy(attempts=3, retry_pause_s=1e-6)
    return (
        ExpertSwarm(trainer="t", transport=transport, view=lambda: view, policy=policy, clock_s=clock),
        transport,
        hosts,
        clock,
    )


async def forward(swarm: ExpertSwarm, step: int = 0):
    return await swarm.forward(0, X_TD, IDS_TK, GATES_TK, step=step, train=True)


def grads(host: ExpertHost) -> torch.Tensor:
    """Change of the weights by the next step: shows which gradients are in."""
    before = {k: v for k, v in host.fetch(0, []).items() if k.endswith("w_in")}
    host.commit(CommitCall(trainer="probe", step=0, tokens=RUN.global_batch_tokens))
    after = host.fetch(0, [])
    return torch.stack([after[k] - before[k] for k in sorted(before)])


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
    for lose in (0, 1, 2):
        swarm, transport, hosts, _ = swarm_of(1)
        result = await forward(swarm)
        left = [lose]

        def lost(method: str, peer: str, left: list[int] = left) -> CallFailure | None:
            left[0] -= 1
            return CallFailure.LATE if left[0] >= 0 else None

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
    small, small_transport, small_hosts, _ = swarm_of(1, cache_bytes=1)
    result = await forward(small)
    got = await small.backward(result.answered, torch.ones_like(X_TD), IDS_TK.numel())
    sent = [call for method, _, call in small_transport.log if method == "backward"]
    assert [call.rows is None for call in sent] == [True, False]
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    torch.testing.assert_close(grads(small_hosts["p0"]), grads(hosts["p0"]))
    assert small.stats.lost_gradient_pairs == 0


async def test_commits_reach_a_peer_in_order_and_rows_do_not_overtake_them() -> None:
    swarm, transport, hosts, clock = swarm_of(1)
    await forward(swarm)
    transport.fault = lambda method, peer: CallFailure.UNREACHABLE if method == "commit" else None
    await swarm.commit(0, 64)
    assert hosts["p0"].committed_tokens == 0
    clock.now_s += 1000  # No suspension lasts so long; only the missed commit keeps the peer out.
    assert not swarm.view().peers
    assert not swarm.live(0, 6).any()
    result = await forward(swarm, step=1)
    assert not result.answered_TK.any(), "rows of step 1 overtook the commit of step 0"
    transport.fault = lambda method, peer: None
    transport.log.clear()
    await swarm.commit(1, 64)
    assert transport.log == [("commit", "p0", 0), ("commit", "p0", 1)]
    assert set(hosts["p0"].versions[0].values()) == {2}
    assert swarm.live(0, 6).all()


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
