"""What a bad network does to a stream of bytes, as arithmetic: no clock, no socket. `proxy.py` does what it says."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

MIB = 2**20
# The most that is read at once.
READ_BYTES = 256 << 10
# Bytes on their way in one direction of one connection. Where the bandwidth is bounded: this much above
# bandwidth x delay. Where it is not, that product has no bound, and 16 MiB are 80 MiB/s at 200 ms.
QUEUE_BYTES = 1 << 20
WINDOW_BYTES = 16 << 20
# Queues on the internet change in milliseconds, not from one read to the next: without this, a message would get the
# worst draw of as many as its bytes happen to be read in.
JITTER_HOLD_S = 0.01
# Of the Pareto tail: infinite variance, finite mean (3 x tail_s), as Internet delays are usually fitted. The cap keeps
# one unlucky draw from being a blackhole.
PARETO_SHAPE = 1.5
TAIL_CAP = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What one direction does to bytes; the defaults are a perfect line."""

    delay_s: float = 0.0
    """One way: half of a round trip."""
    jitter_s: float = 0.0
    """Mean of an exponential delay on top."""
    tail_probability: float = 0.0
    """Of a heavy-tailed delay on top of both, for whatever is sent within 10 ms."""
    tail_s: float = 0.0
    """That delay is Pareto distributed (shape 1.5): at least this, 1.6 times this in the median, ten times at most."""
    bandwidth_mib_s: float | None = None
    """Of all connections together; no bound when absent."""
    corrupt_per_mib: float = 0.0
    """Bytes changed per MiB, on average."""
    silent: bool = False
    """Nothing passes, neither bytes nor the end of a connection. What was sent waits until this is over."""

    def __post_init__(self) -> None:
        numbers = (self.delay_s, self.jitter_s, self.tail_s, self.corrupt_per_mib)
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError(f"delays and rates must be finite and not negative: {self}")
        if not 0 <= self.tail_probability <= 1:
            raise ValueError(f"tail_probability={self.tail_probability} is not in 0..1")
        if self.bandwidth_mib_s is not None and not self.bandwidth_mib_s > 0:
            raise ValueError(f"bandwidth_mib_s={self.bandwidth_mib_s} must be positive")


PERFECT = Conditions()


class Line:
    """One direction of the path to one server, shared by its connections: their bytes leave one after another."""

    def __init__(self, conditions: Conditions = PERFECT) -> None:
        self.free_at_s = -math.inf
        """When the last byte given to it so far has left."""
        self.conditions = conditions

    @property
    def conditions(self) -> Conditions:
        return self._conditions

    @conditions.setter
    def conditions(self, conditions: Conditions) -> None:
        self._conditions = conditions
        self.perfect = conditions == PERFECT
        self.silent = conditions.silent
        if conditions.bandwidth_mib_s is None:
            self.window_bytes = READ_BYTES if self.perfect else WINDOW_BYTES
        else:
            in_flight_s = conditions.delay_s + conditions.jitter_s
            self.window_bytes = int(conditions.bandwidth_mib_s * MIB * in_flight_s) + QUEUE_BYTES

    def sent_s(self, now_s: float, n_bytes: int) -> float:
        """When the last of `n_bytes` that arrive at `now_s` has left."""
        if self._conditions.bandwidth_mib_s is None:
            return now_s
        self.free_at_s = max(now_s, self.free_at_s) + n_bytes / (self._conditions.bandwidth_mib_s * MIB)
        return self.free_at_s


class Schedule:
    """When the bytes of one connection arrive, and which of them are damaged, in one direction.

    A pure function of the seed, the line's conditions and the calls so far. Damage is one of the seed and of the
    positions in the stream alone, however the stream is cut.
    """

    def __init__(self, line: Line, seed: str) -> None:
        self._line = line
        self._delays = random.Random(f"{seed}/delay")
        self._flips = random.Random(f"{seed}/flip")
        self._due_s = -math.inf
        self._held: tuple[float, Conditions, float] = (-math.inf, PERFECT, 0.0)
        self._rate = 0.0
        self._flip_in_bytes = math.inf

    def due_s(self, now_s: float, n_bytes: int) -> float:
        """When `n_bytes` that were sent at `now_s` arrive: never before those sent earlier."""
        sent_s = self._line.sent_s(now_s, n_bytes)
        self._due_s = max(self._due_s, sent_s + self._line.conditions.delay_s + self._extra_s(now_s))
        return self._due_s

    def _extra_s(self, now_s: float) -> float:
        conditions = self._line.conditions
        if not conditions.jitter_s and not conditions.tail_probability:
            return 0.0
        drawn_at_s, drawn_for, extra_s = self._held
        if conditions is drawn_for and now_s < drawn_at_s + JITTER_HOLD_S:
            return extra_s
        # Three numbers whatever the conditions: those that follow do not depend on these.
        jitter, tail, length = (self._delays.random() for _ in range(3))
        extra_s = -conditions.jitter_s * math.log(1.0 - jitter)
        if tail < conditions.tail_probability:
            extra_s += conditions.tail_s * min(TAIL_CAP, (1.0 - length) ** (-1.0 / PARETO_SHAPE))
        self._held = (now_s, conditions, extra_s)
        return extra_s

    def flips(self, n_bytes: int) -> list[tuple[int, int]]:
        """(position, mask to xor with) of the bytes to damage among the next `n_bytes`, ascending."""
        rate = self._line.conditions.corrupt_per_mib
        if rate != self._rate:
            # Exponential gaps have no memory: beginning anew changes no probability.
            self._rate = rate
            self._flip_in_bytes = self._gap_bytes()
        found: list[tuple[int, int]] = []
        while self._flip_in_bytes < n_bytes:
            found.append((int(self._flip_in_bytes), self._flips.randrange(1, 256)))
            self._flip_in_bytes = found[-1][0] + 1 + self._gap_bytes()
        self._flip_in_bytes -= n_bytes
        return found

    def _gap_bytes(self) -> float:
        """Undamaged bytes before the next damaged one."""
        return math.floor(self._flips.expovariate(self._rate / MIB)) if self._rate else math.inf
