"""What is around a trainer's steps: what a step's record says, and which events it makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from disks import full_at
from swarms import make_trainer, small_run

from moe_net.checkpoint_folder import checkpoints_of, whole_ones
from moe_net.client import make_banks
from moe_net.data.tokenizer import ByteTokenizer
from moe_net.errors import StaleStepError, TooManyDropsError
from moe_net.experts.host import ExpertHost
from moe_net.model.remote_moe import SwarmLink
from moe_net.placement.view import View
from moe_net.rpc.grpc_client import Traffic
from moe_net.rpc.local import LocalTransport
from moe_net.rpc.policy import DropWindow
from moe_net.rpc.portal import Portal
from moe_net.rpc.swarm import ExpertSwarm
from moe_net.types import PeerInfo
from moe_net.wire.messages import CommitCall
from moe_peer.config import TrainConfig
from moe_peer.display import TrainDisplay
from moe_peer.metrics import Event, MetricsLog, StepMetrics, read_metrics
from moe_peer.session import Session, stale_gradient
from moe_peer.stopping import Stop, Waits

RUN = small_run()
TEXT = SimpleNamespace(
    tokenizer=ByteTokenizer(), tokenizer_file=None, corpus=SimpleNamespace(fingerprint="d"), bigram_nats_per_byte=2.0
)


@contextmanager
def session(folder: Path, **settings: Any) -> Iterator[tuple[Session, ExpertHost]]:
    """A trainer of one host in this process."""
    config = TrainConfig(out=folder, sequences=4, **settings)
    host = ExpertHost(make_banks(RUN, RUN.model.expert_ids))
    view = View([PeerInfo(peer_id="here", address="", experts=RUN.model.expert_ids)])
    transport = LocalTransport({"here": host})
    transport.traffic = Traffic()  # type: ignore[attr-defined]
    with Portal() as portal, MetricsLog(folder / "metrics.jsonl") as metrics:
        faults: list[Any] = []
        swarm = ExpertSwarm(trainer="t", transport=transport, view=lambda: view, on_event=faults.append)
        link = SwarmLink(swarm=swarm, runner=portal)
        yield (
            Session(
                config=config, run=RUN, text=TEXT,  # type: ignore[arg-type]
                member=SimpleNamespace(link=link, transport=transport),  # type: ignore[arg-type]
                trainer=make_trainer(RUN, link), metrics=metrics, display=TrainDisplay("t", mode="off"),
                stop=Stop(), waits=Waits(portal), faults=faults, records=[], drops=DropWindow(), last_checkpoint=None,
                saved_step=0,
            ),
            host,
        )  # fmt: skip


def test_a_steps_staleness_is_its_own_and_one_over_the_bound_is_an_event(tmp_path: Path) -> None:
    with session(tmp_path, max_staleness=2) as (made, host):
        made.step()
        backward_many = host.backward_many
        commits: list[int] = []

        def overtaken(calls: Any) -> Any:
            """Another trainer's commits arrive between forward and backward."""
            while commits:
                host.commit(CommitCall(trainer="other", step=commits.pop(), tokens=RUN.global_batch_tokens))
            return backward_many(calls)

        host.backward_many = overtaken  # type: ignore[method-assign]
        for steps in ([], [2, 1, 0], [3], []):
            commits += steps
            made.step()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r.staleness_max for r in records if isinstance(r, StepMetrics)] == [0, 0, 3, 1, 0]
    (event,) = [r for r in records if isinstance(r, Event)]
    assert (event.what, event.step, event.action) == ("stale_gradient", 2, "counted")
    assert "3 updates" in event.detail


def test_a_run_whose_gradients_all_get_lost_is_stopped_like_one_without_answers(tmp_path: Path) -> None:
    with session(tmp_path, wait_s=0.01) as (made, host):
        made.drops = DropWindow(length=2)
        host.backward_many = lambda calls: [StaleStepError("too late") for _ in calls]  # type: ignore[method-assign]
        made.step()
        with pytest.raises(TooManyDropsError, match="100% of the"):
            made.step()


def test_without_a_bound_any_age_will_do() -> None:
    old = StepMetrics(step=0, loss=1.0, tokens=1, step_s=1.0, staleness_max=1000)
    assert stale_gradient(old, 0) is None
    assert stale_gradient(old, 999) is not None


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    with session(tmp_path, keep_checkpoints=2) as (made, _):
        for _ in range(4):
            made.step()
            made.checkpoint_on_the_way()
    assert [path.name for path in whole_ones(checkpoints_of(tmp_path))] == ["step-00000003", "step-00000004"]


def test_a_full_disk_is_said_and_does_not_end_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with session(tmp_path) as (made, _):
        made.step()
        made.checkpoint_on_the_way()
        with full_at((tmp_path / "metrics.jsonl").stat().st_size):
            made.step()
            made.checkpoint_on_the_way()
            made.step()
            made.report()
        assert "the report cannot be written" in capsys.readouterr().err
        said = [record.what for record in made.records if isinstance(record, Event)]
        assert said == ["metrics_not_written", "checkpoint_failed"]
        made.step()
        made.checkpoint_on_the_way()
        made.report()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r.step for r in records if isinstance(r, StepMetrics)] == [0, 1, 2, 3]
    assert [r.what for r in records if isinstance(r, Event)] == [*said, "metrics_written"]
    assert [path.name for path in whole_ones(checkpoints_of(tmp_path))] == ["step-00000001", "step-00000004"]
