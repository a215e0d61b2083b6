"""The coordinator as a process, and the local swarm around small stand-ins for its members."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from moe_coordinator.config import LocalOptions, ServeOptions, deal_experts, run_config, to_toml, trainer_threads
from moe_coordinator.serve import publish_manifest
from moe_coordinator.supervisor import ChildError, ChildSpec, Event, Supervisor
from moe_net.config import RunConfig, from_json, load_toml, to_json
from moe_net.discovery.memory import MemoryDiscovery, MemoryRegistry
from moe_net.model.config import PRESETS, ModelConfig
from moe_net.proto.v1 import coordinator_pb2, coordinator_pb2_grpc
from moe_peer.config import parse_experts

READY_S = 60.0


@asynccontextmanager
async def coordinator(folder: Path, run: RunConfig, *arguments: str) -> AsyncIterator[tuple[Event, Supervisor]]:
    config = folder / "run.toml"
    config.write_text(to_toml(run))
    argv = (sys.executable, "-m", "moe_coordinator.cli", "serve", "--config", str(config), *arguments)
    async with Supervisor(folder / "logs") as supervisor:
        child = await supervisor.start(ChildSpec(name="coordinator", argv=argv))
        yield await child.ready(READY_S), supervisor


async def test_a_newcomer_gets_manifest_and_dht_from_a_coordinator_that_stops_cleanly(tmp_path: Path) -> None:
    run = RunConfig(name="first-contact", seed=7)
    async with coordinator(tmp_path, run) as (ready, supervisor):
        assert ready["role"] == "coordinator"
        async with grpc.aio.insecure_channel(ready["address"]) as channel:
            reply = await coordinator_pb2_grpc.CoordinatorServiceStub(channel).GetRun(coordinator_pb2.GetRunRequest())
            assert from_json(RunConfig, reply.manifest_json) == run
            assert list(reply.dht_addresses) == ready["dht"] != []

            for service in ("", "moe_net.v1.CoordinatorService"):
                request = health_pb2.HealthCheckRequest(service=service)
                health = await health_pb2_grpc.HealthStub(channel).Check(request)
                assert health.status == health_pb2.HealthCheckResponse.SERVING

            request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="moe_net.v1.CoordinatorService")
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
            (answer,) = [answer async for answer in call]
            (file,) = answer.file_descriptor_response.file_descriptor_proto
            assert FileDescriptorProto.FromString(file).service[0].method[0].name == "GetRun"
        (child,) = supervisor.children
        assert await child.stop(READY_S) == 0


async def test_a_second_coordinator_joins_with_the_same_manifest_and_is_refused_with_another(tmp_path: Path) -> None:
    run = RunConfig(name="two-doors")
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    for folder in (first, second, third):
        folder.mkdir()
    async with coordinator(first, run) as (ready, _):
        async with coordinator(second, run, "--join", ready["dht"][0]) as (other, _):
            assert other["dht"] != ready["dht"]
        with pytest.raises(ChildError, match="the run has another manifest already"):
            async with coordinator(third, RunConfig(name="two-doors", seed=1), "--join", ready["dht"][0]):
                pass


async def test_a_manifest_is_published_once_and_never_changed() -> None:
    discovery = MemoryDiscovery(MemoryRegistry(), run="demo")
    await publish_manifest(discovery, to_json(RunConfig()), ttl_s=60)
    await publish_manifest(discovery, to_json(RunConfig()), ttl_s=60)
    with pytest.raises(ValueError, match="another manifest"):
        await publish_manifest(discovery, to_json(RunConfig(seed=1)), ttl_s=60)
    assert await discovery.get_manifest() == to_json(RunConfig())


async def test_a_mistake_in_the_manifest_is_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[model]\nn_expert = 8\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "moe_coordinator.cli", "serve", "--config", str(tmp_path / "run.toml")),
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await process.communicate()
    assert process.returncode == 2
    assert b"model.n_expert: unexpected keyword" in stderr


async def test_ctrl_c_ends_a_coordinator_that_waits_for_a_way_in(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(to_toml(RunConfig()))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "moe_coordinator.cli", "serve", "--config", str(tmp_path / "run.toml")),
            *("--join", f"127.0.0.1:{listener.getsockname()[1]}"),
            stderr=asyncio.subprocess.PIPE,
        )
        silent, _ = await asyncio.get_running_loop().sock_accept(listener)
        with silent:
            process.send_signal(signal.SIGINT)
            async with asyncio.timeout(5):  # it would wait for an answer twice as long
                _, stderr = await process.communicate()
    assert (process.returncode, stderr) == (0, b"")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_the_way_through_toml(name: str, tmp_path: Path) -> None:
    run = RunConfig(name='odd "name" \\ \x7f \u00e9\U0001f600', model=PRESETS[name])
    path = tmp_path / "run.toml"
    path.write_text(to_toml(run))
    assert load_toml(RunConfig, path) == run


def test_experts_are_dealt_round_robin_and_each_has_its_replicas() -> None:
    model = ModelConfig(n_layers=2, n_experts=4)
    assert deal_experts(model, peers=3, replicas=1) == ["*.0,*.3", "*.1", "*.2"]
    assert deal_experts(model, peers=3, replicas=2)[1] == "*.0,*.1,*.3"
    for replicas in (1, 2, 3):
        dealt = [e for spec in deal_experts(model, peers=3, replicas=replicas) for e in parse_experts(spec, model)]
        assert {dealt.count(expert) for expert in model.expert_ids} == {replicas}
    with pytest.raises(ValueError, match="peer 4 would host nothing"):
        deal_experts(model, peers=5, replicas=1)


def test_a_step_of_all_trainers_is_one_global_batch() -> None:
    run = run_config(LocalOptions(trainers=2, sequences=8, steps=40, seed=3, wire="int8"))
    assert run.global_batch_tokens == 2 * 8 * run.model.seq_len
    assert (run.optimizer.total_steps, run.seed, run.wire) == (40, 3, "int8")


def test_the_trainers_share_the_cores_the_peers_leave() -> None:
    assert trainer_threads(16, peers=3, trainers=1) == 13
    assert trainer_threads(16, peers=3, trainers=4) == 3
    assert trainer_threads(2, peers=3, trainers=1) == 1


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--seed: the manifest \(--config\) says that already"):
        LocalOptions(config=Path("run.toml"), seed=1)
    with pytest.raises(ValueError, match=r"replicas=4 is not in 1\.\.peers=3"):
        LocalOptions(peers=3, replicas=4)
    for base_port in (-5, 70_000, 65_533):
        with pytest.raises(ValueError, match=f"base_port={base_port}: the coordinator and 3 peers need ports after it"):
            LocalOptions(peers=3, base_port=base_port)
    with pytest.raises(ValueError, match="ready_timeout_s and grace_s must be positive"):
        LocalOptions(grace_s=float("nan"))
    with pytest.raises(ValueError, match="is not host:port"):
        ServeOptions(config=Path("run.toml"), listen="localhost")
    with pytest.raises(ValueError, match="--dht-listen"):
        ServeOptions(config=Path("run.toml"), listen="example.org:80")
    with pytest.raises(ValueError, match="manifest_ttl_s"):
        ServeOptions(config=Path("run.toml"), manifest_ttl_s=86400.0)
    assert ServeOptions(config=Path("run.toml"), listen="[::1]:0").dht_multiaddr == "/ip6/::1/tcp/0"


# A whole swarm of stand-ins: started, watched and stopped by the real `moe-coordinator local`.
SWARM = """
import sys
from moe_coordinator import cli, local
MEMBER = '''
import json, signal, sys
print(json.dumps({"event": "ready", "address": "x:1", "listen": "127.0.0.1:1", "argv": sys.argv[1:]}), flush=True)
'''
WAITING = MEMBER.replace("print", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\\nprint") + "signal.pause()"
local.COORDINATOR = local.PEER = (sys.executable, "-S", "-c", WAITING)
local.TRAINER = (sys.executable, "-S", "-c", MEMBER + sys.argv.pop(1))
cli.main()
"""
STEPS = (
    "for step in range(4):\n    print(json.dumps({'event': 'step', 'step': step}), flush=True)\n"
    "print(json.dumps({'event': 'done', 'val_nats_per_byte': 1.25, 'sample': 'def f():\\n    return \\x1b[2J1'}))\n"
)


async def local_swarm(folder: Path, trainer: str, *arguments: str) -> asyncio.subprocess.Process:
    """The command, with `trainer` as what trainers do."""
    argv = (sys.executable, "-c", SWARM, trainer, "local", "--out", str(folder), *arguments)
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*argv, stdout=pipe, stderr=pipe)


async def test_a_swarm_trains_loses_a_peer_on_request_and_prints_the_result(tmp_path: Path) -> None:
    process = await local_swarm(tmp_path, STEPS, "--peers", "2", "--kill-peer-at-step", "2", "--steps", "4")
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    assert b"step 2: killed peer-1" in stderr
    assert b"by itself" not in stderr
    assert b"1.25" in stdout
    assert "def f():\n    return \ufffd[2J1" in stdout.decode()
    events = [json.loads(line) for line in (tmp_path / "logs/trainer-0.log").read_text().splitlines()]
    assert [e["event"] for e in events] == ["ready", "step", "step", "step", "step", "done"]
    flags = events[0]["argv"]
    assert flags[flags.index("--steps") + 1] == "4"
    assert load_toml(RunConfig, tmp_path / "run.toml").optimizer.total_steps == 4


FAULTS = """
[network]
round_trip_s = 0.01
[[fault]]
at_step = 0
target = "peer-0"
what = "stop"
[[fault]]
at_step = 1
target = "trainer-1"
what = "kill"
[[fault]]
at_step = 1
target = "peer-1"
what = "blackhole"
duration_s = 0.2
[[fault]]
at_step = 2
target = "peer-1"
what = "restart"
after_s = 0.1
"""
# It goes on until the new peer is there; the second one never steps.
PATIENT = (
    "from pathlib import Path\n"
    "if 'trainer-1' in ' '.join(sys.argv):\n    signal.pause()\n"
    "for step in range(3):\n    print(json.dumps({'event': 'step', 'step': step}), flush=True)\n"
    "log = Path(sys.argv[sys.argv.index('--out') + 1]).parent / 'logs' / 'peer-1.1.log'\n"
    "while not (log.exists() and 'ready' in log.read_text()):\n    pass\n"
)


async def test_a_swarm_has_the_faults_of_its_file_notes_them_and_ends_well(tmp_path: Path) -> None:
    file = tmp_path / "faults.toml"
    file.write_text(FAULTS)
    process = await local_swarm(
        tmp_path, PATIENT, "--peers", "2", "--trainers", "2", "--steps", "3", "--faults", str(file)
    )
    _, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    for said in (
        b"step 0: suspended peer-0 (SIGSTOP)",
        b"step 1: killed trainer-1 (SIGKILL)",
        b"step 1: blackhole in front of peer-1 for 0.2 s",
        b"step 2: killed peer-1 (SIGKILL), which hosts ",
        b"step 2: starting peer-1 anew",
    ):
        assert said in stderr
    notes = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    began = [(note["step"], note["target"], note["what"]) for note in notes if note["phase"] == "began"]
    assert began == [
        (0, "peer-0", "stop"),
        (1, "trainer-1", "kill"),
        (1, "peer-1", "blackhole"),
        (2, "peer-1", "restart"),
    ]
    assert {"what": "restart", "phase": "ended"}.items() <= notes[-1].items() or notes[-1]["what"] == "blackhole"
    peer, again = (json.loads((tmp_path / "logs" / f"peer-1{n}.log").read_text()) for n in ("", ".1"))
    advertised = [argv[argv.index("--advertise") + 1] for argv in (peer["argv"], again["argv"])]
    assert advertised[0] == advertised[1]


async def test_a_trainer_that_fails_ends_the_swarm_with_its_last_words(tmp_path: Path) -> None:
    process = await local_swarm(tmp_path, "sys.exit('the loss is nan')", "--trainers", "2", "--peers", "1")
    stdout, stderr = await process.communicate()
    assert process.returncode == 1
    assert b"note:" not in stderr
    assert b"failed with exit code 1" in stderr
    assert b"the loss is nan" in stderr
    assert stdout == b""


async def test_a_swarm_that_would_not_do_what_was_asked_does_not_begin(tmp_path: Path) -> None:
    faults = tmp_path / "faults.toml"
    faults.write_text('[[fault]]\nat_step = 1\ntarget = "peer-9"\nwhat = "kill"\n')
    containers = tmp_path / "containers.toml"
    containers.write_text('[[fault]]\nat_step = 1\ntarget = "peer-0"\nwhat = "disconnect"\n')
    for wrong, complaint in (
        (("--kill-peer-at-step", "300"), b"kill_peer_at_step=300 is not one of the steps 0..299"),
        (("--faults", str(faults)), b"fault.0.target: the run has no peer-9"),
        (("--faults", str(containers)), b"fault.0: disconnect takes a member's whole network away"),
        (("--resume", str(tmp_path / "nowhere")), b"there is no such folder"),
    ):
        process = await local_swarm(tmp_path, STEPS, *wrong)
        stdout, stderr = await process.communicate()
        assert process.returncode == 2
        assert stderr.startswith(b"moe-coordinator: ")
        assert complaint in stderr
        assert stdout == b""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_swarm_that_is_interrupted_stops_everything(number: signal.Signals, code: int, tmp_path: Path) -> None:
    trainer = "print('training', file=sys.stderr, flush=True)\nsignal.pause()"
    process = await local_swarm(tmp_path, trainer, "--peers", "1")
    assert process.stderr is not None
    while b"training" not in await process.stderr.readline():
        assert not process.stderr.at_eof()
    process.send_signal(number)
    _, stderr = await process.communicate()
    assert process.returncode == code
    assert b"stopping" in stderr
