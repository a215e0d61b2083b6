"""Two replicas meet over real gRPC: what both have afterwards, and what a broken or forged meeting leaves."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from grpc import StatusCode
from swarms import small_run
from torch import Tensor

import moe_peer.gossip
from moe_net.client import make_banks
from moe_net.errors import BusyError
from moe_net.experts.bank import ExpertBank
from moe_net.experts.host import ExpertHost
from moe_net.experts.lineage import Lineage
from moe_net.experts.replicate import lineage_of
from moe_net.placement.view import View
from moe_net.proto.v1 import expert_pb2
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.grpc_client import SERVICE, GrpcTransport
from moe_net.types import ExpertId, PeerInfo
from moe_net.wire.exchange import ExchangeHead
from moe_net.wire.messages import BackwardAnswer, BackwardCall, CommitCall, RoutedRows
from moe_net.wire.snapshot import pack
from moe_net.wire.state import MAX_ORIGINS
from moe_peer.gossip import Gossip, Meeting
from moe_peer.server import ExpertServer

RUN = small_run()
D = RUN.model.d_model
SHAPE = RUN.model.expert_shape
ALL = list(range(RUN.model.n_experts))


class Host(ExpertHost):
    """A real one that can be told to stand still in the middle of a meeting."""

    def __init__(self, experts: Sequence[ExpertId] = RUN.model.expert_ids, *, origin: int = 1) -> None:
        super().__init__(make_banks(RUN, experts, origin=origin))
        self.gate, self.begun, self.steps = threading.Event(), threading.Semaphore(0), 0
        self.gate.set()

    def fetch(self, layer: int, indices: Sequence[int], *, with_sums: bool = True) -> dict[str, Tensor]:
        self.begun.release()
        assert self.gate.wait(60)
        return super().fetch(layer, indices, with_sums=with_sums)

    def bank(self, layer: int = 0) -> ExpertBank:
        return self._banks[layer]

    def everything(self) -> list[Tensor]:
        banks = self._banks.values()
        return [t.clone() for b in banks for s in (b._optimizer.w, b._optimizer.m, b._optimizer.v) for t in s]


def backward_call(host: Host, rows: Mapping[int, int], *, seed: int, trainer: str = "t") -> BackwardCall:
    """A gradient of `rows[index]` rows for each expert of layer 0."""
    draw = torch.Generator().manual_seed(seed)
    index_P = [index for index, n in rows.items() for _ in range(n)]
    routed = RoutedRows(
        x_RD=torch.randn(len(index_P), D, generator=draw),
        experts_per_row_R=torch.ones(len(index_P), dtype=torch.int32),
        expert_index_P=torch.tensor(index_P, dtype=torch.int32),
        gate_P=torch.ones(len(index_P)),
    )
    return BackwardCall(
        call_id=seed.to_bytes(16, "big"), trainer=trainer, step=host.steps, layer=0,
        grad_RD=torch.randn(len(index_P), D, generator=draw), rows=routed,
    )  # fmt: skip


def learn(host: Host, rows: Mapping[int, int], *, seed: int) -> None:
    call = backward_call(host, rows, seed=seed)
    assert isinstance(host.backward_many([call])[0], BackwardAnswer)
    commit = CommitCall(trainer="t", step=host.steps, tokens=RUN.global_batch_tokens, calls=(call.call_id,))
    assert host.commit(commit).stepped
    host.steps += 1


@dataclass
class Pair:
    """Two servers; a's id is the smaller one."""

    a: Host
    b: Host
    server_a: ExpertServer
    server_b: ExpertServer
    transport: GrpcTransport
    """Of a."""
    peer_a: PeerInfo
    peer_b: PeerInfo
    met: list[Meeting] = field(default_factory=list[Meeting])
    """As b saw them."""

    async def meet(self, indices: Sequence[int] = ALL) -> None:
        await self.server_a.replicator.meet(self.transport, self.peer_b, 0, indices)


@asynccontextmanager
async def pair(
    a: Host | None = None, b: Host | None = None, transport: type[GrpcTransport] = GrpcTransport
) -> AsyncIterator[Pair]:
    a, b = a or Host(), b or Host(origin=2)
    met: list[Meeting] = []
    async with (
        ExpertServer.serving(a, run=RUN, peer_id="a", listen="127.0.0.1:0", grace_s=1.0) as server_a,
        ExpertServer.serving(
            b, run=RUN, peer_id="b", listen="127.0.0.1:0", grace_s=1.0, on_meeting=met.append
        ) as server_b,
    ):
        infos = [
            PeerInfo(peer_id=name, address=server.address, experts=host.experts)
            for name, server, host in (("a", server_a, a), ("b", server_b, b))
        ]
        link = transport(run=RUN.name, shape=SHAPE)
        try:
            yield Pair(a, b, server_a, server_b, link, *infos, met)
        finally:
            b.gate.set()
            await link.close()


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


async def test_both_have_the_mean_weighted_by_the_rows_each_has_stepped_on() -> None:
    async with pair() as p:
        learn(p.a, {0: 3, 1: 2, 4: 1}, seed=1)
        learn(p.b, {0: 1, 2: 5, 4: 1}, seed=2)
        learn(p.b, {2: 5}, seed=3)
        a, b = p.a.fetch(0, ()), p.b.fetch(0, ())
        layer_1 = p.a.fetch(1, ())
        await p.meet()
        for name, value in p.a.fetch(0, ()).items():
            assert torch.equal(value, p.b.fetch(0, ())[name]), name
            index, what = int(name.split(".")[1]), name.split(".")[2]
            if what == "version":
                assert int(value) == 2
            if what in ("version", "lineage"):
                continue
            share = {0: 1 / 4, 1: 0.0, 2: 1.0, 4: 1 / 2}.get(index, 1.0)  # 3, 5: b has made more steps
            torch.testing.assert_close(value, a[name] * (1 - share) + b[name] * share)
        assert same(list(p.a.fetch(1, ()).values()), list(layer_1.values())), "of another layer nothing was said"
    (meeting,) = p.met
    assert (meeting.partner, meeting.layer, meeting.experts) == ("a", 0, 6)
    assert 0 < meeting.divergence < 1
    assert meeting.n_bytes == p.transport.traffic.sent_bytes + p.transport.traffic.received_bytes


async def test_the_next_meeting_weighs_only_what_came_since() -> None:
    async with pair() as p:
        learn(p.a, {0: 30}, seed=1)
        learn(p.b, {0: 10}, seed=2)
        await p.meet([0])
        learn(p.a, {0: 1}, seed=3)
        learn(p.b, {0: 3}, seed=4)
        a, b = p.a.fetch(0, [0]), p.b.fetch(0, [0])
        await p.meet([0])
        torch.testing.assert_close(p.a.fetch(0, [0])["0.0.w_in"], a["0.0.w_in"] * 0.25 + b["0.0.w_in"] * 0.75)
        await p.meet([0])
    assert p.met[-1].divergence == 0


async def test_a_fresh_replica_takes_over_the_other_bit_for_bit() -> None:
    async with pair() as p:
        learn(p.b, {0: 4, 5: 2}, seed=1)
        before = p.b.everything()
        await p.meet()
        assert same(p.b.everything(), before)
        assert all(torch.equal(v, p.b.fetch(0, ())[n]) for n, v in p.a.fetch(0, ()).items())


async def test_what_came_with_a_fetch_counts_once() -> None:
    async with pair() as p:
        learn(p.b, {0: 1000}, seed=1)
        p.a.load_state(await p.transport.fetch(p.peer_b, 0, [0], timeout_s=10))
        learn(p.a, {0: 2}, seed=2)
        learn(p.b, {0: 2}, seed=3)
        a, b = p.a.fetch(0, [0]), p.b.fetch(0, [0])
        await p.meet([0])
        torch.testing.assert_close(p.a.fetch(0, [0])["0.0.w_in"], (a["0.0.w_in"] + b["0.0.w_in"]) / 2)


class Slow(GrpcTransport):
    """While the answer is under way the initiator makes another step."""

    meanwhile: Callable[[], None]

    async def exchange(
        self, peer: PeerInfo, head: ExchangeHead, state: Mapping[str, Tensor], *, timeout_s: float
    ) -> dict[str, Tensor]:
        answer = await super().exchange(peer, head, state, timeout_s=timeout_s)
        self.meanwhile()
        return answer


async def test_steps_made_meanwhile_are_kept_and_weigh_in_the_next_meeting() -> None:
    async with pair(transport=Slow) as p:
        assert isinstance(p.transport, Slow)
        learn(p.a, {0: 2}, seed=1)
        learn(p.b, {0: 2}, seed=2)
        sent = p.a.fetch(0, [0])
        p.transport.meanwhile = lambda: learn(p.a, {0: 7}, seed=3)
        alone = Host()
        learn(alone, {0: 2}, seed=1)
        learn(alone, {0: 7}, seed=3)
        await p.meet([0])
        mean, now = p.b.fetch(0, [0]), alone.fetch(0, [0])
        for name, value in p.a.fetch(0, [0]).items():
            if "v_" not in name and "lineage" not in name:
                torch.testing.assert_close(value, mean[name] + (now[name] - sent[name]))
            assert bool((value >= 0).all()) or "v_" not in name
        assert int(p.a.fetch(0, [0])["0.0.version"]) == 2
        ours, theirs = p.a.bank().lineages[0], p.b.bank().lineages[0]
        assert (ours.unseen_by(theirs), theirs.unseen_by(ours)) == (7, 0)


async def test_what_is_staged_and_committed_stays_and_is_made_at_the_weights_of_then() -> None:
    async with pair() as p:
        learn(p.b, {0: 3}, seed=1)
        calls = [backward_call(p.a, {0: 2}, seed=2), backward_call(p.a, {1: 2}, seed=3)]
        for call in calls:
            p.a.backward_many([call])
        p.a.commit(CommitCall(trainer="t", step=0, tokens=5, calls=tuple(call.call_id for call in calls)))
        generation = p.a.bank()._generation
        await p.meet()
        assert p.a.committed_tokens == 5
        assert p.a.bank()._generation > generation
        other = Host()
        other.replace_state(0, p.a.fetch(0, ALL, with_sums=False))
        for call in calls:
            other.backward_many([call])
        other.commit(CommitCall(trainer="t", step=0, tokens=5, calls=tuple(call.call_id for call in calls)))
        sums, expected = (
            {n: v for n, v in host.fetch(0, ALL).items() if n.endswith(("g_in", "g_out"))} for host in (p.a, other)
        )
        assert sums.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in sums.items())
        generation = p.a.bank()._generation
        await p.meet()
        assert p.a.bank()._generation == generation, "equal replicas change nothing"


async def test_a_partner_that_dies_half_way_leaves_the_initiator_as_it_was() -> None:
    async with pair() as p:
        learn(p.a, {0: 3}, seed=1)
        learn(p.b, {0: 3}, seed=2)
        before = p.a.everything()
        p.b.begun = threading.Semaphore(0)
        p.b.gate.clear()
        meeting = asyncio.create_task(p.meet())
        assert await asyncio.to_thread(p.b.begun.acquire, timeout=60)
        stopping = asyncio.create_task(p.server_b.stop(grace_s=0))
        with pytest.raises(CallError) as caught:
            await meeting
        assert caught.value.failure is CallFailure.UNREACHABLE
        p.b.gate.set()
        await stopping
        assert same(p.a.everything(), before)
        assert p.server_a.replicator._in_flight == set()
        assert p.a.bank().lineages[0] == Lineage().plus(1, 3, 1), "they have not met"


async def test_two_that_ask_each_other_at_once_refuse_and_do_not_wait() -> None:
    async with pair() as p:
        p.b.gate.clear()
        learn(p.a, {0: 3}, seed=1)
        p.b.begun = threading.Semaphore(0)
        # b's own exchange of the layer has begun: it stands still taking its copy.
        theirs = asyncio.create_task(p.server_b.replicator.meet(p.transport, p.peer_a, 0, ALL))
        assert await asyncio.to_thread(p.b.begun.acquire, timeout=60)
        with pytest.raises(CallError, match="in an exchange already") as caught:
            await p.meet()
        assert caught.value.failure is CallFailure.BUSY
        with pytest.raises(BusyError):
            await p.server_b.replicator.meet(p.transport, p.peer_a, 0, ALL)
        p.b.gate.set()
        await theirs
        await p.meet()


async def test_who_invents_origins_does_not_make_us_forget_our_own_rows() -> None:
    async with pair() as p:
        learn(p.b, {0: 3}, seed=1)
        invented = torch.tensor([[100 + i, 7, 9] for i in range(MAX_ORIGINS)])
        forged = p.a.fetch(0, [0]) | {"0.0.lineage": invented, "0.0.version": torch.tensor(9)}
        head = ExchangeHead(peer_id="x", layer=0, indices=(0,))
        mean = await p.transport.exchange(p.peer_b, head, forged, timeout_s=30)
        assert lineage_of(mean, "0.0").rows_of(2) == 3
        learn(p.b, {0: 2}, seed=2)
        assert p.b.bank().lineages[0].rows_of(2) == 5
        await p.server_b.replicator.meet(p.transport, p.peer_a, 0, [0])
        assert p.b.bank().lineages[0].rows_of(2) == 5


def chunk(**fields: Any) -> expert_pb2.ExchangeChunk:
    return expert_pb2.ExchangeChunk(**fields)


def whole(data: bytes, **fields: Any) -> list[bytes]:
    named: dict[str, Any] = {"peer_id": "x", "layer": 0, "expert_index": [0, 1]}
    sha256 = hashlib.sha256(data).digest()
    return [chunk(**{"data": data, "sha256": sha256, **named, **fields}).SerializeToString()]


def state_bytes(
    indices: Sequence[int] = (0, 1), layer: int = 0, change: Callable[[dict[str, Tensor]], Any] = lambda _: None
) -> bytes:
    state = Host().fetch(layer, indices)
    change(state)
    return pack(state, run=RUN.name, shape=SHAPE)


def put(name: str, value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: state[name].view(-1)[:1].fill_(value)


def lineage(rows: list[list[int]]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: state.update({"0.1.lineage": torch.tensor(rows)})


def misshapen(state: dict[str, Tensor]) -> None:
    state["0.0.w_in"] = torch.zeros(2)


BAD, MUCH = {StatusCode.INVALID_ARGUMENT}, {StatusCode.OUT_OF_RANGE}
NOT_HERE = {StatusCode.NOT_FOUND}
FORGED: dict[str, tuple[Callable[[], list[bytes]], set[StatusCode], str]] = {
    "nothing": (list, BAD, "data: empty"),
    "no protobuf": (lambda: [b"\xff" * 40], BAD, "ExchangeChunk"),
    "no data": (lambda: whole(b""), BAD, "data: empty"),
    "no name": (lambda: whole(b"x", peer_id=""), BAD, "peer_id: 0 bytes"),
    "a long name": (lambda: whole(b"x", peer_id="x" * 500), BAD, "peer_id: 500 bytes"),
    "our own name": (lambda: whole(b"x", peer_id="b"), BAD, "our own"),
    "no experts": (lambda: whole(b"x", expert_index=[]), BAD, "expert_index: 0 experts"),
    "an expert twice": (lambda: whole(b"x", expert_index=[1, 1]), BAD, "twice"),
    "an unknown expert": (lambda: whole(b"x", expert_index=[0, 99]), NOT_HERE, "experts 99 of layer 0"),
    "an unknown layer": (lambda: whole(b"x", layer=9), NOT_HERE, "layer 9"),
    "too long": (lambda: whole(bytes(1 << 20)), MUCH, "the most that 2 experts take"),
    "another checksum": (lambda: whole(state_bytes(), sha256=b"x" * 32), BAD, "do not match their sha256"),
    "no checksum": (lambda: whole(state_bytes(), sha256=b""), BAD, "end early"),
    "data behind the checksum": (lambda: whole(state_bytes()) * 2, BAD, "earlier chunk than the last"),
    "a second head": (lambda: whole(b"x", sha256=b"") + whole(b"x"), BAD, "only the first chunk"),
    "no file": (lambda: whole(b"junk" * 9), BAD, "data: not a safetensors file"),
    "other experts than named": (lambda: whole(state_bytes((0, 2))), BAD, "not of the experts"),
    "another layer": (lambda: whole(state_bytes(layer=1)), BAD, "no expert of this bank"),
    "not finite": (lambda: whole(state_bytes(change=put("0.1.w_in", float("nan")))), BAD, "not finite"),
    "negative second moment": (lambda: whole(state_bytes(change=put("0.1.v_in", -1e-9))), BAD, "negative"),
    "negative version": (lambda: whole(state_bytes(change=put("0.1.version", -1))), BAD, "negative"),
    "a shape of its own": (lambda: whole(state_bytes(change=misshapen)), BAD, "0.0.w_in is"),
    "a lineage of another shape": (lambda: whole(state_bytes(change=lineage([[1, 2]]))), BAD, "lineage is"),
    "a long lineage": (lambda: whole(state_bytes(change=lineage([[i, 1, 1] for i in range(99)]))), BAD, "lineage is"),
    "a negative lineage": (lambda: whole(state_bytes(change=lineage([[1, -1, 1]]))), BAD, "negative or over"),
    "a huge lineage": (lambda: whole(state_bytes(change=lineage([[1, 1, 2**60]]))), BAD, "negative or over"),
    "an origin twice": (lambda: whole(state_bytes(change=lineage([[1, 1, 1], [1, 2, 1]]))), BAD, "an origin twice"),
    "a missing field": (lambda: whole(state_bytes(change=lambda s: s.pop("0.0.m_in"))), BAD, "0.0.m_in is missing"),
    "a mean that overflows": (lambda: whole(state_bytes(change=put("0.1.w_in", 3.4e38))), BAD, "no mean"),
}  # fmt: skip


async def status_of(address: str, messages: list[bytes]) -> tuple[StatusCode, str]:
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:

        async def send() -> AsyncIterator[bytes]:
            for message in messages:
                yield message

        call = channel.stream_stream(SERVICE + "Exchange")(send(), timeout=30)
        try:
            while await call.read():  # empty: grpc.aio.EOF
                pass
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        return StatusCode.OK, ""


async def test_forged_and_malformed_exchanges_get_a_status_and_change_nothing() -> None:
    async with pair() as p:
        learn(p.b, {0: 2, 1: 2}, seed=1)
        with torch.no_grad():
            p.b.bank()._weights.w_in_EDH[1, 0, 0] = -3e38  # so that a mean can overflow
        before = p.b.everything()
        for what, (messages, codes, reason) in FORGED.items():
            code, details = await status_of(p.server_b.address, messages())
            assert code in codes, (what, code, details)
            assert reason in details, (what, details)
            assert same(p.b.everything(), before), what
        assert (p.server_b.replicator._in_flight, p.server_b.replicator._answering) == (set(), 0)
        code, details = await status_of(p.server_b.address, whole(state_bytes((0,)), expert_index=[0]))
        assert code is StatusCode.OK, details


async def test_a_partner_that_stops_in_the_middle_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_peer.gossip, "patience_s", lambda _: 0.05)
    monkeypatch.setattr(moe_peer.gossip, "PATIENCE_S", 0.05)
    async with pair() as p:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(p.server_b.address, options=options) as channel:
            for first in ([], whole(b"x", sha256=b"")):
                stalled = channel.stream_stream(SERVICE + "Exchange")(timeout=30)
                for message in first:
                    await stalled.write(message)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stalled.read()
                assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
        assert (p.server_b.replicator._in_flight, p.server_b.replicator._answering) == (set(), 0)


async def test_no_more_than_so_many_are_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_peer.gossip, "MAX_ANSWERS", 0)
    async with pair() as p:
        with pytest.raises(CallError, match="at most 0 may be") as caught:
            await p.meet()
    assert caught.value.failure is CallFailure.BUSY


async def test_gossip_meets_the_larger_ids_in_turn_every_shared_layer_and_nobody_else() -> None:
    async with pair() as p:
        others = [
            PeerInfo(peer_id="0", address="127.0.0.1:1", experts=p.a.experts),
            PeerInfo(peer_id="c", address="127.0.0.1:1", experts=(ExpertId(1, 2),)),
            PeerInfo(peer_id="d", address="127.0.0.1:1", experts=(ExpertId(7, 7),)),
        ]
        view = View([p.peer_a, p.peer_b, *others])
        gossip = Gossip(p.server_a.replicator, p.transport, p.a, lambda: view, peer_id="a", every_s=0.0)
        turns: list[str] = []
        for _ in range(3):
            partner = gossip.next_partner()
            assert partner is not None
            turns.append(partner.peer_id)
            await gossip.turn()
        assert turns == ["b", "c", "b"]
        assert [m.layer for m in p.met] == [0, 1, 0, 1]
        alone = Gossip(p.server_a.replicator, p.transport, p.a, lambda: View([p.peer_a]), peer_id="a", every_s=0.01)
        assert alone.next_partner() is None
        learn(p.a, {0: 3}, seed=1)
        async with gossip, asyncio.timeout(30):
            while not same(p.a.everything(), p.b.everything()):  # noqa: ASYNC110
                await asyncio.sleep(0)


async def test_replicas_at_which_nothing_happens_meet_seldomer_until_something_does() -> None:
    async with pair() as p:
        view = View([p.peer_a, p.peer_b])
        gossip = Gossip(p.server_a.replicator, p.transport, p.a, lambda: view, peer_id="a", every_s=1000.0)
        for _ in range(3):
            await gossip.turn()
        assert [m.layer for m in p.met] == [0, 1], "both are fresh: once was enough"
        learn(p.b, {0: 3}, seed=1)
        await gossip.turn()
        assert len(p.met) == 2, "nothing happened here, and it is not long ago"
        learn(p.a, {1: 3}, seed=2)
        await gossip.turn()
        assert [m.layer for m in p.met] == [0, 1, 0, 1]
        assert same(p.a.everything(), p.b.everything())
        await gossip.turn()
        assert [m.layer for m in p.met] == [0, 1, 0, 1, 0], "what has changed us once may do so again"


async def test_the_pause_grows_to_its_bound() -> None:
    async with pair() as p:
        view, now_s = View([p.peer_a, p.peer_b]), 0.0
        gossip = Gossip(
            p.server_a.replicator, p.transport, p.a, lambda: view, peer_id="a", every_s=8.0, clock_s=lambda: now_s
        )
        met_at_s: list[float] = []
        for turn in range(75):
            now_s, before = 2.0 * turn, len(p.met)
            await gossip.turn()
            if len(p.met) > before:
                met_at_s.append(now_s)
        assert met_at_s == [0, 8, 24, 54, 84, 114, 144]
