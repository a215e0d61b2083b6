"""Checkpoints do not fill the disk, and a disk that is full does not end a training."""

from __future__ import annotations

from pathlib import Path

import pytest
from disks import full_at

from moe_net.checkpoint_folder import newest_in
from moe_net.errors import CheckpointError
from moe_peer import metrics
from moe_peer.checkpoint import remove_old
from moe_peer.config import TrainConfig
from moe_peer.metrics import MetricsLog, StepMetrics, read_metrics


def step(number: int) -> StepMetrics:
    return StepMetrics(step=number, loss=1.0, tokens=1, step_s=1.0)


def checkpoints(folder: Path, *steps: int, size_bytes: int = 1000, whole: bool = True) -> list[Path]:
    made = [folder / f"step-{step:08d}" for step in steps]
    for path in made:
        (path / "experts").mkdir(parents=True)
        (path / "experts" / "layer-000.safetensors").write_bytes(bytes(size_bytes))
        if whole:
            (path / "state.json").write_text("{}")
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("keep", "limit_bytes", "left"),
    [(3, 0, 3), (1, 0, 1), (0, 0, 5), (9, 0, 5), (0, 2500, 2), (3, 2500, 2), (2, 10_000, 2), (0, 10, 1), (3, 1, 1)],
)
def test_the_last_checkpoints_are_kept_by_number_and_bytes_and_the_newest_whatever_its_size(
    tmp_path: Path, keep: int, limit_bytes: int, left: int
) -> None:
    made = checkpoints(tmp_path, 100, 200, 300, 1000, 20_000)
    remove_old(tmp_path, keep=keep, limit_bytes=limit_bytes)
    assert names(tmp_path) == [path.name for path in made[-left:]]


def test_a_checkpoint_that_is_not_whole_is_not_counted_as_one_and_those_set_aside_stay(tmp_path: Path) -> None:
    (whole,) = checkpoints(tmp_path, 100)
    checkpoints(tmp_path, 200, 300, whole=False)
    (tmp_path / "replaced-step-00000400").mkdir()
    remove_old(tmp_path, keep=1, limit_bytes=0)
    assert newest_in(tmp_path) == whole
    assert (tmp_path / "replaced-step-00000400").exists()
    remove_old(tmp_path / "not there yet", keep=1, limit_bytes=0)


def test_one_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = checkpoints(tmp_path, 100, 200)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(CheckpointError, match=f"{first} cannot be removed"):
        remove_old(tmp_path, keep=1, limit_bytes=0)


def test_records_that_a_full_disk_does_not_take_wait_and_are_written_whole_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        assert log.write(step(0)) is None
        with full_at(path.stat().st_size + 100):  # in the middle of a line
            event = log.write(step(1))
            assert event is not None
            assert (event.what, event.action) == ("metrics_not_written", "going_on")
            assert f"{path}: File too large" in event.detail
            assert log.write(step(2)) is None, "said once"
            assert [r.step for r in read_metrics(path)] == [0]
        event = log.write(step(3))
        assert event is not None
        assert event.what == "metrics_written"
        assert [r.step for r in read_metrics(path)] == [0, 1, 2, 3]
        assert log.write(step(4)) is None
        with full_at(path.stat().st_size):
            assert log.write(step(5)) is not None, "a second time is said again"
    assert [r.step for r in read_metrics(path)] == [0, 1, 2, 3, 4, 5], "what waits is written at the end"


def test_a_disk_that_stays_full_takes_no_more_memory_than_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(step(0))
        monkeypatch.setattr(metrics, "WAITING_LIMIT_BYTES", 3 * path.stat().st_size)
        with full_at(path.stat().st_size):
            for number in range(1, 10):
                log.write(step(number))
        event = log.write(step(10))
        assert event is not None
        assert "7 records are not in it" in event.detail
        log.write(step(11))
    assert [r.step for r in read_metrics(path)] == [0, 1, 2, 3, 11]


@pytest.mark.parametrize(
    "wrong", [{"keep_checkpoints": -1}, {"keep_checkpoints_gib": -0.5}, {"keep_checkpoints_gib": float("nan")}]
)
def test_a_bound_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)  # type: ignore[arg-type]


def test_a_disk_that_is_full_at_a_resume_is_named_by_the_file_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for number in range(5):
            log.write(step(number))
    with full_at(1000), pytest.raises(OSError, match=f"File too large: '{path}'"):
        MetricsLog(path, resume_step=5)
    assert names(tmp_path) == ["metrics.jsonl"]
    assert [r.step for r in read_metrics(path)] == [0, 1, 2, 3, 4]
