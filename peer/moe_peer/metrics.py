"""What a trainer measures: records of steps, evaluations and faults, and the JSONL file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_net.trace import FaultEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One training step of one trainer."""

    step: int
    """0 is the first."""
    loss: float
    """Cross-entropy, nats per token."""
    tokens: int
    """Targets of the step."""
    step_s: float
    """Wall-clock time of the step."""
    text_bytes: int = 0
    """Bytes of text that the targets stand for; 0: as many as tokens (byte tokenizer)."""
    balance_loss: float = 0.0
    """Unweighted, mean over layers; 1 is even (Switch Transformers, eq. 4)."""
    z_loss: float = 0.0
    grad_norm: float = 0.0
    """Of the trunk, before clipping."""
    lr: float = 0.0
    bytes_sent: int = 0
    """Of calls to peers, on the wire."""
    bytes_received: int = 0
    calls: int = 0
    retries: int = 0
    """Of the calls, those that were not the first for their rows."""
    hedges: int = 0
    """Of the calls, those sent only because another replica was late."""
    hedges_won: int = 0
    failovers: int = 0
    """Shipments that another replica took over."""
    rows_sent: int = 0
    """Rows sent forward; each token's row goes once to each server that has any of its experts."""
    moved_pairs: int = 0
    """Pairs whose expert was chosen only because of the latency bias."""
    deadline_s: float = 0.0
    """The longest deadline that a call of the step was given."""
    routed_pairs: int = 0
    """(token, expert) pairs the router asked for."""
    dropped_pairs: int = 0
    """Of those, without an answer."""
    lost_gradient_pairs: int = 0
    """Ran forward, but the gradient could not be delivered."""
    overflowed_pairs: int = 0
    """Left out by the capacity factor."""
    live_experts: int = 0
    """Experts with a usable replica when the step ended."""
    total_experts: int = 0
    staleness_mean: float = 0.0
    """Updates an expert made between a call's forward and its backward."""
    staleness_max: int = 0
    """Of this step."""
    load_evenness: float = 1.0
    """As `load_evenness` gives it: 1 when all experts get the same share of the pairs."""
    in_flight: int = 1
    """Micro-batches at once."""
    at_s: float = 0.0
    """Unix time at its end."""
    wait_s: float = 0.0
    """Of `step_s`, when the trainer computed nothing, because every micro-batch in flight waited for its experts."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s if self.step_s > 0 else 0.0

    @property
    def nats_per_byte(self) -> float:
        """The loss on the scale of `EvalMetrics` and of the bigram model."""
        return self.loss * self.tokens / (self.text_bytes or self.tokens or 1)

    @property
    def rows_per_token(self) -> float:
        """Rows sent forward per token, all layers together."""
        return self.rows_sent / self.tokens if self.tokens else 0.0

    @property
    def wire_bytes_per_token(self) -> float:
        return (self.bytes_sent + self.bytes_received) / self.tokens if self.tokens else 0.0

    @property
    def unanswered_pairs(self) -> int:
        """In forward or, later, in backward: either way their experts learn nothing from them."""
        return self.dropped_pairs + self.lost_gradient_pairs

    @property
    def dropped_fraction(self) -> float:
        return self.unanswered_pairs / self.routed_pairs if self.routed_pairs else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalMetrics:
    """The loss on held-out text."""

    step: int
    """Steps made before it; 0 is the untrained model."""
    val_nats_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A fault (or another thing worth a mark in the curve), as in `moe_net.trace.FaultEvent`, with step and time."""

    step: int
    """During which it happened."""
    what: str
    at_s: float = 0.0
    """Unix time."""
    peer: str = ""
    layer: int = -1
    action: str = ""
    cost_s: float = 0.0
    pairs: int = 0
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        """A hedge is none: it is how a late answer costs nothing."""
        return self.action not in ("hedge_won", "hedge_lost")

    @classmethod
    def of(cls, fault: FaultEvent, *, step: int, at_s: float) -> Event:
        return cls(
            step=step, what=fault.what, at_s=at_s, peer=fault.peer, layer=fault.layer, action=fault.action,
            cost_s=fault.cost_s, pairs=fault.pairs, detail=fault.detail,
        )  # fmt: skip

    def __str__(self) -> str:
        """In words, as in `peer_gone 3f2a91c0 layer 2 -> masked, 0.8 s: connection refused`."""
        text = self.what
        if self.peer:
            text += f" {self.peer[:8]}"
        if self.layer >= 0:
            text += f" layer {self.layer}"
        if self.action:
            text += f" -> {self.action}"
        if self.cost_s > 0:
            text += f", {self.cost_s:.2g} s"
        return f"{text}: {self.detail}" if self.detail else text


Record = StepMetrics | EvalMetrics | Event
_KINDS: dict[str, type[Record]] = {"step": StepMetrics, "eval": EvalMetrics, "fault": Event}
_JSON_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float, type(None)), "str": (str,)}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def load_evenness(load_LE: Iterable[Sequence[float]]) -> float:
    """Entropy of each layer's load over log E, mean over layers: 1 is even, 0 when one expert takes all."""
    values: list[float] = []
    for load_E in load_LE:
        total = sum(load_E)
        if total > 0 and len(load_E) > 1:
            shares = [load / total for load in load_E if load > 0]
            values.append(-sum(share * math.log(share) for share in shares) / math.log(len(load_E)))
    return sum(values) / len(values) if values else 1.0


def to_line(record: Record) -> str:
    """One line of JSON, `event` first; a number that is not finite becomes null (JSON has no nan)."""
    values: dict[str, Any] = {"event": _NAMES[type(record)]}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        values[field.name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps(values, allow_nan=False)


def from_line(line: str) -> Record:
    """The inverse of `to_line` (null is nan); ValueError when it is no record."""
    values = json.loads(line)
    kind = _KINDS.get(values.get("event", "")) if isinstance(values, dict) else None
    if kind is None:
        raise ValueError("not a record of metrics")
    arguments: dict[str, Any] = {}
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    for name, value in values.items():
        if name == "event":
            continue
        if not isinstance(value, _JSON_TYPES.get(types.get(name, ""), ())) or isinstance(value, bool):
            raise ValueError(f"{name}: unexpected {'value' if name in types else 'keyword'}")
        arguments[name] = math.nan if value is None else value
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(str(error)) from error


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics file in order. A last line that a crash cut short counts as not written.

    ValueError names the line that is damaged.
    """
    records: list[Record] = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            records.append(from_line(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return records


def before(records: Iterable[Record], step: int) -> list[Record]:
    """What is known when `step` is the next step to make."""
    return [r for r in records if (r.step <= step if isinstance(r, EvalMetrics) else r.step < step)]


WAITING_LIMIT_BYTES = 2**24
"""Memory for records that a full disk does not take: those of some 20,000 steps."""


class MetricsLog:
    """A JSONL file of records; each is on disk (as far as the system cares) when `write` returns. Any thread writes.

    What a full disk does not take waits in memory, and is written as soon as there is room again.

    A resumed trainer gives the step it goes on with: what the file says of that step and later ones is taken out
    first, for these steps are made once more.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        """`resume_step` 0 begins a new file, and renames what is there to `replaced-` and its name, as is done with
        checkpoints. ValueError when the old one is damaged."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step == 0 and path.exists() and path.stat().st_size > 0:
            os.replace(path, path.with_name(f"replaced-{path.name}"))
        kept = before(read_metrics(path), resume_step) if resume_step > 0 and path.exists() else []
        # Beside it and renamed: a crash here leaves the old file or the new one, never half of one.
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text("".join(f"{to_line(record)}\n" for record in kept), encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:  # a full disk, which the system's own message does not locate
            partial.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error
        self.kept: tuple[Record, ...] = tuple(kept)
        """What a resumed run had measured before."""
        self._last_eval = max((r.step for r in kept if isinstance(r, EvalMetrics)), default=-1)
        self._lock = threading.Lock()
        self._file = path.open("ab", buffering=0)
        self._waiting = bytearray()
        self._failed = False
        self._left_out = 0

    def write(self, record: Record) -> FaultEvent | None:
        """Append it; an evaluation that stands there already (made again after a resume) is left out. An event, once,
        when it cannot be written, and once it can be again."""
        with self._lock:
            if isinstance(record, EvalMetrics):
                if record.step <= self._last_eval:
                    return None
                self._last_eval = record.step
            line = f"{to_line(record)}\n".encode()
            if len(self._waiting) + len(line) <= WAITING_LIMIT_BYTES:
                self._waiting += line
            else:
                self._left_out += 1
            return self._flush()

    def _flush(self) -> FaultEvent | None:
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if self._failed:
                return None
            self._failed = True
            detail = f"{self._file.name}: {error.strerror}; what is measured waits in memory until there is room"
            return FaultEvent(what="metrics_not_written", action="going_on", detail=detail)
        if not self._failed:
            return None
        self._failed = False
        lost, self._left_out = self._left_out, 0
        detail = f"{self._file.name} has room again" + (f"; {lost} records are not in it" if lost else "")
        return FaultEvent(what="metrics_written", action="going_on", detail=detail)

    def close(self) -> None:
        self._flush()
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
