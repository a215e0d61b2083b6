"""How long each peer takes, learned from its own answers. Pure: (state, sample, now) -> state.

Of every (peer, kind of call) the last `window` calls are kept. From their median and their upper quantile follow when a
call is *overdue* (ask somebody else as well), and from the slowest of them when it is *late* (give it up). Nothing is
a fixed number of seconds: a peer across an ocean is given its time, a peer next door is not waited for as long.

Times are in seconds and for the typical number of rows; a call with more rows is given proportionally more.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from types import MappingProxyType
from typing import TypeVar

STRANGER_FACTOR = 2.0
"""A peer that is hardly known yet is given so many times what the slowest of the others is."""

NumberT = TypeVar("NumberT", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyConfig:
    """What is learned from how many calls."""

    window: int = 64
    """Calls of one kind that are remembered per peer."""
    min_samples: int = 8
    """Fewer say nothing about the tail."""
    tail_quantile: float = 0.8
    """Of the window. Not higher: a peer that stalls in one call of twenty does so in 7 of 64 calls now and then, and
    must still be found overdue (with 0.9 one stall in twelve was missed)."""
    overdue_spread: float = 5.0
    """Overdue: the median and this many times the way from there to the tail. Of an exponential tail, one call in 200
    takes that long (0.5 * exp(-5 * ln 2.5))."""
    late_factor: float = 3.0
    """Late: this many times the slowest call of the window."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_samples <= self.window:
            raise ValueError("needs 1 <= min_samples <= window")
        if not 0.5 < self.tail_quantile < 1 or self.overdue_spread < 1 or self.late_factor < 1:
            raise ValueError("needs 0.5 < tail_quantile < 1, overdue_spread >= 1 and late_factor >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One call, as its caller and the reply saw it."""

    total_s: float
    """From sending to the answer; of a call that was given up: how long it was waited for."""
    rows: int = 1
    queue_s: float = 0.0
    """Of that, in the peer's queue."""
    compute_s: float = 0.0
    """Of that, on its device."""
    answered: bool = True
    """False: nothing came in `total_s`, the true time is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """What is known of one kind of call to one peer."""

    samples: tuple[Sample, ...] = ()
    """The latest last."""
    last_s: float = float("-inf")
    """When the latest came."""
    unanswered: int = 0
    """Calls in a row that were given up."""
    totals_s: tuple[float, ...] = ()
    """Of the samples, ascending."""
    rows: tuple[int, ...] = ()
    """Of the samples, ascending."""
    median_s: float = 0.0
    tail_s: float = 0.0
    typical_rows: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyState:
    """A track for each (peer id, kind of call)."""

    tracks: Mapping[tuple[str, str], Track] = field(
        default_factory=lambda: MappingProxyType[tuple[str, str], Track]({})
    )

    def track(self, peer_id: str, kind: str) -> Track:
        """Empty for a peer that was never called."""
        return self.tracks.get((peer_id, kind), _EMPTY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Medians of where a peer's time goes."""

    network_s: float
    """Both ways, and reading and writing messages."""
    queue_s: float
    compute_s: float


_EMPTY = Track()


def after_sample(
    state: LatencyState, peer_id: str, kind: str, sample: Sample, now_s: float, config: LatencyConfig
) -> LatencyState:
    """The state with one more call."""
    before = state.track(peer_id, kind)
    samples = (*before.samples, sample)[-config.window :]
    gone = before.samples[: len(before.samples) + 1 - len(samples)]
    # Kept in order: to sort them again for each call took 25 us of its 600.
    totals_s = _exchanged(before.totals_s, [s.total_s for s in gone], sample.total_s)
    rows = _exchanged(before.rows, [s.rows for s in gone], sample.rows)
    track = Track(
        samples=samples,
        last_s=now_s,
        unanswered=0 if sample.answered else before.unanswered + 1,
        totals_s=totals_s,
        rows=rows,
        median_s=totals_s[(len(totals_s) - 1) // 2],
        tail_s=totals_s[min(len(totals_s) - 1, int(config.tail_quantile * len(totals_s)))],
        typical_rows=max(1.0, (rows[(len(rows) - 1) // 2] + rows[len(rows) // 2]) / 2),
    )
    return LatencyState(tracks=MappingProxyType({**state.tracks, (peer_id, kind): track}))


def _exchanged(ascending: tuple[NumberT, ...], gone: Iterable[NumberT], new: NumberT) -> tuple[NumberT, ...]:
    values = list(ascending)
    for value in gone:
        del values[bisect_left(values, value)]
    insort(values, new)
    return tuple(values)


def without_peer(state: LatencyState, peer_id: str) -> LatencyState:
    """The state with the peer forgotten; the same object when it was not known."""
    left = {key: track for key, track in state.tracks.items() if key[0] != peer_id}
    return state if len(left) == len(state.tracks) else LatencyState(tracks=MappingProxyType(left))


def split(track: Track) -> Split:
    """Where the time of the answered calls goes; zeros when there is none."""
    answered = [s for s in track.samples if s.answered]
    if not answered:
        return Split(network_s=0.0, queue_s=0.0, compute_s=0.0)
    return Split(
        network_s=median(max(0.0, s.total_s - s.queue_s - s.compute_s) for s in answered),
        queue_s=median(s.queue_s for s in answered),
        compute_s=median(s.compute_s for s in answered),
    )


def _scale(track: Track, rows: int) -> float:
    return max(1.0, rows / track.typical_rows)


def overdue_after_s(state: LatencyState, peer_id: str, kind: str, rows: int, config: LatencyConfig) -> float | None:
    """When a call is later than the peer's own tail says. Of a peer that is hardly known yet, twice what the tail of
    the slowest of the others says; None when nobody is known."""
    track = state.track(peer_id, kind)
    if len(track.samples) >= config.min_samples:
        return _own_overdue_s(track, rows, config)
    known = (t for (_, k), t in state.tracks.items() if k == kind and len(t.samples) >= config.min_samples)
    slowest_s = max((_own_overdue_s(t, rows, config) for t in known), default=None)
    return None if slowest_s is None else STRANGER_FACTOR * slowest_s


def _own_overdue_s(track: Track, rows: int, config: LatencyConfig) -> float:
    return (track.median_s + config.overdue_spread * (track.tail_s - track.median_s)) * _scale(track, rows)


def late_after_s(
    state: LatencyState, peer_id: str, kind: str, rows: int, config: LatencyConfig, *, floor_s: float, cap_s: float
) -> float:
    """When to give a call up: within `floor_s` and `cap_s`.

    Of a peer that is hardly known yet, what the slowest of the others is given, twice; `cap_s` when nobody is known.
    Each call in a row that was given up doubles it, as TCP does (RFC 6298, 5.5): perhaps the peer is only slower now.
    """
    track = state.track(peer_id, kind)
    known_s = _own_late_s(track, rows, config)
    if known_s is None:
        others = [_own_late_s(t, rows, config) for (_, k), t in state.tracks.items() if k == kind]
        known_s = STRANGER_FACTOR * max((late_s for late_s in others if late_s is not None), default=cap_s)
    backed_off_s = max(floor_s, known_s) * 2.0 ** min(track.unanswered, 16)
    return min(cap_s, backed_off_s)


def _own_late_s(track: Track, rows: int, config: LatencyConfig) -> float | None:
    answered = [s.total_s for s in track.samples if s.answered]
    if len(answered) < config.min_samples:
        return None
    return config.late_factor * max(answered) * _scale(track, rows)


def slowness(state: LatencyState, kind: str, config: LatencyConfig) -> dict[str, float]:
    """Peer id -> its median time over that of the typical peer, for peers of which enough is known."""
    known = {p: t.median_s for (p, k), t in state.tracks.items() if k == kind and len(t.samples) >= config.min_samples}
    if not known:
        return {}
    # The lower median: with two peers the faster one is the norm.
    typical_s = sorted(known.values())[(len(known) - 1) // 2]
    return {p: s / typical_s if typical_s > 0 else 1.0 for p, s in known.items()}
