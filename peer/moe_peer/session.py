"""One training, once everything is there: its steps measured, evaluations, checkpoints, and waiting for experts."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from moe_net.checkpoint_folder import checkpoints_of
from moe_net.client import Membership
from moe_net.config import RunConfig
from moe_net.data.batches import BatchId
from moe_net.data.tokenizer import ByteTokenizer
from moe_net.errors import CheckpointError, NoLiveExpertsError, TooManyDropsError
from moe_net.model.generate import generate
from moe_net.rpc.policy import DropWindow
from moe_net.rpc.swarm import SwarmStats
from moe_net.trace import FaultEvent
from moe_peer.checkpoint import CheckpointMeta, completed, remove_old, save_checkpoint
from moe_peer.config import TrainConfig
from moe_peer.display import TrainDisplay
from moe_peer.metrics import EvalMetrics, Event, MetricsLog, Record, StepMetrics, load_evenness, to_line
from moe_peer.report import write_report
from moe_peer.stopping import FETCH_S, Stop, Waits
from moe_peer.text import Text, evaluation
from moe_peer.trainer import StepResult, Trainer

# Between two looks for experts that are missing: what is suspended longer is asked again after 0.5 s.
POLL_S = 0.2

ResultT = TypeVar("ResultT")


@dataclass(slots=True, kw_only=True)
class Session:
    """See the module's text."""

    config: TrainConfig
    run: RunConfig
    text: Text
    member: Membership
    trainer: Trainer
    metrics: MetricsLog
    display: TrainDisplay
    stop: Stop
    waits: Waits
    """What a stop ends: the trainer's, and our own."""
    faults: list[FaultEvent]
    """What the swarm reported and `note_faults` has not noted yet."""
    records: list[Record]
    drops: DropWindow
    last_checkpoint: Path | None
    """The newest one of this training: that it was resumed from, then each that it made."""
    saved_step: int
    """Steps that are in it; 0 without one."""

    def note(self, record: Record) -> None:
        self.records.append(record)
        event = self.metrics.write(record)
        if event is not None:
            self.faults.append(event)
        self.display.show(record)
        if not isinstance(record, Event):
            say(to_line(record))

    def note_faults(self, step: int | None = None) -> None:
        """Note what went wrong since the last time, as of `step` (None: the one to make next)."""
        while self.faults:
            fault = self.faults.pop(0)
            self.note(Event.of(fault, step=self.trainer.step if step is None else step, at_s=time.time()))

    def evaluate(self) -> EvalMetrics:
        """Held-out loss in nats per byte, on the same windows every time. CancelledError when asked to stop."""
        batches = list(evaluation(self.text.held_out, self.run, self.config))
        nats, _ = self._with_experts(lambda: self.trainer.evaluate(batches))
        n_bytes = sum(self.text.tokenizer.bytes_of(row[1:]) for batch in batches for row in batch)
        result = EvalMetrics(step=self.trainer.step, val_nats_per_byte=nats / n_bytes)
        self.note(result)
        return result

    def step(self) -> None:
        # The largest of this step: a maximum has no difference.
        self.member.link.swarm.stats.staleness_max = 0
        self.member.link.swarm.outlook.longest_deadline_s = 0.0
        started_s, before = time.monotonic(), self._spent()
        result = self._with_experts(self._train_step)
        metrics = self._measure(result, time.monotonic() - started_s, before)
        self.note(metrics)
        stale = stale_gradient(metrics, self.config.max_staleness)
        if stale is not None:
            self.faults.append(stale)
        self.note_faults(metrics.step)
        self.drops = self.drops.after(metrics.routed_pairs, metrics.unanswered_pairs)
        if self.drops.exceeded and not self.stop.asked:
            raise TooManyDropsError(
                f"{self.drops.fraction:.0%} of the (token, expert) pairs of the last {self.drops.length} steps got no "
                f"answer in forward or backward (max_dropped_fraction={self.drops.max_fraction:.0%}); "
                f"{metrics.live_experts} of {metrics.total_experts} experts are live"
            )

    def _train_step(self) -> StepResult:
        with self.stop.at_a_step():
            return self.trainer.train_step()

    def _with_experts(self, work: Callable[[], ResultT]) -> ResultT:
        """`work`, once every layer has experts enough; waits `wait_s` for them, for peers come back, or others come.

        NoLiveExpertsError after that; `work` may raise it too, having changed nothing. CancelledError when asked to
        stop.
        """
        deadline_s = time.monotonic() + self.config.wait_s
        waiting = False
        while True:
            try:
                self._require_experts()
                return work()
            except NoLiveExpertsError as error:
                if time.monotonic() > deadline_s:
                    raise
                if not waiting:
                    self.faults.append(FaultEvent(what="no_live_experts", action="waiting", detail=str(error)))
                waiting = True
                self.note_faults()
                self.waits.run(asyncio.sleep(POLL_S))

    def _require_experts(self) -> None:
        model = self.run.model
        for layer in model.moe_layers:
            n_live = int(self.member.link.swarm.live(layer, model.n_experts).sum())
            if n_live < self.config.min_experts_per_token:
                raise NoLiveExpertsError(
                    f"layer {layer} has {n_live} live experts of {model.n_experts}, fewer than "
                    f"min_experts_per_token={self.config.min_experts_per_token}. Start a peer with --experts {layer}.*"
                )

    def _spent(self) -> tuple[SwarmStats, int, int]:
        """Counters of calls, bytes sent and bytes received: a step's figures are differences."""
        traffic = self.member.transport.traffic
        return replace(self.member.link.swarm.stats), traffic.sent_bytes, traffic.received_bytes

    def _measure(self, result: StepResult, step_s: float, before: tuple[SwarmStats, int, int]) -> StepMetrics:
        swarm = self.member.link.swarm
        (then, sent_before, received_before), (now, sent, received) = before, self._spent()
        model = self.run.model
        answers = now.staleness_count - then.staleness_count
        step = self.trainer.step - 1
        return StepMetrics(
            step=step,
            loss=result.loss,
            tokens=result.tokens,
            step_s=step_s,
            text_bytes=self._text_bytes(step),
            balance_loss=result.balance_loss,
            z_loss=result.z_loss,
            grad_norm=result.grad_norm,
            lr=self.run.optimizer.lr_at(step),
            bytes_sent=sent - sent_before,
            bytes_received=received - received_before,
            calls=now.calls - then.calls,
            retries=now.retries - then.retries,
            hedges=now.hedges - then.hedges,
            hedges_won=now.hedges_won - then.hedges_won,
            failovers=now.failovers - then.failovers,
            rows_sent=now.rows - then.rows,
            moved_pairs=result.moved_pairs,
            deadline_s=swarm.outlook.longest_deadline_s,
            routed_pairs=now.routed_pairs - then.routed_pairs,
            dropped_pairs=now.dropped_pairs - then.dropped_pairs,
            lost_gradient_pairs=now.lost_gradient_pairs - then.lost_gradient_pairs,
            overflowed_pairs=result.overflowed_pairs,
            live_experts=sum(int(swarm.live(layer, model.n_experts).sum()) for layer in model.moe_layers),
            total_experts=len(model.expert_ids),
            staleness_mean=(now.staleness_sum - then.staleness_sum) / answers if answers else 0.0,
            staleness_max=now.staleness_max,
            load_evenness=load_evenness(result.load_LE.tolist()),
            in_flight=result.in_flight,
            wait_s=result.wait_s,
            at_s=time.time(),
        )

    def _text_bytes(self, step: int) -> int:
        if isinstance(self.text.tokenizer, ByteTokenizer):
            return 0
        return sum(
            self.text.tokenizer.bytes_of(row[1:])
            for micro in range(self.trainer.batches.n_micro)
            for row in self.trainer.batches.batch(BatchId(step, self.config.trainer_index, micro))
        )

    def checkpoint(self) -> Path:
        """Save everything; experts that nobody answers for are carried over from the checkpoint before.

        CancelledError, with nothing saved, when asked to stop before they are here.
        """
        fetching = self.member.link.swarm.fetch_experts(
            self.run.model.expert_ids, timeout_s=self.config.fetch_timeout_s
        )
        return self._save(self.waits.run(fetching))

    def _checkpoint_at_stop(self) -> None:
        """Make a checkpoint as `checkpoint` does, of the experts that come at once: also from peers that are suspended,
        and perhaps stopping as we are."""
        print(f"stopping: saving step {self.trainer.step}, its experts within {FETCH_S:.0f} s", file=sys.stderr)
        fetching = self.member.link.swarm.fetch_experts(self.run.model.expert_ids, timeout_s=FETCH_S, suspended=True)
        self._save(self.member.link.runner.run(fetching))

    def _save(self, experts: dict[str, Tensor]) -> Path:
        experts, faults = completed(experts, self.run, self.last_checkpoint)
        self.faults += faults
        meta = checkpoint_meta(self.config, self.text, self.trainer)
        self.last_checkpoint = save_checkpoint(
            checkpoints_of(self.config.out), meta, self.trainer.model, self.trainer.optimizer, experts,
            tokenizer=self.text.tokenizer_file,
        )  # fmt: skip
        self.saved_step = meta.step
        try:
            remove_old(
                checkpoints_of(self.config.out), keep=self.config.keep_checkpoints,
                limit_bytes=self.config.keep_checkpoints_gib * 2**30,
            )  # fmt: skip
        except CheckpointError as error:
            self.faults.append(FaultEvent(what="checkpoint_kept", action="going_on", detail=str(error)))
        return self.last_checkpoint

    def checkpoint_on_the_way(self) -> None:
        """As `checkpoint`; a disk that is full is no reason to stop learning."""
        try:
            self.checkpoint()
        except CheckpointError as error:
            self._note_not_saved(error)

    def _note_not_saved(self, error: CheckpointError) -> None:
        self.faults.append(FaultEvent(what="checkpoint_failed", action="going_on", detail=str(error)))
        self.note_faults()

    def save_at_the_end(self) -> None:
        """The last checkpoint, if there is anything new, whether or not we are asked to stop, or are meanwhile."""
        with suppress(CancelledError):
            if not self.stop.asked:
                self.checkpoint()
        if self.trainer.step > self.saved_step:
            self._checkpoint_at_stop()

    def keep(self) -> None:
        """At an end before its time: what was learned since the last checkpoint, and the report."""
        if self.trainer.step > self.saved_step:
            try:
                self.save_at_the_end()
            except CheckpointError as error:
                self._note_not_saved(error)
            self.report()

    def report(self) -> None:
        """Files and tables of the whole training."""
        try:
            report = write_report(
                self.records, self.config.out, title=self.run.name, bigram_nats_per_byte=self.text.bigram_nats_per_byte
            )
        except OSError as error:  # a disk that is full: what was learned is saved, or was said not to be
            print(f"the report cannot be written: {error}", file=sys.stderr)
        else:
            print(report.summary, file=sys.stderr)

    def sample(self) -> str:
        """The model's own writing, from a fixed beginning and a fixed seed. CancelledError when asked to stop."""
        prompt = torch.from_numpy(self.text.tokenizer.encode("def ").astype(np.int64))[None]
        tokens_BS = generate(
            self.trainer.model,
            prompt,
            new_tokens=self.config.sample_tokens,
            temperature=0.8,
            generator=torch.Generator().manual_seed(self.run.seed),
        )
        return self.text.tokenizer.decode(tokens_BS[0].tolist())


def stale_gradient(metrics: StepMetrics, max_staleness: int) -> FaultEvent | None:
    """The event of a step with a gradient older than `max_staleness` updates of its expert (0: any age will do)."""
    if not max_staleness or metrics.staleness_max <= max_staleness:
        return None
    detail = (
        f"an expert made {metrics.staleness_max} updates between a call's forward and its backward, more than "
        f"max_staleness={max_staleness}: its gradient counted nevertheless"
    )
    return FaultEvent(what="stale_gradient", action="counted", detail=detail)


def checkpoint_meta(config: TrainConfig, text: Text, trainer: Trainer) -> CheckpointMeta:
    """What a checkpoint of `trainer` says of itself."""
    return CheckpointMeta(
        run=trainer.run,
        step=trainer.step,
        data_fingerprint=text.corpus.fingerprint,
        tokenizer_fingerprint=text.tokenizer.fingerprint,
        trainers=config.trainers,
        sequences=config.sequences,
    )


def say(line: str) -> None:
    """One JSON line for machines, on stdout; not on a terminal, where the display for people is."""
    if not sys.stdout.isatty():
        print(line, flush=True)
