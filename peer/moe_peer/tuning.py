"""The first steps of a trainer, measured, until the cut of its steps is chosen."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch import Tensor

from moe_net.machine import available_memory_bytes
from moe_peer.cut import Cut, choose_in_flight, measured
from moe_peer.memory import noting_saved

log = logging.getLogger(__name__)

# The first step opens connections and fills caches: it is not typical, and not counted.
WARM_UP_STEPS = 1
STEPS = 3


class Tuning:
    """What was measured so far, one micro-batch at a time."""

    def __init__(self, choices: Sequence[Cut]) -> None:
        self._choices = choices
        self._compute_s: list[float] = []
        self._waits_s: list[float] = []
        self._seen = 0
        self._sequence_bytes = 0.0

    @property
    def is_complete(self) -> bool:
        return self._seen == WARM_UP_STEPS + STEPS

    @contextmanager
    def noting_graph(self, parameters: Sequence[Tensor], sequences: int) -> Generator[None]:
        """Around the forward pass of a micro-batch of so many sequences, for the memory of its graph."""
        with noting_saved(but=parameters) as saved:
            yield
        self._sequence_bytes = max(self._sequence_bytes, saved.n_bytes / sequences)

    def note(self, compute_s: float, waits_s: Sequence[float]) -> None:
        """One step: the trainer's own work, and each wait for the network."""
        self._seen += 1
        if self._seen > WARM_UP_STEPS:
            self._compute_s.append(compute_s)
            self._waits_s.extend(waits_s)

    def choose(self, sequences: int, *, trips: int) -> Cut:
        """For steps of so many sequences; `trips`: waits of a micro-batch."""
        seen = measured(self._compute_s, self._waits_s, trips=trips)
        room = available_memory_bytes() / 2 / max(1.0, self._sequence_bytes)
        cut = choose_in_flight(self._choices, seen, sequences=sequences, max_sequences=room)
        log.info(
            "%d micro-batches, %d in flight: a step computes %.3f s, a micro-batch waits %.3f s for the network",
            cut.micro_batches, cut.in_flight, seen.compute_s, seen.wait_s,
        )  # fmt: skip
        return cut
