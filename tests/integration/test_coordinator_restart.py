"""A coordinator that is started again with the same command and the same folder is the same one, in the same swarm."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from processes import READY_S, RUN, module, peer_spec

from moe_coordinator.config import to_toml
from moe_coordinator.state import State
from moe_coordinator.supervisor import ChildError, ChildSpec, Supervisor
from moe_net.discovery.dht import DhtDiscovery
from moe_net.discovery.directory import DirectoryWatcher

VIEW_S = 60.0


def free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(n)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def coordinator_spec(folder: Path) -> ChildSpec:
    (folder / "run.toml").write_text(to_toml(RUN))
    grpc_port, dht_port = free_ports(2)
    argv = module(
        "moe_coordinator.cli", "serve", "--config", folder / "run.toml", "--listen", f"127.0.0.1:{grpc_port}",
        "--dht-listen", f"/ip4/127.0.0.1/tcp/{dht_port}", "--state", folder / "state",
    )  # fmt: skip
    return ChildSpec(name="coordinator", argv=argv)


async def test_peers_that_joined_before_and_after_a_coordinators_restart_see_each_other(tmp_path: Path) -> None:
    spec = coordinator_spec(tmp_path)
    async with Supervisor(tmp_path / "logs") as supervisor:
        coordinator = await supervisor.start(spec)
        first = await coordinator.ready(READY_S)
        before = await supervisor.start(peer_spec("before", first["address"]))
        before_at = (await before.ready(READY_S))["address"]
        async with (
            await DhtDiscovery.create(run=RUN.name, join=first["dht"], client_mode=True) as trainer,
            DirectoryWatcher(trainer, interval_s=1.0) as watcher,
        ):
            await watcher.wait_for(lambda view: {peer.address for peer in view.peers.values()} == {before_at}, VIEW_S)
            coordinator.kill()
            await coordinator.wait()
            second = await (await supervisor.start(spec)).ready(READY_S)
            assert second == first
            after = await supervisor.start(peer_spec("after", second["address"]))
            both = {before_at, (await after.ready(READY_S))["address"]}
            await watcher.wait_for(lambda view: {peer.address for peer in view.peers.values()} == both, VIEW_S)


async def test_two_coordinators_do_not_share_a_folder_nor_a_dht_port(tmp_path: Path) -> None:
    spec = coordinator_spec(tmp_path)
    async with Supervisor(tmp_path / "logs") as supervisor:
        await (await supervisor.start(spec)).ready(READY_S)
        argv = list(spec.argv)
        argv[argv.index("--listen") + 1] = "127.0.0.1:0"
        again = await supervisor.start(ChildSpec(name="again", argv=tuple(argv)))
        with pytest.raises(ChildError, match=r"exit code 2(.|\n)*another process writes to"):
            await again.ready(READY_S)
        argv[argv.index("--state") + 1] = str(tmp_path / "other")
        second = await supervisor.start(ChildSpec(name="second", argv=tuple(argv)))
        with pytest.raises(ChildError, match=r"cannot listen on /ip4/127\.0\.0\.1/tcp/\d+: Address already in use"):
            await second.ready(READY_S)


def test_the_members_are_kept_and_a_full_disk_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state, member = State(tmp_path), "/ip4/127.0.0.1/tcp/1/p2p/12D3KooA"
    assert state.members() == ()
    state.keep_members([member])
    assert state.members() == (member,)

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    state.keep_members([member, member])
    assert "No space left on device" in caplog.text
    assert state.members() == (member,)
