from __future__ import annotations

import builtins
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_peer.metrics import EvalMetrics, Event, Record, StepMetrics
from moe_peer.report import draw, fault_marks, smooth, summary, write_report


def _records(steps: int = 60) -> list[Record]:
    records: list[Record] = [EvalMetrics(step=0, val_nats_per_byte=5.5)]
    for step in range(steps):
        records.append(
            StepMetrics(
                step=step, loss=2.0 + 3.0 * math.exp(-step / 10), tokens=1000, step_s=0.5, bytes_sent=2000,
                bytes_received=1000, calls=10, retries=int(step == 30), routed_pairs=2000,
                dropped_pairs=20 * (step == 30), lost_gradient_pairs=10 * (step == 35),
                live_experts=20 if step >= 30 else 32, total_experts=32,
                staleness_max=int(step == 40),
            )
        )  # fmt: skip
        if step == 30:
            records += [
                Event(step=30, what="forward_failed", peer="3f2a91c07711", layer=0, action="give_up", cost_s=0.4),
                Event(step=31, what="peer_gone", peer="3f2a91c07711", action="masked"),
            ]
        if (step + 1) % 20 == 0:
            records.append(EvalMetrics(step=step + 1, val_nats_per_byte=2.1 + 3.0 * math.exp(-step / 10)))
    return records


def _png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_a_report_has_a_picture_and_a_summary(tmp_path: Path) -> None:
    report = write_report(_records(), tmp_path / "out", title="demo $x_1$ of $y", bigram_nats_per_byte=2.4)
    assert report.plot_path is not None
    assert _png_size(report.plot_path) == (1350, 960)
    assert (tmp_path / "out" / "summary.txt").read_text() == report.summary
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["loss.png", "summary.txt"]


def test_the_summary_gives_the_runs_numbers() -> None:
    text = summary(_records(), title="demo", bigram_nats_per_byte=2.4)
    for part in (
        "60 (0..59), 60 k tokens",
        "0:30 in steps, 2 k tokens/s",
        "bigram model   2.4000 nats/byte: passed by step 40",
        "after 60 steps",
        "120 kB sent, 60 kB received, 3 B/token",
        "600 (10.0 per step), 1 retries",
        "20 of 120000 forward, 10 backward, 0.025% together",
        "20 of 32 at the least, 20 at the end",
        "1 at most",
        "1 x forward_failed -> give_up, 0.4 s",
        "1 x peer_gone -> masked",
    ):
        assert part in text


@pytest.mark.parametrize("action", ["hedge_won", "hedge_lost"])
def test_a_hedge_is_no_fault(action: str, tmp_path: Path) -> None:
    hedge = Event(step=3, what="forward_overdue", action=action, cost_s=0.2)
    faultless = [record for record in _records() if not isinstance(record, Event)]
    assert summary([*faultless, hedge], title="demo") == summary(faultless, title="demo")
    fault = Event(step=3, what="forward_failed", action="elsewhere")
    assert "1 x forward_failed -> elsewhere" in summary([*faultless, hedge, fault], title="demo")


def test_a_bigram_that_was_not_passed_is_said_so() -> None:
    assert "not passed (best held-out +" in summary(_records(), title="demo", bigram_nats_per_byte=1.0)


@pytest.mark.parametrize(
    "records",
    [
        [StepMetrics(step=0, loss=5.0, tokens=10, step_s=0.1)],
        [StepMetrics(step=70, loss=math.nan, tokens=10, step_s=0.0), Event(step=3, what="early")],
        [*_records(3), EvalMetrics(step=3, val_nats_per_byte=math.nan)],
        [*_records(30), *[Event(step=i, what=f"kind{i}") for i in range(30)]],
    ],
    ids=["one_step", "nan_loss", "nan_eval", "many_faults"],
)
def test_any_run_can_be_drawn(records: list[Record], tmp_path: Path) -> None:
    draw(records, tmp_path / "loss.png", title="demo", bigram_nats_per_byte=2.4)
    assert _png_size(tmp_path / "loss.png") == (1350, 960)
    assert summary(records, title="demo", bigram_nats_per_byte=2.4)


def test_a_run_without_a_step_has_a_summary_only(tmp_path: Path) -> None:
    report = write_report([EvalMetrics(step=0, val_nats_per_byte=5.5)], tmp_path, title="demo")
    assert report.plot_path is None
    assert "no step was made" in report.summary
    assert [path.name for path in tmp_path.iterdir()] == ["summary.txt"]


def test_without_matplotlib_the_summary_says_how_to_get_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    report = write_report(_records(5), tmp_path, title="demo")
    assert report.plot_path is None
    assert "pip install 'moe-net[plot]'" in (tmp_path / "summary.txt").read_text()


def test_faults_near_each_other_are_one_mark_named_after_the_gravest() -> None:
    events = [
        Event(step=50, what="forward_failed", peer="aaaaaaaaaaaa"),
        Event(step=10, what="forward_failed", peer="bbbbbbbbbbbb"),
        Event(step=12, what="peer_gone", peer="cccccccccccc"),
        Event(step=14, what="odd"),
    ]
    marks = fault_marks(events, gap_steps=3)
    assert [(mark.step, mark.count, mark.label) for mark in marks] == [
        (10, 2, "peer gone cccccccc  (+1)"),
        (14, 1, "odd"),
        (50, 1, "forward failed aaaaaaaa"),
    ]


def test_smoothing_keeps_the_length_and_skips_what_is_not_finite() -> None:
    assert smooth([1.0, 2.0, 3.0], 1) == [1.0, 2.0, 3.0]
    assert smooth([1.0, math.nan, 3.0, 5.0], 3) == [1.0, 2.0, 4.0, 4.0]
    assert math.isnan(smooth([math.nan], 3)[0])
