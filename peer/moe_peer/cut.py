"""How a step is cut into micro-batches, and how many of them are in flight: chosen from what was measured. Pure.

C: the trainer's own work of a step, W: a micro-batch's wait for the network, over all its layers, forward and back.
A step of n micro-batches, m in flight, takes about

    max(C + n * overhead,  ceil(n / m) * (C / n + W))

for the trainer's work is serial, and a micro-batch goes its way of work and waits once per round of m. The servers'
work is in neither: more in flight would have it overlap the trainer's, but on one machine both share its cores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

# Where the shortest wait for a layer is below this, there is no network: on one machine gRPC, codec and scheduler take
# 1 to 6 ms, and more micro-batches would cost as much again. So a swarm on one machine keeps one, and its runs repeat
# bit by bit. The shortest, for that does not grow when the machine is busy with other things.
LOCAL_WAIT_S = 0.008
# A micro-batch costs this per layer and direction beyond its share of the work: calls, small matrices.
OVERHEAD_S = 0.001
# A cut that is more than this much slower than the best is not taken for being smaller.
GOOD_ENOUGH = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A step's micro-batches."""

    micro_batches: int = 1
    in_flight: int = 1

    def sequences_alive(self, sequences: int) -> float:
        """Of a step of so many, those in the graphs in flight: what memory goes by."""
        return sequences * self.in_flight / self.micro_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A step, one micro-batch at a time."""

    compute_s: float
    """C above."""
    wait_s: float
    """W above."""
    trips: int
    """Waits in W: two a layer."""
    shortest_wait_s: float
    """Of all single waits."""


def measured(compute_s: Sequence[float], waits_s: Sequence[float], *, trips: int) -> Measured:
    """From several steps, and all their waits without the servers' own time.

    The lower quartile of either: a busy machine makes some of both longer, but no round trip shorter.
    """
    low = _lower_quartile(waits_s)
    return Measured(
        compute_s=_lower_quartile(compute_s), wait_s=low * trips, trips=trips, shortest_wait_s=min(waits_s, default=0.0)
    )


def _lower_quartile(values: Sequence[float]) -> float:
    return quantiles(values, n=4, method="inclusive")[0] if len(values) > 1 else sum(values)


def open_cuts(*, sequences: int, micro_batches: int, in_flight: int) -> tuple[Cut, ...]:
    """The cuts that the options leave open, the one to begin with first; 0 stands for "to be chosen".

    Where nothing is said, all micro-batches of a step are in flight: together they need the memory of the whole step
    at once. ValueError when the options contradict each other.
    """
    if min(micro_batches, in_flight) < 0:
        raise ValueError("micro_batches and in_flight must not be negative")
    if micro_batches == 0 and in_flight > 0 and sequences % in_flight:
        raise ValueError(f"in_flight={in_flight} does not divide sequences={sequences}: say micro_batches as well")
    if micro_batches == 0 and in_flight > 0:
        micro_batches = in_flight
    if micro_batches and sequences % micro_batches:
        raise ValueError(f"micro_batches={micro_batches} does not divide sequences={sequences}")
    if in_flight > micro_batches:
        raise ValueError(f"in_flight={in_flight} is more than micro_batches={micro_batches}")
    if in_flight:
        return (Cut(micro_batches=micro_batches, in_flight=in_flight),)
    if micro_batches:
        return tuple(Cut(micro_batches=micro_batches, in_flight=m) for m in range(1, micro_batches + 1))
    return tuple(Cut(micro_batches=m, in_flight=m) for m in range(1, sequences + 1) if sequences % m == 0)


def predicted_s(cut: Cut, seen: Measured) -> float:
    """Time of a step, the servers' work aside."""
    n = cut.micro_batches
    work_s = seen.compute_s + n * seen.trips * OVERHEAD_S
    return max(work_s, math.ceil(n / cut.in_flight) * (work_s / n + seen.wait_s))


def choose_in_flight(cuts: Sequence[Cut], seen: Measured, *, sequences: int, max_sequences: float = math.inf) -> Cut:
    """The cut with the fewest micro-batches in flight whose step is as short as any's, or nearly.

    Args:
        cuts: as `open_cuts` gives them; the first stays where the network is none.
        sequences: of a step.
        max_sequences: that memory has room for in flight; the first cut is taken to fit.
    """
    if seen.shortest_wait_s < LOCAL_WAIT_S:
        return cuts[0]
    fitting = [cut for cut in cuts if cut is cuts[0] or cut.sequences_alive(sequences) <= max_sequences]
    best_s = min(predicted_s(cut, seen) for cut in fitting)
    return next(
        cut
        for cut in sorted(fitting, key=lambda cut: (cut.in_flight, cut.micro_batches))
        if predicted_s(cut, seen) <= GOOD_ENOUGH * best_s
    )
