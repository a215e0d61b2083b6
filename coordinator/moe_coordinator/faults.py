"""Faults on a timetable: the file that describes them, and what is due when. No process, no socket, no clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from moe_coordinator.shaping import Conditions

What = Literal[
    "kill", "term", "stop", "restart", "disconnect", "delay", "bandwidth", "cut", "blackhole", "half_open", "corrupt"
]  # fmt: skip
# Those that a proxy in front of a peer carries out.
_OF_A_PROXY: tuple[What, ...] = ("delay", "bandwidth", "cut", "blackhole", "half_open", "corrupt")
# What each kind needs, and what it may have besides; `target`, `what` and the time belong to all.
_NEEDS: dict[What, tuple[str, ...]] = {
    "bandwidth": ("mib_s",),
    "half_open": ("direction",),
    "corrupt": ("per_mib",),
}
_MAY: dict[What, tuple[str, ...]] = {
    "kill": (),
    "term": (),
    "restart": ("after_s",),
    "delay": ("duration_s", "round_trip_s", "jitter_s", "tail_probability", "tail_s"),
}
_DETAILS = (
    "duration_s", "after_s", "round_trip_s", "jitter_s", "tail_probability", "tail_s", "mib_s", "direction", "per_mib",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    target: str
    """Whom it befalls: `peer-2`, `coordinator` or `trainer-0`."""
    what: What
    """kill (SIGKILL), term (SIGTERM), stop (SIGSTOP), restart (SIGKILL, then a fresh process), disconnect (the whole
    network of a container), or on the way to a peer: delay, bandwidth, cut (connections reset, new ones refused),
    blackhole (connections stay, nothing passes), half_open (a blackhole in one direction), corrupt (bytes changed)."""
    at_step: int | None = None
    """When the first trainer has made this step."""
    at_s: float | None = None
    """Or so many seconds after its first step."""
    duration_s: float | None = None
    """How long it lasts; for good when absent. A cut of 0 s resets connections and refuses none."""
    after_s: float | None = None
    """restart: seconds from the kill to the new process; 0 when absent."""
    round_trip_s: float | None = None
    """delay: added to every round trip, half in each direction."""
    jitter_s: float | None = None
    """delay: mean of an exponential delay on top of a round trip, half of it in each direction."""
    tail_probability: float | None = None
    """delay: how often a round trip is late, besides; what is sent within 10 ms is late together."""
    tail_s: float | None = None
    """delay: by how much: Pareto distributed from here, 1.6 times this in the median, ten times at most."""
    mib_s: float | None = None
    """bandwidth: MiB/s in each direction, of all connections to the target together."""
    direction: Literal["up", "down"] | None = None
    """half_open: which way is silent; `up` is towards the target."""
    per_mib: float | None = None
    """corrupt: changed bytes per MiB, on average."""

    def __post_init__(self) -> None:
        if (self.at_step is None) == (self.at_s is None):
            raise ValueError("give at_step or at_s, and not both")
        if (self.at_step or 0) < 0 or (self.at_s or 0.0) < 0:
            raise ValueError("at_step and at_s must not be negative")
        needs = _NEEDS.get(self.what, ())
        may = _MAY.get(self.what, ("duration_s", *needs))
        for name in _DETAILS:
            value = getattr(self, name)
            if value is None and name in needs:
                raise ValueError(f"{self.what} needs {name}")
            if value is not None and name not in may:
                raise ValueError(f"{name} says nothing about {self.what}")
            if isinstance(value, float) and not 0 <= value < math.inf:  # false of a NaN
                raise ValueError(f"{name}={value} must be a number, and not negative")
        if self.what == "delay" and not any((self.round_trip_s, self.jitter_s, self.tail_s)):
            raise ValueError("delay needs round_trip_s, jitter_s or tail_s")
        if (self.tail_s is None) != (self.tail_probability is None):
            raise ValueError("tail_s and tail_probability go together")
        if self.on_network and not self.target.startswith("peer-"):
            raise ValueError(f"{self.what} needs a proxy, and only peers have one: {self.target} is none")
        if self.what == "restart" and self.target.startswith("trainer-"):
            raise ValueError(f"only peers and the coordinator are restarted: {self.target} would begin from nothing")
        if self.on_network:
            worsen((Conditions(), Conditions()), self)  # what cannot be is found now

    @property
    def on_network(self) -> bool:
        """It befalls the way to the target, and not its process."""
        return self.what in _OF_A_PROXY

    @property
    def lasts_s(self) -> float | None:
        """Seconds from its beginning to its end; None when it has none."""
        return (self.after_s or 0.0) if self.what == "restart" else self.duration_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The way to every peer, from the start to the end."""

    round_trip_s: float = 0.0
    """Half of it in each direction."""
    jitter_s: float = 0.0
    """Mean of an exponential delay on top of a round trip, half of it in each direction."""
    tail_probability: float = 0.0
    """How often a round trip is late, besides; what is sent within 10 ms is late together."""
    tail_s: float = 0.0
    """By how much: Pareto distributed from here, 1.6 times this in the median, ten times at most."""
    bandwidth_mib_s: float | None = None
    """MiB/s of each peer in each direction; no bound when absent."""

    def __post_init__(self) -> None:
        for name in ("round_trip_s", "jitter_s", "tail_s"):
            if not 0 <= getattr(self, name) < math.inf:  # false of a NaN
                raise ValueError(f"{name}={getattr(self, name)} must be a number, and not negative")
        if not 0 <= self.tail_probability <= 1:
            raise ValueError(f"tail_probability={self.tail_probability} is not in 0..1")
        self.conditions  # noqa: B018  what cannot be is found now

    @property
    def conditions(self) -> Conditions:
        """Of one direction."""
        return Conditions(
            delay_s=self.round_trip_s / 2,
            jitter_s=self.jitter_s / 2,
            tail_probability=self.tail_probability / 2,
            tail_s=self.tail_s,
            bandwidth_mib_s=self.bandwidth_mib_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """What `--faults FILE` says."""

    seed: int = 0
    """Of jitter, tails and damage."""
    network: Network = field(default_factory=Network)
    """The way to every peer."""
    fault: tuple[Fault, ...] = ()
    """What happens, as [[fault]] tables in any order."""

    def check(self, *, peers: int, trainers: int, steps: int) -> None:
        """ValueError names the first fault that such a run could not have."""
        members = {
            "coordinator", *(f"peer-{i}" for i in range(peers)), *(f"trainer-{i}" for i in range(trainers)),
        }  # fmt: skip
        for number, fault in enumerate(self.fault):
            if fault.target not in members:
                raise ValueError(f"fault.{number}.target: the run has no {fault.target}")
            if fault.at_step is not None and fault.at_step >= steps:
                raise ValueError(f"fault.{number}.at_step={fault.at_step} is not one of the steps 0..{steps - 1}")

    def needs_proxy(self, peer: str) -> bool:
        """Whether anything ever happens on the way to this peer."""
        return self.network != Network() or any(fault.on_network and fault.target == peer for fault in self.fault)

    def conditions(self, peer: str, active: Iterable[Fault]) -> tuple[Conditions, Conditions]:
        """Of the ways to and from this peer while these faults last, those of other targets among them."""
        both = (self.network.conditions, self.network.conditions)
        for fault in active:
            if fault.on_network and fault.target == peer:
                both = worsen(both, fault)
        return both


def is_cut(peer: str, active: Iterable[Fault]) -> bool:
    """Whether the way to this peer is cut while these faults last: one cut may end before another does."""
    return any(fault.what == "cut" and fault.target == peer for fault in active)


def worsen(both: tuple[Conditions, Conditions], fault: Fault) -> tuple[Conditions, Conditions]:
    """The conditions (up, down) with this fault on top: delays and damage add up, the least bandwidth counts."""

    def one(direction: str, old: Conditions) -> Conditions:
        match fault.what:
            case "delay":
                # Two tails at once: the worse one, with the probability of either.
                return replace(
                    old,
                    delay_s=old.delay_s + (fault.round_trip_s or 0.0) / 2,
                    jitter_s=old.jitter_s + (fault.jitter_s or 0.0) / 2,
                    tail_probability=min(1.0, old.tail_probability + (fault.tail_probability or 0.0) / 2),
                    tail_s=max(old.tail_s, fault.tail_s or 0.0),
                )
            case "bandwidth":
                assert fault.mib_s is not None
                return replace(old, bandwidth_mib_s=min(fault.mib_s, old.bandwidth_mib_s or fault.mib_s))
            case "corrupt":
                return replace(old, corrupt_per_mib=old.corrupt_per_mib + (fault.per_mib or 0.0))
            case "blackhole":
                return replace(old, silent=True)
            case "half_open":
                return replace(old, silent=old.silent or direction == fault.direction)
            case _:
                return old

    return one("up", both[0]), one("down", both[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """Something to do now."""

    fault: Fault
    """Which fault it is about."""
    phase: Literal["began", "ended"]
    """Whether it begins or ends."""


def describe(action: Action, *, hosts: str = "") -> str:
    """What happens, for people: `killed peer-2 (SIGKILL), which hosts *.2`."""
    fault, began = action.fault, action.phase == "began"
    lost = f", which hosts {hosts}" if hosts else ""
    match fault.what:
        case "kill":
            return f"killed {fault.target} (SIGKILL){lost}"
        case "term":
            return f"asked {fault.target} to leave (SIGTERM){lost}"
        case "stop":
            return f"suspended {fault.target} (SIGSTOP){_for(fault)}" if began else f"woke {fault.target} (SIGCONT)"
        case "restart":
            return f"killed {fault.target} (SIGKILL){lost}" if began else f"starting {fault.target} anew"
        case "disconnect":
            return f"disconnected {fault.target}{_for(fault)}" if began else f"connected {fault.target} again"
        case _:
            return f"{_network(fault)}{_for(fault)}" if began else f"{fault.what} of {fault.target} is over"


def _network(fault: Fault) -> str:
    match fault.what:
        case "delay":
            parts = {
                "round_trip_s": fault.round_trip_s,
                "jitter_s": fault.jitter_s,
                "tail_probability": fault.tail_probability,
                "tail_s": fault.tail_s,
            }
            text = ", ".join(f"{name} {value:g}" for name, value in parts.items() if value is not None)
            return f"delayed {fault.target} ({text})"
        case "bandwidth":
            return f"limited {fault.target} to {fault.mib_s:g} MiB/s"
        case "cut":
            return f"cut {fault.target} off"
        case "half_open":
            return f"silenced the way {'to' if fault.direction == 'up' else 'from'} {fault.target}"
        case "corrupt":
            return f"damaging {fault.per_mib:g} bytes per MiB of {fault.target}"
        case _:
            return f"blackhole in front of {fault.target}"


def _for(fault: Fault) -> str:
    return "" if fault.duration_s is None else f" for {fault.duration_s:g} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timetable:
    """What is still to come. Made by `timetable`; `advance` makes the next one."""

    waiting: tuple[Fault, ...] = ()
    """Not begun."""
    lasting: tuple[tuple[float | None, Fault], ...] = ()
    """(end in seconds of `advance`'s clock, fault): begun, in that order; without an end, they last for good."""
    began_s: float | None = None
    """When the first step was seen."""

    @property
    def active(self) -> tuple[Fault, ...]:
        """Begun and not ended, in the order of their beginnings."""
        return tuple(fault for _, fault in self.lasting)

    @property
    def next_s(self) -> float | None:
        """When something is due that no step brings about; None while there is no such thing."""
        times = [ends_s for ends_s, _ in self.lasting if ends_s is not None]
        if self.began_s is not None:
            times += [self.began_s + fault.at_s for fault in self.waiting if fault.at_s is not None]
        return min(times, default=None)


def timetable(faults: Sequence[Fault]) -> Timetable:
    """Before the first step."""
    return Timetable(waiting=tuple(faults))


def advance(state: Timetable, *, now_s: float, step: int | None = None) -> tuple[Timetable, list[Action]]:
    """What is due at `now_s` (any clock that only goes forward), `step` being what the first trainer has just made.

    Ends come before beginnings, so that of two faults in a row the second one stays; a fault of no duration begins and
    ends in the same call.
    """
    began_s = now_s if state.began_s is None and step is not None else state.began_s

    def due(fault: Fault) -> bool:
        if fault.at_step is not None:
            return step is not None and step >= fault.at_step
        return began_s is not None and fault.at_s is not None and now_s >= began_s + fault.at_s

    def over(ends_s: float | None) -> bool:
        return ends_s is not None and ends_s <= now_s

    ended = [fault for ends_s, fault in state.lasting if over(ends_s)]
    begun = [(None if f.lasts_s is None else now_s + f.lasts_s, f) for f in state.waiting if due(f)]
    actions = [Action(fault=fault, phase="ended") for fault in ended]
    actions += [Action(fault=fault, phase="began") for _, fault in begun]
    actions += [Action(fault=fault, phase="ended") for ends_s, fault in begun if over(ends_s)]
    after = Timetable(
        waiting=tuple(fault for fault in state.waiting if not due(fault)),
        lasting=tuple((ends_s, fault) for ends_s, fault in (*state.lasting, *begun) if not over(ends_s)),
        began_s=began_s,
    )
    return after, actions
