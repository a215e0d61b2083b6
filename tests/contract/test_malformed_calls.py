"""Whatever bytes arrive get a gRPC status with a reason, cost no more than the limits, change nothing."""

from __future__ import annotations

import asyncio
import itertools
import resource
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
import torch
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_net.client import make_banks
from moe_net.config import RunConfig
from moe_net.experts.host import ExpertHost
from moe_net.model.config import ModelConfig, RouterConfig
from moe_net.proto.v1 import expert_pb2
from moe_net.rpc.grpc_client import SERVICE
from moe_net.types import Encoding
from moe_net.wire import compress
from moe_net.wire.validate import Limits
from moe_peer.server import ExpertServer

D, LAYER, N_EXPERTS = 8, 0, 4
RUN = RunConfig(
    name="malformed",
    model=ModelConfig(
        d_model=D, d_ff_expert=4, n_layers=1, n_experts=N_EXPERTS, n_heads=1, n_kv_heads=1, head_dim=8,
        router=RouterConfig(experts_per_token=2),
    ),
    global_batch_tokens=1 << 62,
)  # fmt: skip
LIMITS = Limits(max_message_bytes=1 << 20, max_rows=1024, max_experts_per_row=8)
KNOWN_ID, UNKNOWN_ID = b"k" * 16, b"u" * 16
FRESH = itertools.count()

# What a caller's mistake may be called. Not UNKNOWN or INTERNAL: that would be ours.
REFUSALS = {
    StatusCode.INVALID_ARGUMENT,
    StatusCode.OUT_OF_RANGE,
    StatusCode.NOT_FOUND,
    StatusCode.FAILED_PRECONDITION,
    StatusCode.ABORTED,
    StatusCode.RESOURCE_EXHAUSTED,
}
BAD, TOO_MUCH, NOT_HERE = {StatusCode.INVALID_ARGUMENT}, {StatusCode.OUT_OF_RANGE}, {StatusCode.NOT_FOUND}
Request = Any


@dataclass
class Target:
    """A server that has a call open and a step committed, its raw channel, and a loop of its own."""

    runner: asyncio.Runner
    host: ExpertHost
    channel: grpc.aio.Channel
    known: list[Any] = field(default_factory=list[Any])
    """Its state after the last call that was valid."""

    def state(self) -> list[Any]:
        """Everything that a call may change, as values."""
        bank = self.host._banks[LAYER]
        tensors = [v for _, v in sorted(bank.state().items())]
        staging = self.host._staging
        tensors += [call.grad.grad_RD for _, call in sorted(staging._calls.items()) if call.grad is not None]
        trainers = {name: (t.last_committed_step, sorted(t.calls)) for name, t in staging._trainers.items()}
        sizes = (staging.n_bytes, trainers)
        return [torch.cat([t.flatten().double() for t in tensors]), self.host.committed_tokens, bank.versions, sizes]

    def send(self, method: str, data: bytes) -> tuple[StatusCode, str]:
        async def call() -> tuple[StatusCode, str]:
            try:
                if method == "Fetch":
                    await self.channel.unary_stream(SERVICE + method)(data, timeout=30).read()
                else:
                    await self.channel.unary_unary(SERVICE + method)(data, timeout=30)
            except grpc.aio.AioRpcError as error:
                return error.code(), error.details() or ""
            return StatusCode.OK, ""

        return self.runner.run(call())


def same(before: list[Any], after: list[Any]) -> bool:
    return torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with asyncio.Runner() as runner:
        host = ExpertHost(make_banks(RUN, [e for e in RUN.model.expert_ids if e.index < N_EXPERTS - 1]))
        server = ExpertServer(host, run=RUN, peer_id="p", limits=LIMITS)
        address = runner.run(server.start("127.0.0.1:0"))

        async def connect() -> grpc.aio.Channel:
            options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
            return grpc.aio.insecure_channel(address, options=options)

        target = Target(runner, host, runner.run(connect()))
        assert target.send("Commit", commit().SerializeToString())[0] is StatusCode.OK
        assert target.send("Forward", forward(KNOWN_ID).SerializeToString())[0] is StatusCode.OK
        assert target.send("Forward", forward(b"a" * 16).SerializeToString())[0] is StatusCode.OK
        assert target.send("Backward", backward(b"a" * 16).SerializeToString())[0] is StatusCode.OK
        target.known = target.state()
        try:
            yield target
        finally:
            runner.run(target.channel.close())
            runner.run(server.stop())


def put_matrix(request: Request, name: str, n_rows: int, cols: int, encoding: Encoding, fill: float = 0.5) -> None:
    values = torch.full((n_rows, cols), fill)
    getattr(request, name).rows, getattr(request, name).cols = n_rows, cols
    getattr(request, name).encoding = int(encoding)
    setattr(request, f"{name}_data", bytes(compress.encode(values, encoding)))


def put_routing(request: Request) -> None:
    request.experts_per_row.extend([1, 2, 1])
    request.expert_index.extend([0, 1, 2, 0])
    request.gate.extend([0.5, 0.25, 0.75, 1.0])


def forward(call_id: bytes = UNKNOWN_ID, encoding: Encoding = Encoding.FP32, *, train: bool = True) -> Request:
    request = expert_pb2.ForwardRequest(
        call_id=call_id, trainer="t", step=5, layer=LAYER, train=train, reply_encoding=int(encoding),  # type: ignore[arg-type]
    )  # fmt: skip
    put_matrix(request, "x", 3, D, encoding)
    put_routing(request)
    return request


def backward(call_id: bytes = KNOWN_ID, encoding: Encoding = Encoding.FP32, *, resend: bool = False) -> Request:
    request = expert_pb2.BackwardRequest(
        call_id=call_id, trainer="t", step=5, layer=LAYER, reply_encoding=int(encoding),  # type: ignore[arg-type]
    )  # fmt: skip
    put_matrix(request, "grad", 3, D, encoding)
    if resend:
        put_matrix(request, "x", 3, D, encoding)
        put_routing(request)
    return request


def commit() -> Request:
    return expert_pb2.CommitRequest(trainer="t", step=1, tokens=10)


@dataclass(frozen=True)
class Mistake:
    """Something wrong, done to a request about matrix `name`; what it must be called."""

    do: Callable[[Any, Request, str], object]
    codes: set[StatusCode]
    needs_routing: bool = False


def resize(draw: Any, request: Request, name: str) -> None:
    cols = draw(st.integers(1, 40).filter(lambda n: n != D))
    put_matrix(request, name, 3, cols, Encoding(getattr(request, name).encoding))
    if name == "grad" and request.HasField("x"):
        put_matrix(request, "x", 3, cols, Encoding(request.x.encoding))


def cut_data(draw: Any, request: Request, name: str) -> None:
    data = getattr(request, f"{name}_data")
    setattr(request, f"{name}_data", data[: draw(st.integers(0, len(data) - 1))])


def grow_data(draw: Any, request: Request, name: str) -> None:
    extra = draw(st.binary(min_size=1, max_size=70))
    setattr(request, f"{name}_data", getattr(request, f"{name}_data") + extra)


def poison(draw: Any, request: Request, name: str) -> None:
    put_matrix(request, name, 3, D, Encoding.FP32)
    data = bytearray(getattr(request, f"{name}_data"))
    value = draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    struct.pack_into("<f", data, 4 * draw(st.integers(0, 3 * D - 1)), value)
    setattr(request, f"{name}_data", bytes(data))


def poison_16(draw: Any, request: Request, name: str) -> None:
    encoding, bits = draw(st.sampled_from([(Encoding.BF16, 0x7F80), (Encoding.FP16, 0x7C00)]))
    put_matrix(request, name, 3, D, encoding)
    data = bytearray(getattr(request, f"{name}_data"))
    struct.pack_into("<H", data, 2 * draw(st.integers(0, 3 * D - 1)), bits | draw(st.integers(0, 1)))
    setattr(request, f"{name}_data", bytes(data))


def poison_scale(draw: Any, request: Request, name: str) -> None:
    put_matrix(request, name, 3, D, Encoding.INT8)
    data = getattr(request, f"{name}_data")
    # Three rows of one block each: the scales are the last three floats. 3e38 * 127 is infinite.
    bad = draw(st.sampled_from([float("nan"), float("inf"), 3e38]))
    setattr(request, f"{name}_data", data[:-12] + struct.pack("<f", bad) * 3)


def huge(draw: Any, request: Request, name: str) -> None:
    """A claim of a GiB or more, in rows, in columns, or in both."""
    rows, cols = draw(st.sampled_from([(1 << 28, 1), (1024, 1 << 18), (1 << 31, 1 << 31), (0xFFFFFFFF, 0xFFFFFFFF)]))
    for matrix in ("x", "grad"):
        if matrix == name or (matrix in request.DESCRIPTOR.fields_by_name and request.HasField(matrix)):
            getattr(request, matrix).rows, getattr(request, matrix).cols = rows, cols


def set_pairs(request: Request, **values: list[Any]) -> None:
    for field_name, value in values.items():
        request.ClearField(field_name)
        getattr(request, field_name).extend(value)


def any_encoding_but(number: int) -> st.SearchStrategy[int]:
    return st.integers(0, 2**31 - 1).filter(lambda n: n not in (1, 2, 3, 4) and n != number)


MISTAKES: dict[str, Mistake] = {
    "wrong width": Mistake(resize, BAD),
    "data cut short": Mistake(cut_data, BAD),
    "data too long": Mistake(grow_data, BAD),
    "unknown encoding": Mistake(
        lambda draw, r, name: setattr(getattr(r, name), "encoding", draw(any_encoding_but(0))), BAD
    ),
    "another encoding than the data's": Mistake(
        lambda draw, r, name: setattr(getattr(r, name), "encoding", getattr(r, name).encoding % 4 + 1),
        # bf16 and fp16 have one length: that one is no mistake anybody can see.
        BAD | {StatusCode.OK, StatusCode.FAILED_PRECONDITION},
    ),
    "unknown reply encoding": Mistake(
        lambda draw, r, name: setattr(r, "reply_encoding", draw(any_encoding_but(0))), BAD
    ),
    "NaN or infinity in fp32": Mistake(poison, BAD),
    "NaN or infinity in 16 bits": Mistake(poison_16, BAD),
    "a scale that overflows": Mistake(poison_scale, BAD),
    "a claim of a GiB": Mistake(huge, TOO_MUCH),
    "no rows": Mistake(lambda draw, r, name: setattr(getattr(r, name), "rows", 0), BAD),
    "no columns": Mistake(lambda draw, r, name: setattr(getattr(r, name), "cols", 0), BAD),
    "no matrix": Mistake(lambda draw, r, name: r.ClearField(name), BAD),
    "call id of another length": Mistake(
        lambda draw, r, name: setattr(r, "call_id", draw(st.binary(max_size=40).filter(lambda b: len(b) != 16))), BAD
    ),
    "no trainer": Mistake(lambda draw, r, name: r.ClearField("trainer"), BAD),
    "a trainer's name without end": Mistake(
        lambda draw, r, name: setattr(r, "trainer", "x" * draw(st.integers(129, 9000))), TOO_MUCH
    ),
    "another layer": Mistake(
        lambda draw, r, name: setattr(r, "layer", draw(st.integers(1, 2**32 - 1))), NOT_HERE, needs_routing=True
    ),
    "a step already committed": Mistake(
        lambda draw, r, name: setattr(r, "step", draw(st.integers(0, 1))), {StatusCode.ABORTED, StatusCode.OK}
    ),
    "counts that do not add up": Mistake(
        lambda draw, r, name: set_pairs(
            r, experts_per_row=draw(st.lists(st.integers(1, 3), min_size=3, max_size=3).filter(lambda c: sum(c) != 4))
        ),
        BAD,
        needs_routing=True,
    ),
    "another number of counts": Mistake(
        lambda draw, r, name: set_pairs(r, experts_per_row=[1] * draw(st.integers(0, 9).filter(lambda n: n != 3))),
        BAD,
        needs_routing=True,
    ),
    "a row without experts": Mistake(
        lambda draw, r, name: set_pairs(r, experts_per_row=draw(st.permutations([0, 2, 2]))), BAD, needs_routing=True
    ),
    "a count that wraps": Mistake(
        lambda draw, r, name: set_pairs(r, experts_per_row=[2**32 - 1, 3, 2]), BAD, needs_routing=True
    ),
    "counts over the limit": Mistake(
        lambda draw, r, name: set_pairs(r, experts_per_row=[draw(st.integers(9, 2**31 - 1)), 1, 1]),
        TOO_MUCH,
        needs_routing=True,
    ),
    "another number of gates": Mistake(
        lambda draw, r, name: set_pairs(r, gate=[1.0] * draw(st.integers(0, 9).filter(lambda n: n != 4))),
        BAD,
        needs_routing=True,
    ),
    "a gate that is not finite": Mistake(
        lambda draw, r, name: set_pairs(
            r, gate=[1.0, 1.0, draw(st.sampled_from([float("nan"), float("inf"), float("-inf")])), 1.0]
        ),
        BAD,
        needs_routing=True,
    ),
    "an expert the model does not have": Mistake(
        lambda draw, r, name: set_pairs(r, expert_index=[0, 1, draw(st.integers(N_EXPERTS, 2**32 - 1)), 0]),
        BAD,
        needs_routing=True,
    ),
    "an expert twice in a row": Mistake(
        lambda draw, r, name: set_pairs(r, expert_index=[0, 2, 2, 0]), BAD, needs_routing=True
    ),
    "only experts of other peers": Mistake(
        lambda draw, r, name: (
            set_pairs(r, experts_per_row=[1, 1, 1], expert_index=[N_EXPERTS - 1] * 3, gate=[1.0] * 3),
        ),
        NOT_HERE,
        needs_routing=True,
    ),
}


def base_of(kind: str, encoding: Encoding) -> tuple[str, Request, list[str]]:
    """(method, a valid request, its matrices)."""
    match kind:
        case "forward":
            return "Forward", forward(encoding=encoding, train=False), ["x"]
        case "backward":
            return "Backward", backward(UNKNOWN_ID, encoding), ["grad"]
        case _:
            return "Backward", backward(UNKNOWN_ID, encoding, resend=True), ["grad", "x"]


def check(target: Target, method: str, data: bytes, allowed: set[StatusCode]) -> StatusCode:
    code, details = target.send(method, data)
    assert code in allowed, f"{method}: {code} ({details})"
    if code is StatusCode.OK:
        target.known = target.state()
        return code
    assert details.strip(), f"{method}: {code} without a reason"
    assert same(target.known, target.state()), f"{method}: {code} ({details}) changed the server's state"
    return code


@settings(max_examples=550, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_every_single_mistake_has_its_status_and_changes_nothing(target: Target, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["forward", "backward", "backward with inputs"]))
    what = data.draw(st.sampled_from(sorted(MISTAKES)))
    encoding = data.draw(st.sampled_from(list(Encoding)))
    mistake = MISTAKES[what]
    if mistake.needs_routing and kind == "backward":
        kind = "backward with inputs"
    method, request, matrices = base_of(kind, encoding)
    # A mistake that leaves a valid call (bf16 read as fp16) is applied: the next one must not meet its id.
    request.call_id = next(FRESH).to_bytes(16, "big")
    mistake.do(data.draw, request, data.draw(st.sampled_from(matrices)))
    check(target, method, request.SerializeToString(), mistake.codes)


def test_a_thousand_malformed_forwards_are_refused_and_change_nothing(target: Target) -> None:
    wrong = {what: mistake for what, mistake in MISTAKES.items() if StatusCode.OK not in mistake.codes}
    seen: Counter[tuple[str, StatusCode]] = Counter()

    @settings(max_examples=1000, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def refuse_one(data: st.DataObject) -> None:
        what = data.draw(st.sampled_from(sorted(wrong)))
        request = forward(encoding=data.draw(st.sampled_from(list(Encoding))))
        wrong[what].do(data.draw, request, "x")
        code = check(target, "Forward", request.SerializeToString(), wrong[what].codes)
        seen[what, code] += 1

    refuse_one()
    assert seen.total() >= 1000
    assert {what for what, _ in seen} == wrong.keys()
    assert {code for _, code in seen} == BAD | TOO_MUCH | NOT_HERE


def scramble(draw: Any, data: bytes) -> bytes:
    """Cut, repeat, overwrite or insert, up to four times."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["cut", "flip", "insert", "remove", "repeat"])):
            case "cut":
                data = data[:at]
            case "flip" if at < len(data):
                data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
            case "insert":
                data = data[:at] + draw(st.binary(min_size=1, max_size=12)) + data[at:]
            case "remove":
                data = data[:at] + data[at + draw(st.integers(1, 20)) :]
            case _:
                data = data + data[at:]
    return data


@settings(max_examples=550, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_scrambled_bytes_are_refused_with_a_reason_or_are_a_valid_call(target: Target, data: st.DataObject) -> None:
    valid: dict[str, list[Request]] = {
        "Forward": [forward(train=False), forward(KNOWN_ID, Encoding.INT8)],
        "Backward": [backward(UNKNOWN_ID), backward(KNOWN_ID, Encoding.BF16), backward(UNKNOWN_ID, resend=True)],
        "Commit": [commit()],
        "Fetch": [expert_pb2.FetchRequest(layer=LAYER, expert_index=[0, 1])],
    }
    method = data.draw(st.sampled_from(["Forward", "Forward", "Backward", "Backward", "Commit", "Fetch"]))
    raw = data.draw(st.sampled_from(valid[method])).SerializeToString()
    noise = data.draw(st.integers(0, 19)) == 0
    raw = data.draw(st.binary(max_size=200)) if noise else scramble(data.draw, raw)
    check(target, method, raw, REFUSALS | {StatusCode.OK})


def test_a_commit_of_more_tokens_than_there_are_is_refused(target: Target) -> None:
    for tokens in (RUN.global_batch_tokens + 1, 2**64 - 1):
        request = expert_pb2.CommitRequest(trainer="t", step=2**40, tokens=tokens)
        check(target, "Commit", request.SerializeToString(), BAD)


@pytest.mark.parametrize("method", ["Forward", "Backward", "Commit"])
def test_an_empty_message_is_refused(target: Target, method: str) -> None:
    check(target, method, b"", BAD)


@pytest.mark.parametrize("method", ["Forward", "Backward"])
def test_every_truncation_of_a_message_is_refused(target: Target, method: str) -> None:
    raw = (forward(train=False) if method == "Forward" else backward(UNKNOWN_ID, resend=True)).SerializeToString()
    for length in range(0, len(raw), 3):
        check(target, method, raw[:length], REFUSALS)


@pytest.mark.parametrize(("field_name", "other"), [("trainer", "stranger"), ("step", 6)])
def test_backward_of_somebody_elses_call_is_refused_and_leaves_no_trace(
    target: Target, field_name: str, other: object
) -> None:
    # A trainer and calls of its own: what the scrambled calls before this left of the others is not known.
    own = forward(field_name.encode().ljust(16, b"!"))
    own.trainer = "owner"
    check(target, "Forward", own.SerializeToString(), {StatusCode.OK})
    for call_id, codes in ((own.call_id, BAD), (bytes(16), {StatusCode.FAILED_PRECONDITION})):
        request = backward(call_id)
        request.trainer = "owner"
        setattr(request, field_name, other)
        check(target, "Backward", request.SerializeToString(), codes)


@contextmanager
def at_most_more(n_bytes: int) -> Iterator[None]:
    """Within, this process may take no more than `n_bytes` of address space on top of what it has: more fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(("rows", "cols"), [(1 << 20, 1 << 10), (1 << 28, 1), (1024, 1 << 18), (1, 1 << 28)])
def test_a_claim_of_a_gibibyte_costs_no_memory(target: Target, rows: int, cols: int) -> None:
    """Not by the peak of resident memory, which earlier tests raise and untouched memory does not."""
    claims: list[tuple[str, Request]] = []
    for kind, encoding in itertools.product(("forward", "backward", "backward with inputs"), Encoding):
        method, request, matrices = base_of(kind, encoding)
        for name in matrices:
            getattr(request, name).rows, getattr(request, name).cols = rows, cols
        claims.append((method, request))
    with at_most_more(512 << 20):
        if sys.platform == "linux":  # others do not hold this limit
            with pytest.raises(RuntimeError, match="allocate"):
                torch.empty(1 << 30, dtype=torch.uint8)
        for method, request in claims:
            check(target, method, request.SerializeToString(), TOO_MUCH)


def test_the_server_still_works_after_all_that(target: Target) -> None:
    assert target.send("Forward", forward(b"z" * 16).SerializeToString())[0] is StatusCode.OK
    code, details = target.send("Backward", backward(b"z" * 16).SerializeToString())
    assert code in (StatusCode.OK, StatusCode.ABORTED), details
    assert target.send("Info", b"")[0] is StatusCode.OK
