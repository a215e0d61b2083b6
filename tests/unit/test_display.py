from __future__ import annotations

import io
import math
from collections.abc import Iterator

import pytest
from rich.console import Console

from moe_peer.display import DisplayState, TrainDisplay, clock_time, panel, plain_line, short, sparkline
from moe_peer.metrics import EvalMetrics, Event, StepMetrics


class Clock:
    """Time that goes on only when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _step(step: int, *, loss: float = 2.0, live: int = 32, dropped: int = 0, lost: int = 0) -> StepMetrics:
    return StepMetrics(
        step=step, loss=loss, tokens=2000, step_s=0.5, bytes_sent=3000, bytes_received=1000, calls=12,
        routed_pairs=1000, dropped_pairs=dropped, lost_gradient_pairs=lost, live_experts=live, total_experts=32,
    )  # fmt: skip


def _drawn(state: DisplayState, *, width: int = 100, now_s: float = 0.0) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(panel(state, width=width, now_s=now_s, started_s=0.0))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _trained() -> DisplayState:
    state = DisplayState(title="demo", total_steps=100, bigram_nats_per_byte=2.4)
    for step in range(40):
        state = state.after(_step(step, loss=4.0 - step * 0.05), now_s=step * 0.5)
    return state.after(EvalMetrics(step=40, val_nats_per_byte=2.1), now_s=20.0)


def test_sparkline_falls_with_the_loss_and_keeps_to_its_width() -> None:
    assert sparkline([4.0, 3.0, 2.0, 1.0], 4) == "█▆▃▁"
    line = sparkline([100 - i for i in range(1000)], 20)
    assert len(line) == 20
    assert list(line) == sorted(line, reverse=True)
    assert sparkline([1.0, math.nan, 2.0], 3) == "▁ █"
    assert sparkline([math.nan, 2.0, 2.0], 3) == " ▁▁"
    assert sparkline([], 5) == sparkline([1.0], 0) == ""


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (7, "7"), (3137.0, "3.14 k"), (999.6, "1 k"), (27e6, "27 M"), (4.2e12, "4.2e+03 G")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_times_read_like_a_clock() -> None:
    assert [clock_time(s) for s in (0, 42.9, 725, 11229)] == ["0:00", "0:42", "12:05", "3:07:09"]


def test_the_panel_shows_what_a_researcher_asks_first() -> None:
    text = _drawn(_trained(), now_s=20.0)
    for part in ("40 of 100", "0:30 to go", "2.050", "2.100 nats/byte after 40 steps", "bigram 2.400", "4 k tokens/s"):
        assert part in text
    for part in ("2 B/token", "12 calls/step", "32/32 live", "0.00% dropped", "max 0"):
        assert part in text


def test_the_panel_names_faults_missing_experts_and_a_stall() -> None:
    state = _trained().after(_step(40, live=20, dropped=100, lost=20), now_s=20.5)
    state = state.after(Event(step=40, what="peer_gone", peer="3f2a91c07711", detail="[bold]not markup[/bold]"), 20.5)
    text = _drawn(state, now_s=80.5)
    assert "20/32 live" in text
    assert "0.60% dropped (100 pairs forward, 20 backward in all)" in text
    assert "dropped 0.60%" in plain_line(state)
    assert "peer_gone 3f2a91c0: [bold]not markup[/bold]" in text
    assert "no step for 1:00" in text


def test_the_panel_stays_within_a_narrow_terminal_and_works_before_the_first_step() -> None:
    for width in (24, 40, 60):
        assert max(len(line) for line in _drawn(_trained(), width=width).splitlines()) <= width
    assert "waiting for the first one" in _drawn(DisplayState(title="demo"))


def test_old_values_leave_the_windows() -> None:
    state = DisplayState(title="demo")
    for step in range(1000):
        state = state.after(_step(step), now_s=0.0).after(Event(step=step, what="x"), now_s=0.0)
    assert len(state.losses) == 400
    assert len(state.window) == 20
    assert len(state.events) == 5
    assert state.event_count == 1000


def test_plain_lines_come_at_most_every_few_seconds_faults_at_once_and_the_last_step_always() -> None:
    clock, stream = Clock(), io.StringIO()
    with TrainDisplay("demo", total_steps=20, stream=stream, every_s=5.0, clock_s=clock) as display:
        for step in range(20):
            clock.now_s = step * 1.0
            display.show(_step(step))
            if step == 7:
                display.show(Event(step=7, what="peer_gone"))
        display.show(EvalMetrics(step=20, val_nats_per_byte=1.5))
    lines = stream.getvalue().splitlines()
    starts = [line.split("  ")[0] for line in lines]
    assert starts == ["step 1/20", "step 6/20", "step 7", "step 11/20", "step 16/20", "step 20/20"]
    assert "val 1.500" in lines[-1]


def test_a_plain_line_says_the_most_important() -> None:
    line = plain_line(_trained())
    for part in ("step 40/100", "loss 2.050", "val 2.100", "bigram 2.400", "4 k tok/s", "2 B/tok", "experts 32/32"):
        assert part in line
    assert plain_line(DisplayState(title="demo")) == "demo: no step yet"


@pytest.fixture
def terminal() -> Iterator[io.StringIO]:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with Terminal() as stream:
        yield stream


def test_a_terminal_gets_the_live_panel_and_stdout_stays_the_machines(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with TrainDisplay("demo", total_steps=10, stream=terminal) as display:
        display.show(_step(0))
        print('{"event": "step"}')
        display.show(_step(9))
    assert capsys.readouterr().out == '{"event": "step"}\n'
    assert "10 of 10" in terminal.getvalue()


def test_off_says_nothing() -> None:
    stream = io.StringIO()
    with TrainDisplay("demo", mode="off", stream=stream) as display:
        display.show(_step(0))
    assert stream.getvalue() == ""
    assert display.state.last == _step(0)
