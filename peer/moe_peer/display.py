"""What a person sees while training runs: a live panel on a terminal, a plain line now and then elsewhere (stderr)."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TextIO

from moe_peer.metrics import EvalMetrics, Event, Record, StepMetrics

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"
_HISTORY_STEPS = 400
_WINDOW_STEPS = 20
_EVENTS_SHOWN = 5


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as `width` bars at most, each the mean of its share of them; nan is a gap."""
    if not values or width < 1:
        return ""
    n = min(width, len(values))
    groups = [values[i * len(values) // n : (i + 1) * len(values) // n] for i in range(n)]
    finite = [[v for v in group if math.isfinite(v)] for group in groups]
    means = [sum(group) / len(group) if group else math.nan for group in finite]
    known = [mean for mean in means if math.isfinite(mean)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] if math.isfinite(mean) else " " for mean in means)


def short(value: float, unit: str = "") -> str:
    """Three figures and a prefix: `3.14 k`, `27.0 M`."""
    for prefix in ("", "k", "M", "G"):
        if abs(value) < 999.5 or prefix == "G":
            text = f"{value:.0f}" if not prefix and value == int(value) else f"{value:.3g}"
            return f"{text} {prefix}{unit}".rstrip()
        value /= 1000
    raise AssertionError


def clock_time(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:09`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DisplayState:
    """All that the display shows; a new one for each record, so that the drawing thread never sees half a change."""

    title: str
    total_steps: int | None = None
    bigram_nats_per_byte: float | None = None
    losses: tuple[float, ...] = ()
    """Nats per byte of the latest steps."""
    window: tuple[StepMetrics, ...] = ()
    """The latest steps, over which rates are means."""
    evaluation: EvalMetrics | None = None
    best_nats_per_byte: float = math.inf
    dropped_pairs: int = 0
    lost_gradient_pairs: int = 0
    retries: int = 0
    hedges: int = 0
    events: tuple[Event, ...] = ()
    event_count: int = 0
    last_step_at_s: float = field(default=math.nan)

    def after(self, record: Record, now_s: float) -> DisplayState:
        """With one more record."""
        if isinstance(record, StepMetrics):
            return replace(
                self,
                losses=(*self.losses, record.nats_per_byte)[-_HISTORY_STEPS:],
                window=(*self.window, record)[-_WINDOW_STEPS:],
                dropped_pairs=self.dropped_pairs + record.dropped_pairs,
                lost_gradient_pairs=self.lost_gradient_pairs + record.lost_gradient_pairs,
                retries=self.retries + record.retries,
                hedges=self.hedges + record.hedges,
                last_step_at_s=now_s,
            )
        if isinstance(record, EvalMetrics):
            best = min(self.best_nats_per_byte, record.val_nats_per_byte)
            return replace(self, evaluation=record, best_nats_per_byte=best)
        return replace(self, events=(*self.events, record)[-_EVENTS_SHOWN:], event_count=self.event_count + 1)

    # What the window says ---------------------------------------------------------------------------------

    @property
    def last(self) -> StepMetrics | None:
        return self.window[-1] if self.window else None

    @property
    def window_s(self) -> float:
        return sum(step.step_s for step in self.window)

    @property
    def tokens_per_s(self) -> float:
        return sum(step.tokens for step in self.window) / self.window_s if self.window_s > 0 else 0.0

    @property
    def wire_bytes_per_token(self) -> float:
        tokens = sum(step.tokens for step in self.window)
        return sum(step.bytes_sent + step.bytes_received for step in self.window) / tokens if tokens else 0.0

    @property
    def calls_per_step(self) -> float:
        return sum(step.calls for step in self.window) / len(self.window) if self.window else 0.0

    @property
    def dropped_fraction(self) -> float:
        routed = sum(step.routed_pairs for step in self.window)
        return sum(step.unanswered_pairs for step in self.window) / routed if routed else 0.0

    def remaining_s(self) -> float | None:
        """At the window's pace."""
        if self.total_steps is None or not self.window:
            return None
        return max(0, self.total_steps - 1 - self.window[-1].step) * self.window_s / len(self.window)


def plain_line(state: DisplayState) -> str:
    """One line that says the most important, for a log."""
    last = state.last
    if last is None:
        return f"{state.title}: no step yet"
    total = f"/{state.total_steps}" if state.total_steps else ""
    parts = [f"step {last.step + 1}{total}", f"loss {last.nats_per_byte:.3f}"]
    if state.evaluation is not None:
        parts.append(f"val {state.evaluation.val_nats_per_byte:.3f}")
    if state.bigram_nats_per_byte is not None:
        parts.append(f"bigram {state.bigram_nats_per_byte:.3f}")
    parts += [f"{short(state.tokens_per_s)} tok/s", f"{short(state.wire_bytes_per_token, 'B')}/tok"]
    parts.append(f"{state.calls_per_step:.0f} calls/step")
    parts.append(f"experts {last.live_experts}/{last.total_experts}")
    parts.append(f"dropped {state.dropped_fraction:.2%}")
    parts.append(f"staleness {last.staleness_mean:.2f} (max {last.staleness_max})")
    if last.retries:
        parts.append(f"retries {last.retries}")
    return "  ".join(parts)


def panel(state: DisplayState, *, width: int, now_s: float, started_s: float) -> RenderableType:
    """The live panel."""
    from rich.box import ROUNDED
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=9)
    table.add_column(overflow="ellipsis", no_wrap=True, ratio=1)
    last = state.last
    if last is None:
        table.add_row("step", Text(f"waiting for the first one, {clock_time(now_s - started_s)}"))
    else:
        _add_rows(table, state, last, width=width, now_s=now_s)
    parts: list[RenderableType] = []
    if state.total_steps:
        done = 0 if last is None else last.step + 1
        parts += [ProgressBar(total=state.total_steps, completed=done, width=max(10, width - 6)), Text()]
    parts.append(table)
    if state.events:
        parts.append(Text(f"\nlatest of {state.event_count} events", style="dim"))
        for event in state.events:
            line = Text(f"step {event.step}  ", style="dim")
            line.append(str(event), style="yellow")
            line.truncate(max(10, width - 6), overflow="ellipsis")
            parts.append(line)
    title = Text.assemble((state.title, "bold"), (f"  {clock_time(now_s - started_s)}", "dim"))
    return Panel(Group(*parts), title=title, title_align="left", border_style="cyan", box=ROUNDED, padding=(0, 1))


def _add_rows(table: Table, state: DisplayState, last: StepMetrics, *, width: int, now_s: float) -> None:
    from rich.text import Text

    step = Text(f"{last.step + 1}" + (f" of {state.total_steps}" if state.total_steps else ""))
    remaining_s = state.remaining_s()
    if remaining_s is not None:
        step.append(f"   {clock_time(remaining_s)} to go", style="dim")
    mean_s = state.window_s / len(state.window)
    waiting_s = now_s - state.last_step_at_s
    if waiting_s > max(5.0, 4 * mean_s):
        step.append(f"   no step for {clock_time(waiting_s)}", style="bold red")
    table.add_row("step", step)
    bars = sparkline(state.losses, max(8, min(60, width - 30)))
    table.add_row("loss", Text.assemble((f"{last.nats_per_byte:.3f} ", "bold"), (bars, "cyan")))
    table.add_row("held-out", _held_out(state))
    speed = f"{short(state.tokens_per_s)} tokens/s   {mean_s:.3g} s/step   lr {last.lr:.2g}   |g| {last.grad_norm:.3g}"
    table.add_row("speed", Text(speed))
    wire = f"{short(state.wire_bytes_per_token, 'B')}/token   {state.calls_per_step:.0f} calls/step   "
    rows = f"{last.rows_per_token:.1f} rows/token   "
    table.add_row("network", Text(f"{wire}{rows}{state.retries} retries   {state.hedges} hedges"))
    experts = Text()
    missing = last.live_experts < last.total_experts
    experts.append(f"{last.live_experts}/{last.total_experts} live", style="bold yellow" if missing else "")
    pairs = f"{short(state.dropped_pairs)} pairs forward, {short(state.lost_gradient_pairs)} backward in all"
    dropped = f"   {state.dropped_fraction:.2%} dropped ({pairs})"
    experts.append(dropped, style="yellow" if state.dropped_fraction > 0 else "")
    experts.append(f"   load {last.load_evenness:.0%} even", style="dim")
    table.add_row("experts", experts)
    table.add_row("staleness", Text(f"{last.staleness_mean:.2f} updates   max {last.staleness_max}"))


def _held_out(state: DisplayState) -> Text:
    from rich.text import Text

    text = Text()
    bigram = state.bigram_nats_per_byte
    if state.evaluation is None:
        text.append("not yet", style="dim")
    else:
        value = state.evaluation.val_nats_per_byte
        text.append(f"{value:.3f}", style="bold green" if bigram is not None and value < bigram else "bold")
        text.append(f" nats/byte after {state.evaluation.step} steps")
    if bigram is not None:
        text.append(f"   bigram {bigram:.3f}", style="dim")
    return text


class TrainDisplay:
    """Shows records as they come, from any thread; enter it before the first and leave it after the last."""

    def __init__(
        self,
        title: str,
        *,
        total_steps: int | None = None,
        bigram_nats_per_byte: float | None = None,
        mode: Literal["auto", "live", "plain", "off"] = "auto",
        every_s: float = 5.0,
        stream: TextIO | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`auto`: live when `stream` (stderr) is a terminal, else a plain line at most every `every_s` seconds."""
        self.state = DisplayState(title=title, total_steps=total_steps, bigram_nats_per_byte=bigram_nats_per_byte)
        self._stream = stream if stream is not None else sys.stderr
        if mode == "auto":
            mode = "live" if self._stream.isatty() else "plain"
        self._mode = mode
        self._every_s = every_s
        self._clock_s = clock_s
        self._started_s = clock_s()
        self._next_line_s = -math.inf
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._unsaid = False

    def show(self, record: Record) -> None:
        """Take one more record in."""
        with self._lock:
            now_s = self._clock_s()
            self.state = self.state.after(record, now_s)
            if self._mode != "plain":
                return
            if isinstance(record, Event):
                self._print(f"step {record.step}  {record}")
                return
            self._unsaid = True
            if isinstance(record, StepMetrics) and now_s >= self._next_line_s:
                self._next_line_s = now_s + self._every_s
                self._unsaid = False
                self._print(plain_line(self.state))

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def __enter__(self) -> TrainDisplay:
        if self._mode == "live":
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream)

            def render() -> RenderableType:
                return panel(self.state, width=console.width, now_s=self._clock_s(), started_s=self._started_s)

            # stdout carries JSON lines for machines: rich must not take them over.
            self._live = Live(console=console, get_renderable=render, refresh_per_second=4, redirect_stdout=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._mode == "plain" and self._unsaid:
            self._print(plain_line(self.state))
