"""`moe-peer health`: what it says of servers and of trainers, and its exit code."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from expert_calls import serving

from moe_coordinator.service import CoordinatorServicer, running_server
from moe_peer.command_line import run_command
from moe_peer.metrics import Event, MetricsLog, StepMetrics


async def health(*arguments: object) -> int:
    return await asyncio.to_thread(run_command, ["health", *map(str, arguments)])


async def test_a_peer_is_well_until_it_leaves_and_while_it_leaves_it_still_answers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with serving() as (server, _):
        assert await health(server.address) == 0
        assert capsys.readouterr().out == f"{server.address}: SERVING\n"
        await server.leave()
        assert await health(server.address) == 1
        assert capsys.readouterr().out == f"{server.address}: NOT_SERVING\n"


async def test_a_coordinator_is_asked_in_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    servicer = CoordinatorServicer(manifest_json="{}", dht_addresses=())
    async with running_server(servicer, "127.0.0.1:0") as address:
        assert await health(address) == 0
    assert capsys.readouterr().out == f"{address}: SERVING\n"


async def test_where_nobody_listens_nobody_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        assert await health(address) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{address}: UNAVAILABLE: ")
    assert out.count("\n") == 1


async def test_who_accepts_but_does_not_answer_in_time_is_not_well(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        began_s = time.monotonic()
        assert await health(address, "--timeout-s", 0.2) == 1
        assert time.monotonic() - began_s < 10
    assert capsys.readouterr().out.startswith(f"{address}: DEADLINE_EXCEEDED")


def step(number: int, *, ago_s: float) -> StepMetrics:
    return StepMetrics(step=number, loss=1.0, tokens=1, step_s=1.0, at_s=time.time() - ago_s)


async def test_a_trainer_is_well_as_long_as_it_makes_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await health(tmp_path) == 1
    assert capsys.readouterr().out == f"{tmp_path}: no step yet\n"
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        assert await health(tmp_path) == 1
        for number in range(1000):  # more than is read of it
            metrics.write(step(number, ago_s=300))
        assert await health(tmp_path) == 1
        assert f"{tmp_path}: step 999 was 300." in capsys.readouterr().out
        assert await health(tmp_path, "--within-s", 400) == 0
        metrics.write(step(1000, ago_s=2))
        metrics.write(Event(step=1001, what="x"))
        assert await health(tmp_path) == 0
        with (tmp_path / "metrics.jsonl").open("a") as other:
            other.write('{"event": "step", "st')  # a line that is being written
        assert await health(tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{tmp_path}: step 1000 was 2.")


async def test_faults_alone_do_not_make_a_trainer_well(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        metrics.write(step(5, ago_s=300))
        metrics.write(Event(step=6, what="no live experts", at_s=time.time()))
    assert await health(tmp_path) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("nothing-here",), "'nothing-here' is neither host:port of a peer or coordinator nor the --out of a trainer"),
        (("host:port",), "'host:port' is neither"),
    ],
)
async def test_a_users_mistake_is_named(
    arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await health(*arguments) == 2
    assert complaint in capsys.readouterr().err


def test_asking_loads_no_torch() -> None:
    code = """
import json, sys
from moe_peer.command_line import run_command
code = run_command(["health", "127.0.0.1:1", "--timeout-s", "1"])
print(json.dumps([code, "torch" in sys.modules, "hivemind" in sys.modules]))
"""
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(answer.stdout.splitlines()[-1]) == [1, False, False]
