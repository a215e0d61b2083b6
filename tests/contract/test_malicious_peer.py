"""Whatever a peer answers, its caller gets an answer that fits its question or a CallError, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
import safetensors.torch
import torch
from wire_calls import make_rows

from moe_net.errors import CheckpointError
from moe_net.experts.bank import ExpertBank
from moe_net.optim import OptimizerConfig
from moe_net.proto.v1 import expert_pb2
from moe_net.rpc.base import CallError, CallFailure
from moe_net.rpc.grpc_client import SERVICE, GrpcTransport, channel_options
from moe_net.types import ExpertId, ExpertShape, PeerInfo
from moe_net.wire import codec
from moe_net.wire.messages import ForwardAnswer, ForwardCall
from moe_net.wire.snapshot import pack, unpack
from moe_net.wire.state import max_state_bytes
from moe_net.wire.validate import Limits

D = 6
SHAPE = ExpertShape(d_model=D, d_ff=5)
LAYER, INDICES = 1, (0, 2)
State = dict[str, torch.Tensor]


@asynccontextmanager
async def answering(answer: bytes, chunks: Callable[[], AsyncIterator[bytes]]) -> AsyncIterator[tuple[Any, PeerInfo]]:
    """(our transport, a peer) whose every answer is `answer`, and whose every Fetch streams `chunks`."""

    async def unary(raw: bytes, context: Any) -> bytes:
        return answer

    async def stream(raw: bytes, context: Any) -> AsyncIterator[bytes]:
        async for chunk in chunks():
            yield chunk

    handlers: dict[str, Any] = {
        name: grpc.unary_unary_rpc_method_handler(unary) for name in ("Forward", "Backward", "Commit", "Info")
    }
    handlers["Fetch"] = grpc.unary_stream_rpc_method_handler(stream)
    server = grpc.aio.server(options=channel_options(Limits()))
    service = SERVICE.strip("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    transport = GrpcTransport(run="r", shape=SHAPE)
    experts = tuple(ExpertId(LAYER, index) for index in INDICES)
    try:
        yield transport, PeerInfo(peer_id="p", address=f"127.0.0.1:{port}", experts=experts)
    finally:
        await transport.close()
        await server.stop(None)


async def no_chunks() -> AsyncIterator[bytes]:
    for nothing in ():
        yield nothing


def new_state(layer: int = LAYER, indices: tuple[int, ...] = INDICES, shape: ExpertShape = SHAPE) -> State:
    bank = ExpertBank(
        layer=layer, indices=indices, shape=shape, optimizer=OptimizerConfig(), global_batch_tokens=1, run="r",
        seed=1, init_std=0.1,
    )  # fmt: skip
    return bank.state()


def as_chunks(data: bytes, size: int = 1000) -> Callable[[], AsyncIterator[bytes]]:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(data), size):
            chunk = expert_pb2.FetchChunk(data=data[start : start + size])
            if start + size >= len(data):
                chunk.sha256 = hashlib.sha256(data).digest()
            yield chunk.SerializeToString()

    return chunks


def set_to(name: str, value: torch.Tensor) -> Callable[[State], State]:
    return lambda state: state | {name: value}


def poisoned(name: str, value: float) -> Callable[[State], State]:
    def change(state: State) -> State:
        state[name].view(-1)[-1] = value
        return state

    return change


W_IN = f"{LAYER}.0.w_in"
WRONG_STATES: dict[str, tuple[Callable[[State], State], str]] = {
    "an expert of another layer": (lambda state: state | new_state(layer=2), "2.0.m_in"),
    "an expert that was not asked": (lambda state: state | new_state(indices=(1,)), "1.1.m_in"),
    "a name that is none": (set_to("foo", torch.zeros(1)), "foo"),
    "a name with a number that is none": (set_to("1.x.w_in", torch.zeros(1)), "1.x.w_in"),
    "no expert": (lambda _: {}, "none of the experts"),
    "a field too few": (lambda state: {k: v for k, v in state.items() if k != W_IN}, "1.0.w_in is missing"),
    "another shape of as many values": (lambda state: state | {W_IN: state[W_IN].T.contiguous()}, "not torch.float32"),
    "another dtype": (lambda state: state | {W_IN: state[W_IN].long()}, "is torch.int64"),
    "a dtype that we do not have": (lambda state: state | {W_IN: state[W_IN].to(torch.complex64)}, "not 'C64'"),
    "NaN": (poisoned(W_IN, float("nan")), "not finite"),
    "infinity": (poisoned(f"{LAYER}.2.m_out", float("inf")), "not finite"),
    "a negative second moment": (poisoned(f"{LAYER}.2.v_out", -1.0), "is negative"),
    "a negative version": (set_to(f"{LAYER}.2.version", torch.tensor(-1)), "is negative"),
}


@pytest.mark.parametrize("what", WRONG_STATES)
async def test_a_fetched_state_that_is_not_what_was_asked_is_refused(what: str) -> None:
    change, reason = WRONG_STATES[what]
    data = pack(change(new_state()), run="r", shape=SHAPE)
    async with answering(b"", as_chunks(data)) as (transport, peer):
        for asked in (INDICES, ()):
            with pytest.raises(CallError, match=reason) as caught:
                await transport.fetch(peer, LAYER, asked, timeout_s=30)
            assert caught.value.failure is CallFailure.REFUSED


async def test_a_fetched_state_that_is_what_was_asked_is_taken() -> None:
    state = new_state()
    async with answering(b"", as_chunks(pack(state, run="r", shape=SHAPE))) as (transport, peer):
        for asked in (INDICES, ()):
            got = await transport.fetch(peer, LAYER, asked, timeout_s=30)
            assert got.keys() == state.keys()
            assert all(torch.equal(got[name], state[name]) for name in state)


async def test_a_fetch_without_end_is_left_after_as_many_bytes_as_the_experts_can_have() -> None:
    async def endless() -> AsyncIterator[bytes]:
        chunk = expert_pb2.FetchChunk(data=bytes(10_000)).SerializeToString()
        while True:
            yield chunk

    async with answering(b"", endless) as (transport, peer):
        with pytest.raises(CallError, match="more than these experts have") as caught:
            await transport.fetch(peer, LAYER, INDICES, timeout_s=60)
        assert caught.value.failure is CallFailure.REFUSED
        assert transport.traffic.received_bytes < max_state_bytes(len(INDICES), SHAPE) + 2 * 10_100


@pytest.mark.parametrize("d_model", [4, 64])
def test_the_bound_holds_a_whole_state_and_little_more(d_model: int) -> None:
    shape = ExpertShape(d_model=d_model, d_ff=50)
    indices = tuple(range(100_000, 100_200))
    n_bytes = len(pack(new_state(10_000, indices, shape), run="a" * 500, shape=shape))
    assert n_bytes <= max_state_bytes(len(indices), shape) <= 1.7 * n_bytes + 2**16


MALFORMED_CHUNKS = {
    "no protobuf": b"\xff\xff\xff",
    "a length beyond the end": b"\x0a\x7fabc",
    "nothing in it": b"\x12\x01a",
    "no file": expert_pb2.FetchChunk(data=b"abc", sha256=hashlib.sha256(b"abc").digest()).SerializeToString(),
    "no checksum": expert_pb2.FetchChunk(data=b"abc").SerializeToString(),
}


@pytest.mark.parametrize("what", MALFORMED_CHUNKS)
async def test_a_malformed_chunk_is_a_refusal(what: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield MALFORMED_CHUNKS[what]

    async with answering(b"", chunks) as (transport, peer):
        with pytest.raises(CallError) as caught:
            await transport.fetch(peer, LAYER, INDICES, timeout_s=30)
        assert caught.value.failure is CallFailure.REFUSED


async def test_a_damaged_file_is_a_refusal_wherever_it_is_damaged() -> None:
    data = pack(new_state(), run="r", shape=SHAPE)
    places = range(0, len(data), 13)
    next_place = iter(places)

    async def chunks() -> AsyncIterator[bytes]:
        at = next(next_place)
        damaged = data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :]
        async for chunk in as_chunks(damaged)():
            yield chunk

    async with answering(b"", chunks) as (transport, peer):
        for _ in places:
            with pytest.raises(CallError) as caught:
                await transport.fetch(peer, LAYER, INDICES, timeout_s=30)
            assert caught.value.failure is CallFailure.REFUSED


MALFORMED_INFOS = {"tag": b"\xff\xff\xff", "length": b"\x0a\x7fabc", "utf-8": b"\x0a\x02\xff\xfe"}


@pytest.mark.parametrize("what", MALFORMED_INFOS)
async def test_a_malformed_info_is_a_refusal(what: str) -> None:
    async with answering(MALFORMED_INFOS[what], no_chunks) as (transport, peer):
        with pytest.raises(CallError) as caught:
            await transport.info(peer, timeout_s=30)
    assert caught.value.failure is CallFailure.REFUSED


@pytest.mark.parametrize("expert", [8_000, 2**31, 2**32 - 1])
@pytest.mark.parametrize("how", ["failed", "version"])
async def test_an_answer_about_experts_that_were_not_asked_is_refused(how: str, expert: int) -> None:
    rows = make_rows(4, D, seed=3)
    call = ForwardCall(call_id=bytes(16), trainer="t", step=0, layer=LAYER, rows=rows)
    answer = ForwardAnswer(y_RD=torch.zeros(4, D), versions={int(rows.expert_index_P[0]): 5})
    wrong = replace(answer, failed_experts=(expert,)) if how == "failed" else replace(answer, versions={expert: 5})
    async with answering(codec.encode_forward_answer(answer), no_chunks) as (transport, peer):
        assert (await transport.forward(peer, call, timeout_s=30)).versions == answer.versions
    async with answering(codec.encode_forward_answer(wrong), no_chunks) as (transport, peer):
        with pytest.raises(CallError, match=f"expert {expert}, which was not asked") as caught:
            await transport.forward(peer, call, timeout_s=30)
    assert caught.value.failure is CallFailure.REFUSED


def test_a_header_of_many_empty_tensors_is_refused_before_it_is_looked_at() -> None:
    data = safetensors.torch.save({f"{n:032d}": torch.empty(0) for n in range(2000)}, {"moe-net": "{}"})
    with pytest.raises(CheckpointError, match=r"a header of 1\d{5} bytes"):
        unpack(data, run="r", shape=SHAPE)


def test_a_snapshot_of_another_run_is_refused_in_few_words() -> None:
    with pytest.raises(CheckpointError) as caught:
        unpack(pack(new_state(), run="r" * 2000, shape=SHAPE), run="r", shape=SHAPE)
    assert len(str(caught.value)) < 200
