"""The end of a run on paper: `loss.png` and a summary in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_peer.display import clock_time, short
from moe_peer.metrics import EvalMetrics, Event, Record, StepMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT, _TRAIN, _VAL, _BIGRAM, _FAULT = "#1f2933", "#9aa5b1", "#2563a8", "#d9730d", "#5f6b7a", "#b42318"
_SPEED, _LIVE = "#3f7d58", "#6b4ba1"
# The worse of two faults that are too near each other for two labels.
_SEVERITY = ("peer_gone", "peer_suspended", "backward_failed", "forward_failed", "commit_failed")
_LABELS_AT_MOST = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultMark:
    """Faults near each other on the step axis, drawn as one line."""

    step: int
    """Of the first."""
    event: Event
    """The gravest."""
    count: int

    @property
    def label(self) -> str:
        text = self.event.what.replace("_", " ")
        if self.event.peer:
            text += f" {self.event.peer[:8]}"
        return text if self.count == 1 else f"{text}  (+{self.count - 1})"


def fault_marks(events: Sequence[Event], *, gap_steps: int) -> list[FaultMark]:
    """The events in groups: one begins where an event lies more than `gap_steps` after the group's first."""
    groups: list[list[Event]] = []
    for event in sorted(events, key=lambda e: e.step):
        if groups and event.step - groups[-1][0].step <= gap_steps:
            groups[-1].append(event)
        else:
            groups.append([event])

    def gravity(event: Event) -> int:
        return _SEVERITY.index(event.what) if event.what in _SEVERITY else len(_SEVERITY)

    return [FaultMark(step=group[0].step, event=min(group, key=gravity), count=len(group)) for group in groups]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the `window` values around each one (fewer at the ends); values that are not finite do not count."""
    result: list[float] = []
    half = window // 2
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        result.append(sum(near) / len(near) if near else math.nan)
    return result


def summary(
    records: Sequence[Record], *, title: str, bigram_nats_per_byte: float | None = None, fault_kinds_shown: int = 12
) -> str:
    """The run in words: losses against the bigram model, speed, bytes, drops, staleness and each kind of fault."""
    steps = [r for r in records if isinstance(r, StepMetrics)]
    evals = [r for r in records if isinstance(r, EvalMetrics)]
    events = [r for r in records if isinstance(r, Event) and r.is_fault]
    lines = [title, "=" * len(title)]
    if not steps:
        return "\n".join([*lines, "no step was made", ""])
    rows = [*_loss_rows(steps, evals, bigram_nats_per_byte), *_network_rows(steps)]
    kinds = Counter((event.what, event.action) for event in events)
    rows.append(("faults", f"{len(events)}" if events else "none"))
    width = max(len(name) for name, _ in rows) + 2
    lines += [f"{name:<{width}}{text}" for name, text in rows]
    for (what, action), count in kinds.most_common(fault_kinds_shown):
        cost_s = sum(e.cost_s for e in events if (e.what, e.action) == (what, action))
        text = f"{count} x {what}" + (f" -> {action}" if action else "") + (f", {cost_s:.1f} s" if cost_s > 0 else "")
        lines.append(f"{'':<{width}}{text}")
    return "\n".join([*lines, ""])


def _loss_rows(
    steps: Sequence[StepMetrics], evals: Sequence[EvalMetrics], bigram: float | None
) -> list[tuple[str, str]]:
    tokens, wall_s = sum(step.tokens for step in steps), sum(step.step_s for step in steps)
    speed = f"{short(tokens / wall_s)} tokens/s" if wall_s > 0 else "no time measured"
    last = steps[-min(len(steps), 20) :]
    final = sum(step.nats_per_byte for step in last) / len(last)
    rows = [
        ("steps", f"{len(steps)} ({steps[0].step}..{steps[-1].step}), {short(tokens)} tokens"),
        ("time", f"{clock_time(wall_s)} in steps, {speed}"),
        (
            "training loss",
            f"{steps[0].nats_per_byte:.4f} -> {final:.4f} nats/byte (mean of the last {len(last)} steps)",
        ),
    ]
    if evals:
        best = min(evals, key=lambda e: e.val_nats_per_byte if math.isfinite(e.val_nats_per_byte) else math.inf)
        rows.append(("held-out loss", f"{evals[-1].val_nats_per_byte:.4f} nats/byte after {evals[-1].step} steps"))
        rows.append(("best held-out", f"{best.val_nats_per_byte:.4f} nats/byte after {best.step} steps"))
        if bigram is not None:
            passed = next((e.step for e in evals if e.val_nats_per_byte < bigram), None)
            verdict = "not passed" if passed is None else f"passed by step {passed}"
            difference = best.val_nats_per_byte - bigram
            rows.append(("bigram model", f"{bigram:.4f} nats/byte: {verdict} (best held-out {difference:+.4f})"))
    elif bigram is not None:
        rows.append(("bigram model", f"{bigram:.4f} nats/byte"))
    return rows


def _network_rows(steps: Sequence[StepMetrics]) -> list[tuple[str, str]]:
    tokens = sum(step.tokens for step in steps) or 1
    sent, received = sum(step.bytes_sent for step in steps), sum(step.bytes_received for step in steps)
    calls, retries = sum(step.calls for step in steps), sum(step.retries for step in steps)
    routed, dropped = sum(step.routed_pairs for step in steps), sum(step.dropped_pairs for step in steps)
    lost = sum(step.lost_gradient_pairs for step in steps)
    hedges, won = sum(step.hedges for step in steps), sum(step.hedges_won for step in steps)
    staleness = sum(step.staleness_mean for step in steps) / len(steps)
    live = min(step.live_experts for step in steps)
    share = f", {(dropped + lost) / routed:.3%} together" if routed else ""
    return [
        ("network", f"{short(sent, 'B')} sent, {short(received, 'B')} received, "
                    f"{short((sent + received) / tokens, 'B')}/token"),
        ("calls", f"{calls} ({calls / len(steps):.1f} per step), {retries} retries, {hedges} hedges "
                  f"({won} won), {sum(step.failovers for step in steps)} fail-overs"),
        ("rows", f"{sum(step.rows_sent for step in steps) / tokens:.2f} sent per token, forward, all layers"),
        ("dropped pairs", f"{dropped} of {routed} forward, {lost} backward{share}"),
        ("live experts", f"{live} of {steps[-1].total_experts} at the least, {steps[-1].live_experts} at the end"),
        ("staleness", f"{staleness:.2f} updates on average, {max(step.staleness_max for step in steps)} at most"),
    ]  # fmt: skip


def draw(records: Sequence[Record], path: Path, *, title: str, bigram_nats_per_byte: float | None = None) -> None:
    """The loss curve, the speed and the living share of the swarm over the steps, as PNG at `path`.

    ImportError when matplotlib is not installed (`pip install 'moe-net[plot]'`); ValueError without any step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [r for r in records if isinstance(r, StepMetrics)]
    if not steps:
        raise ValueError("no step was made: there is nothing to draw")
    # Not pyplot: that would keep the figure alive and choose a backend by the environment.
    figure = Figure(figsize=(9, 6.4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes: list[Axes] = list(figure.subplots(3, 1, sharex=True, height_ratios=(5, 1.1, 1.1)))
    # Step s measures its loss on the weights after s updates, as an evaluation after s steps does: the same place.
    made = [step.step for step in steps]
    evals = [r for r in records if isinstance(r, EvalMetrics) and math.isfinite(r.val_nats_per_byte)]
    first, last = min([made[0], *(e.step for e in evals)]), max([made[-1], *(e.step for e in evals)])
    _draw_loss(axes[0], steps, evals, bigram_nats_per_byte)
    _draw_speed(axes[1], steps)
    _draw_swarm(axes[2], steps)
    marks = fault_marks(
        [r for r in records if isinstance(r, Event) and r.is_fault], gap_steps=max(1, (last - first) // 40)
    )
    _draw_marks(axes, marks, span=(first, last))
    for axis in axes:
        axis.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=_INK, labelsize=9, length=0)
        axis.yaxis.label.set_color(_INK)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.spines["bottom"].set_color(_FAINT)
    axes[-1].set_xlabel("steps made", color=_INK)
    axes[-1].set_xlim(first, max(last, first + 1))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, x=0.012, ha="left", color=_INK, fontsize=13, fontweight="bold", parse_math=False)
    figure.align_ylabels()
    figure.savefig(path, format="png")


def _draw_loss(axis: Axes, steps: Sequence[StepMetrics], evals: Sequence[EvalMetrics], bigram: float | None) -> None:
    made = [step.step for step in steps]
    losses = [step.nats_per_byte for step in steps]
    window = max(1, len(steps) // 50)
    raw: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.9} if window > 1 else {"linewidth": 1.8, "label": "training"}
    axis.plot(made, losses, color=_TRAIN, **raw)
    if window > 1:
        label = f"training (mean of {window // 2 * 2 + 1} steps)"
        axis.plot(made, smooth(losses, window), color=_TRAIN, linewidth=1.8, label=label)
    if evals:
        values = [e.val_nats_per_byte for e in evals]
        label = f"held-out (now {values[-1]:.3f})"
        axis.plot(
            [e.step for e in evals],
            values,
            color=_VAL,
            marker="o",
            markersize=4.5,
            linewidth=1.2,
            label=label,
            clip_on=False,
            zorder=3,
        )
    if bigram is not None:
        axis.axhline(bigram, color=_BIGRAM, linestyle=(0, (5, 3)), linewidth=1.3, label=f"bigram model ({bigram:.3f})")
    axis.set_ylabel("loss, nats per byte")
    axis.margins(y=0.08)
    # Above the panel: inside, it would hide either the curve or the faults' labels.
    axis.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9, labelcolor=_INK, borderaxespad=0.2
    )


def _draw_speed(axis: Axes, steps: Sequence[StepMetrics]) -> None:
    made = [step.step for step in steps]
    raw = [step.tokens_per_s for step in steps]
    axis.plot(made, raw, color=_SPEED, linewidth=0.9, alpha=0.35)
    axis.plot(made, smooth(raw, max(1, len(steps) // 50)), color=_SPEED, linewidth=1.5)
    axis.set_ylabel("tokens/s")
    axis.set_ylim(0, max(raw) * 1.1 or 1)
    axis.yaxis.set_major_formatter(lambda value, _: short(value).replace(" ", "") if value else "0")
    axis.locator_params(axis="y", nbins=3)


def _draw_swarm(axis: Axes, steps: Sequence[StepMetrics]) -> None:
    made = [step.step for step in steps]
    live = [100 * step.live_experts / step.total_experts if step.total_experts else math.nan for step in steps]
    dropped = [100 * step.dropped_fraction for step in steps]
    axis.plot(made, live, color=_LIVE, linewidth=1.6, drawstyle="steps-mid", label="experts live")
    axis.plot(made, dropped, color=_VAL, linewidth=1.4, drawstyle="steps-mid", label="pairs dropped")
    axis.set_ylabel("swarm, %")
    axis.set_ylim(-4, 108)
    axis.set_yticks([0, 50, 100])
    axis.legend(loc="center right", frameon=True, fontsize=8, labelcolor=_INK, edgecolor="none", framealpha=0.9)


def _draw_marks(axes: Sequence[Axes], marks: Sequence[FaultMark], *, span: tuple[int, int]) -> None:
    """A line through all panels for each mark; the gravest ones (in number) with a label at the top."""

    def rank(mark: FaultMark) -> tuple[int, int]:
        what = mark.event.what
        return (_SEVERITY.index(what) if what in _SEVERITY else len(_SEVERITY), -mark.count)

    labelled = sorted(marks, key=rank)[:_LABELS_AT_MOST]
    for mark in marks:
        at = min(max(mark.step, span[0]), span[1])
        for axis in axes:
            axis.axvline(at, color=_FAULT, linewidth=0.9, alpha=0.75 if mark in labelled else 0.3, zorder=1)
        if mark in labelled:
            right = at > span[0] + 0.97 * (span[1] - span[0])
            axes[0].annotate(
                mark.label,
                xy=(at, 0.98),
                xycoords=("data", "axes fraction"),
                xytext=(-4 if right else 4, 0),
                textcoords="offset points",
                rotation=90,
                ha="right" if right else "left",
                va="top",
                fontsize=8,
                color=_FAULT,
                parse_math=False,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0},
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `write_report` left in the folder."""

    summary: str
    plot_path: Path | None
    """None when matplotlib is not installed, or no step was made; the summary says so."""


def write_report(
    records: Sequence[Record], folder: Path, *, title: str, bigram_nats_per_byte: float | None = None
) -> Report:
    """`summary.txt` and `loss.png` in `folder`, which is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    text = summary(records, title=title, bigram_nats_per_byte=bigram_nats_per_byte)
    plot_path: Path | None = folder / "loss.png"
    try:
        draw(records, plot_path, title=title, bigram_nats_per_byte=bigram_nats_per_byte)
    except (ImportError, ValueError) as error:
        if isinstance(error, ImportError):
            text += f"loss.png was not drawn: {error} (pip install 'moe-net[plot]')\n"
        plot_path = None
    (folder / "summary.txt").write_text(text, encoding="utf-8")
    return Report(summary=text, plot_path=plot_path)
