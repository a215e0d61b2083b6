"""A peer's experts that are not finite come back from a replica, or from its checkpoint; its record leaves them out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from swarms import small_run
from torch import Tensor

from moe_net.client import make_banks
from moe_net.discovery.announcer import Announcer
from moe_net.experts.host import ExpertHost
from moe_net.placement.view import View
from moe_net.rpc.local import LocalTransport
from moe_net.types import ExpertId, PeerInfo
from moe_net.wire.messages import ForwardAnswer, ForwardCall, RoutedRows
from moe_peer.repair import Repair

RUN = small_run()
EXPERTS = RUN.model.expert_ids
BROKEN = ExpertId(0, 1)


@dataclass
class Record:
    """What would be an Announcer."""

    experts: tuple[ExpertId, ...] = EXPERTS
    said: asyncio.Queue[tuple[ExpertId, ...]] = field(default_factory=asyncio.Queue[tuple[ExpertId, ...]])

    async def announce(self, experts: tuple[ExpertId, ...]) -> None:
        self.experts = experts
        self.said.put_nowait(experts)


def spoil(host: ExpertHost, expert: ExpertId) -> None:
    bank = host._banks[expert.layer]
    bank._weights.w_in_EDH[bank.indices.index(expert.index), 0, 0] = torch.nan


def ask(host: ExpertHost, *experts: ExpertId) -> ForwardAnswer:
    rows = RoutedRows(
        x_RD=torch.ones(len(experts), RUN.model.d_model),
        experts_per_row_R=torch.ones(len(experts), dtype=torch.int32),
        expert_index_P=torch.tensor([expert.index for expert in experts], dtype=torch.int32),
        gate_P=torch.ones(len(experts)),
    )
    (answer,) = host.forward_many(
        [ForwardCall(call_id=b"c" * 16, trainer="t", step=0, layer=experts[0].layer, rows=rows)]
    )
    assert isinstance(answer, ForwardAnswer)
    return answer


async def on_device(work: Callable[..., Any], *arguments: Any) -> Any:
    await asyncio.sleep(0)
    return work(*arguments)


async def repaired(host: ExpertHost, hosts: dict[str, ExpertHost], checkpoint: dict[str, Tensor]) -> Record:
    """The record, once the repair has announced what it could restore."""
    record = Record()
    peers = [PeerInfo(peer_id=name, address="", experts=other.experts) for name, other in hosts.items()]

    async def view() -> View:
        return View(peers)

    repair = Repair(
        host, on_device, cast(Announcer, record), LocalTransport(hosts), view, lambda _: checkpoint, own_id="mine",
        look_s=0.001,
    )  # fmt: skip
    task = asyncio.create_task(repair.run())
    try:
        await asyncio.wait_for(record.said.get(), 30)
    finally:
        task.cancel()
        await asyncio.wait([task])
    return record


@pytest.mark.parametrize("source", ["replica", "checkpoint", "a broken replica and a checkpoint"])
async def test_a_broken_expert_is_restored_and_serves_again(source: str) -> None:
    host, other = (ExpertHost(make_banks(RUN, EXPERTS)) for _ in range(2))
    right = ask(host, BROKEN, ExpertId(0, 2)).y_RD
    state = other.fetch(0, ())
    if source != "replica":
        spoil(other, BROKEN)
    spoil(host, BROKEN)
    answer = ask(host, BROKEN, ExpertId(0, 2))
    assert answer.failed_experts == (BROKEN.index,)
    assert torch.equal(answer.y_RD[1], right[1])
    assert not answer.y_RD[0].any()
    assert host.broken == (BROKEN,)
    hosts = {"mine": host} | ({} if source == "checkpoint" else {"other": other})
    record = await repaired(host, hosts, {} if source == "replica" else state)
    assert record.experts == EXPERTS
    assert host.broken == ()
    again = ask(host, BROKEN, ExpertId(0, 2))
    assert again.failed_experts == ()
    assert torch.equal(again.y_RD, right)


async def test_one_that_nobody_has_is_left_out_of_the_record() -> None:
    host = ExpertHost(make_banks(RUN, EXPERTS))
    spoil(host, BROKEN)
    ask(host, BROKEN, ExpertId(0, 2))
    record = await repaired(host, {"mine": host}, {})
    assert record.experts == tuple(expert for expert in EXPERTS if expert != BROKEN)
    assert host.broken == (BROKEN,)
