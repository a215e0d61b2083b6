from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_net.trace import FaultEvent
from moe_peer.metrics import (
    EvalMetrics,
    Event,
    MetricsLog,
    Record,
    StepMetrics,
    before,
    from_line,
    load_evenness,
    read_metrics,
    to_line,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 2**40)
RECORDS = st.one_of(
    st.builds(StepMetrics, step=COUNT, loss=FINITE, tokens=COUNT, step_s=FINITE, bytes_sent=COUNT, live_experts=COUNT),
    st.builds(EvalMetrics, step=COUNT, val_nats_per_byte=FINITE),
    st.builds(Event, step=COUNT, what=st.text(), peer=st.text(), layer=st.integers(-1, 99), detail=st.text()),
)


def _step(step: int, loss: float = 2.0) -> StepMetrics:
    return StepMetrics(step=step, loss=loss, tokens=100, step_s=0.5)


def _run(steps: range, *, eval_every: int = 2) -> list[Record]:
    """What a trainer writes for these steps: step, fault, and an evaluation after every other step."""
    records: list[Record] = []
    for step in steps:
        records += [Event(step=step, what="forward_failed"), _step(step, loss=3.0 - 0.1 * step)]
        if (step + 1) % eval_every == 0:
            records.append(EvalMetrics(step=step + 1, val_nats_per_byte=3.0 - 0.1 * step))
    return records


def _write(path: Path, records: list[Record], *, resume_step: int = 0) -> None:
    with MetricsLog(path, resume_step=resume_step) as log:
        for record in records:
            log.write(record)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(record=RECORDS)
def test_a_record_survives_its_line(record: Record) -> None:
    line = to_line(record)
    assert "\n" not in line
    assert from_line(line) == record


def test_a_line_is_strict_json_even_of_a_loss_that_is_not_a_number() -> None:
    for loss in (math.nan, math.inf, -math.inf):
        values = json.loads(to_line(_step(3, loss=loss)), parse_constant=pytest.fail)
        assert values["event"] == "step"
        assert values["loss"] is None
    again = from_line(to_line(_step(3, loss=math.nan)))
    assert isinstance(again, StepMetrics)
    assert math.isnan(again.loss)


def test_resuming_writes_the_file_an_uninterrupted_run_would_have_written(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    _write(straight, _run(range(12)))
    for checkpoint in (6, 7):
        _write(resumed, _run(range(9)))
        _write(resumed, _run(range(checkpoint, 12)), resume_step=checkpoint)
        assert resumed.read_bytes() == straight.read_bytes()


def test_an_evaluation_repeated_at_the_resumed_step_stands_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, _run(range(9)))
    _write(path, [EvalMetrics(step=6, val_nats_per_byte=9.0), *_run(range(6, 8))], resume_step=6)
    evals = [record for record in read_metrics(path) if isinstance(record, EvalMetrics)]
    assert [record.step for record in evals] == [2, 4, 6, 8]
    assert evals[2].val_nats_per_byte == pytest.approx(2.5)


def test_a_new_run_begins_a_new_file_and_keeps_what_an_earlier_one_measured(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    _write(path, _run(range(5)))
    measured = path.read_bytes()
    _write(path, [])
    _write(path, [_step(0)])
    assert read_metrics(path) == [_step(0)]
    assert path.with_name("replaced-metrics.jsonl").read_bytes() == measured
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["metrics.jsonl", "replaced-metrics.jsonl"]


def test_every_record_is_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for record in _run(range(4)):
            log.write(record)
            assert read_metrics(path)[-1] == record


def test_a_line_cut_short_by_a_crash_is_forgotten_and_a_resume_repairs_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, [_step(0), _step(1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert read_metrics(path) == [_step(0)]
    _write(path, [_step(1)], resume_step=1)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "Expecting value"),
        ("[]", "not a record"),
        ('{"event": "other"}', "not a record"),
        ('{"event": "eval", "step": 1}', "val_nats_per_byte"),
        ('{"event": "eval", "step": "1", "val_nats_per_byte": 1.0}', "step: unexpected value"),
        ('{"event": "eval", "step": true, "val_nats_per_byte": 1.0}', "step: unexpected value"),
        ('{"event": "eval", "stepp": 1, "val_nats_per_byte": 1.0}', "stepp: unexpected keyword"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{to_line(_step(0))}\n{line}\n{to_line(_step(1))}\n")
    with pytest.raises(ValueError, match=rf"metrics\.jsonl:2: .*{message}"):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        MetricsLog(path, resume_step=1)


def test_what_is_known_before_a_step_has_the_evaluation_made_there() -> None:
    known = before(_run(range(10)), 4)
    assert max(record.step for record in known if isinstance(record, StepMetrics | Event)) == 3
    assert max(record.step for record in known if isinstance(record, EvalMetrics)) == 4


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        threads = [
            threading.Thread(target=lambda n=n: [log.write(Event(step=i, what="w" * n)) for i in range(200)])
            for n in range(1, 5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read_metrics(path)) == 800


def test_derived_values_of_a_step() -> None:
    step = StepMetrics(
        step=0, loss=6.0, tokens=100, step_s=0.5, text_bytes=300, bytes_sent=1000, bytes_received=500,
        routed_pairs=200, dropped_pairs=30, lost_gradient_pairs=20,
    )  # fmt: skip
    assert step.tokens_per_s == 200
    assert step.nats_per_byte == 2.0
    assert step.wire_bytes_per_token == 15
    assert step.dropped_fraction == 0.25
    empty = StepMetrics(step=0, loss=0.0, tokens=0, step_s=0.0)
    assert (empty.tokens_per_s, empty.nats_per_byte, empty.wire_bytes_per_token, empty.dropped_fraction) == (0, 0, 0, 0)
    assert _step(0, loss=2.5).nats_per_byte == 2.5


def test_evenness_is_one_for_equal_loads_and_zero_for_a_monopoly() -> None:
    assert load_evenness([[5, 5, 5, 5], [1, 1, 1, 1]]) == pytest.approx(1)
    assert load_evenness([[8, 0, 0, 0]]) == pytest.approx(0)
    assert load_evenness([[1, 1, 0, 0]]) == pytest.approx(0.5)
    assert load_evenness([]) == load_evenness([[0, 0]]) == 1


def test_a_fault_becomes_an_event_with_all_it_says() -> None:
    fault = FaultEvent(what="forward_failed", peer="abcdef0123456", layer=2, action="elsewhere", cost_s=0.5, detail="x")
    event = Event.of(fault, step=7, at_s=1.5)
    assert (event.step, event.at_s, event.peer, event.layer) == (7, 1.5, "abcdef0123456", 2)
    assert str(event) == "forward_failed abcdef01 layer 2 -> elsewhere, 0.5 s: x"
    assert str(Event(step=0, what="resumed")) == "resumed"


def test_metrics_display_and_report_import_nothing_heavy() -> None:
    code = (
        "import sys, moe_peer.metrics, moe_peer.display, moe_peer.report;"
        "sys.exit(bool({'torch', 'numpy', 'rich', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
