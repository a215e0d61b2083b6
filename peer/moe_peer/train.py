"""`moe-peer train`: the process around a Trainer: joining, data, checkpoints, display, report."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from moe_net.checkpoint_folder import checkpoints_of
from moe_net.client import Membership, join_run
from moe_net.config import RunConfig
from moe_net.data.batches import Batches, BatchId, IdsBatch, eval_batches
from moe_net.data.corpus import Corpus, join, load_corpus
from moe_net.data.ngram import BigramModel
from moe_net.data.tokenizer import BpeTokenizer, ByteTokenizer, Ids, Tokenizer, load_tokenizer
from moe_net.errors import CheckpointError, NoLiveExpertsError, TooManyDropsError
from moe_net.folder import alone_in
from moe_net.model.generate import generate
from moe_net.rpc.policy import CallPolicy, DropWindow
from moe_net.rpc.swarm import SwarmStats
from moe_net.trace import FaultEvent
from moe_net.wire.allocator import tune_allocator
from moe_peer.checkpoint import (
    CheckpointMeta,
    completed,
    save_checkpoint,
    saved_versions,
    set_aside_later,
)
from moe_peer.config import TrainConfig
from moe_peer.display import TrainDisplay
from moe_peer.metrics import EvalMetrics, Event, MetricsLog, Record, StepMetrics, load_evenness, to_line
from moe_peer.report import write_report
from moe_peer.resume import compare_experts, live_versions, resume_trunk
from moe_peer.trainer import StepResult, Trainer, build_model

log = logging.getLogger(__name__)
EVAL_SEQUENCES = 16
# Between two looks for experts that are missing: a first suspension lasts 1 s.
POLL_S = 0.2

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """The corpus as the trainer uses it."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: Ids
    held_out: Ids
    bigram_nats_per_byte: float


def load_text(config: TrainConfig, run: RunConfig, tokenizer_file: Path) -> Text:
    """Corpus and tokenizer; a BPE is trained on the training split and kept in `tokenizer_file` for a resume."""
    corpus = load_corpus(config.data, max_bytes=config.max_data_mib * 2**20)
    train, held_out = join(corpus.train), join(corpus.held_out)
    tokenizer: Tokenizer
    if run.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    elif config.resume is not None and tokenizer_file.exists():
        tokenizer = load_tokenizer(tokenizer_file)
    else:
        texts = (document.text for document in corpus.train)
        tokenizer = BpeTokenizer.train(texts, vocab_size=run.model.vocab_size)
        tokenizer_file.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(tokenizer_file)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size is {run.model.vocab_size}")
    held_out_ids = tokenizer.encode(held_out)
    return Text(
        corpus=corpus,
        tokenizer=tokenizer,
        train=tokenizer.encode(train),
        held_out=held_out_ids,
        bigram_nats_per_byte=_bigram(train, held_out, held_out_ids, run, config),
    )


def _bigram(train: bytes, held_out: bytes, held_out_ids: Ids, run: RunConfig, config: TrainConfig) -> float:
    """Loss of a bigram model of bytes, on the very windows of the evaluation where those are of bytes."""
    bigram = BigramModel.fit(train)
    if run.tokenizer != "bytes":
        return bigram.nats_per_byte(held_out)
    windows = np.concatenate(list(evaluation(held_out_ids, run, config)))
    return float(bigram.pair_nats(windows[:, :-1], windows[:, 1:]).mean())


def evaluation(held_out: Ids, run: RunConfig, config: TrainConfig) -> Iterator[IdsBatch]:
    """The held-out windows that every evaluation uses."""
    return eval_batches(held_out, config.eval_batches, seq_len=run.model.seq_len, sequences=EVAL_SEQUENCES)


class _Stop:
    """SIGINT and SIGTERM: finish the step at hand; a second one, or one outside the steps, interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self.in_steps = False

    def __call__(self, number: int, frame: object) -> None:
        if self.asked or not self.in_steps:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def installed(self) -> Generator[_Stop]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


@dataclass(slots=True, kw_only=True)
class _Session:
    """One run of the command, once everything is there."""

    config: TrainConfig
    run: RunConfig
    text: Text
    member: Membership
    trainer: Trainer
    metrics: MetricsLog
    display: TrainDisplay
    stop: _Stop
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
        self.metrics.write(record)
        self.display.show(record)
        if not isinstance(record, Event):
            say(to_line(record))

    def note_faults(self, step: int | None = None) -> None:
        """Note what went wrong since the last time, as of `step` (None: the one to make next)."""
        while self.faults:
            fault = self.faults.pop(0)
            self.note(Event.of(fault, step=self.trainer.step if step is None else step, at_s=time.time()))

    def evaluate(self) -> EvalMetrics:
        """Held-out loss in nats per byte, on the same windows every time."""
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
        result = self._with_experts(self.trainer.train_step)
        metrics = self._measure(result, time.monotonic() - started_s, before)
        self.note(metrics)
        stale = stale_gradient(metrics, self.config.max_staleness)
        if stale is not None:
            self.faults.append(stale)
        self.note_faults(metrics.step)
        self.drops = self.drops.after(metrics.routed_pairs, metrics.unanswered_pairs)
        if self.drops.exceeded:
            raise TooManyDropsError(
                f"{self.drops.fraction:.0%} of the (token, expert) pairs of the last {self.drops.length} steps got no "
                f"answer in forward or backward (max_dropped_fraction={self.drops.max_fraction:.0%}); "
                f"{metrics.live_experts} of {metrics.total_experts} experts are live"
            )

    def _with_experts(self, work: Callable[[], ResultT]) -> ResultT:
        """`work`, once every layer has experts enough; waits `wait_s` for them, for peers come back, or others come.

        NoLiveExpertsError after that, or when asked to stop. `work` may raise it too, having changed nothing.
        """
        deadline_s = time.monotonic() + self.config.wait_s
        waiting = False
        while True:
            try:
                self._require_experts()
                return work()
            except NoLiveExpertsError as error:
                if self.stop.asked or time.monotonic() > deadline_s:
                    raise
                if not waiting:
                    self.faults.append(FaultEvent(what="no_live_experts", action="waiting", detail=str(error)))
                waiting = True
                self.note_faults()
                self.member.link.runner.run(asyncio.sleep(POLL_S))

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
        """Save everything; experts that nobody answers for are carried over from the checkpoint before."""
        experts = self.member.link.runner.run(
            self.member.link.swarm.fetch_experts(self.run.model.expert_ids, timeout_s=self.config.fetch_timeout_s)
        )
        experts, faults = completed(experts, self.run, self.last_checkpoint)
        self.faults += faults
        meta = _meta(self.config, self.text, self.trainer)
        self.last_checkpoint = save_checkpoint(
            checkpoints_of(self.config.out), meta, self.trainer.model, self.trainer.optimizer, experts
        )
        self.saved_step = meta.step
        return self.last_checkpoint

    def checkpoint_on_the_way(self) -> None:
        """As `checkpoint`; a disk that is full is no reason to stop learning."""
        try:
            self.checkpoint()
        except CheckpointError as error:
            self.faults.append(FaultEvent(what="checkpoint_failed", action="going_on", detail=str(error)))
            self.note_faults()

    def keep(self) -> None:
        """At an end before its time: what was learned since the last checkpoint, and the report."""
        if self.trainer.step > self.saved_step:
            self.checkpoint_on_the_way()
            self.report()

    def report(self) -> None:
        """Files and tables of the whole training."""
        report = write_report(
            self.records, self.config.out, title=self.run.name, bigram_nats_per_byte=self.text.bigram_nats_per_byte
        )
        print(report.summary, file=sys.stderr)

    def sample(self) -> str:
        """The model's own writing, from a fixed beginning and a fixed seed."""
        prompt = torch.from_numpy(self.text.tokenizer.encode("def ").astype(np.int64))[None]
        tokens_BS = generate(
            self.trainer.model,
            prompt,
            new_tokens=self.config.sample_tokens,
            temperature=0.8,
            generator=torch.Generator().manual_seed(self.run.seed),
        )
        return self.text.tokenizer.decode(tokens_BS[0].tolist())


def say(line: str) -> None:
    """One JSON line for machines, on stdout; not on a terminal, where the display for people is."""
    if not sys.stdout.isatty():
        print(line, flush=True)


def run_train(config: TrainConfig) -> int:
    """Train until `config.steps` steps are made, or until asked to stop; exit code."""
    tune_allocator()
    if config.threads:
        torch.set_num_threads(config.threads)
    faults: list[FaultEvent] = []
    with _Stop().installed() as stop, ExitStack() as stack:
        try:
            stack.enter_context(alone_in(config.out))
            member = stack.enter_context(
                join_run(
                    config.join, name=config.run, trainer=f"trainer-{config.trainer_index}", policy=_policy(config),
                    on_event=faults.append, wait_s=config.wait_s, spread=config.spread_replicas,
                )
            )  # fmt: skip
            session = _open(config, member, stack, stop, faults)
            say(json.dumps({"event": "ready", "role": "trainer", "run": member.run.name, "step": session.trainer.step}))
            _train(session)
        except KeyboardInterrupt:
            return 130
    return 0


def _policy(config: TrainConfig) -> CallPolicy:
    timeout_s = config.call_timeout_s
    return CallPolicy(
        forward_timeout_s=timeout_s, backward_timeout_s=timeout_s, commit_timeout_s=timeout_s,
        min_timeout_s=min(timeout_s, CallPolicy().min_timeout_s), hedge_fraction=config.hedge_fraction,
    )  # fmt: skip


def _open(config: TrainConfig, member: Membership, stack: ExitStack, stop: _Stop, faults: list[FaultEvent]) -> _Session:
    run = member.run
    step_tokens = config.sequences * run.model.seq_len
    if step_tokens > run.global_batch_tokens:
        raise ValueError(
            f"sequences={config.sequences} make a step of {step_tokens} tokens, more than the run's "
            f"global_batch_tokens={run.global_batch_tokens}: no peer would take its commits. Give fewer sequences"
        )
    text = load_text(config, run, config.out / "tokenizer.json")
    batches = Batches(
        text.train,
        seq_len=run.model.seq_len,
        sequences_per_micro=config.sequences,
        n_trainers=config.trainers,
        seed=run.seed,
    )
    first = config.cuts[0]
    trainer = Trainer(
        run=run, model=build_model(run, member.link), link=member.link, batches=batches, index=config.trainer_index,
        n_micro=first.micro_batches, in_flight=first.in_flight, choices=config.cuts,
    )  # fmt: skip
    stack.enter_context(trainer)
    resumed = None if config.resume is None else _resume(config, config.resume, text, trainer, member, faults)
    set_aside_later(checkpoints_of(config.out), trainer.step)
    metrics = stack.enter_context(MetricsLog(config.out / "metrics.jsonl", resume_step=trainer.step))
    display = stack.enter_context(
        TrainDisplay(
            f"{run.name}: trainer {config.trainer_index}",
            total_steps=config.steps,
            bigram_nats_per_byte=text.bigram_nats_per_byte,
        )
    )
    return _Session(
        config=config, run=run, text=text, member=member, trainer=trainer, metrics=metrics, display=display,
        stop=stop, faults=faults, records=list(metrics.kept),
        drops=DropWindow(max_fraction=config.max_dropped_fraction, length=config.drop_window_steps),
        last_checkpoint=resumed, saved_step=trainer.step,
    )  # fmt: skip


def _resume(
    config: TrainConfig, folder: Path, text: Text, trainer: Trainer, member: Membership, faults: list[FaultEvent]
) -> Path:
    """Go on from the newest checkpoint in `folder`; its path."""
    path = resume_trunk(folder, trainer, _meta(config, text, trainer))
    live = member.link.runner.run(live_versions(member.directory.view, member.transport))
    event = compare_experts(path, saved_versions(path), live, allow_fresh=config.allow_fresh_experts)
    if event is not None:
        faults.append(event)
    return path


def stale_gradient(metrics: StepMetrics, max_staleness: int) -> FaultEvent | None:
    """The event of a step with a gradient older than `max_staleness` updates of its expert (0: any age will do)."""
    if not max_staleness or metrics.staleness_max <= max_staleness:
        return None
    detail = (
        f"an expert made {metrics.staleness_max} updates between a call's forward and its backward, more than "
        f"max_staleness={max_staleness}: its gradient counted nevertheless"
    )
    return FaultEvent(what="stale_gradient", action="counted", detail=detail)


def _meta(config: TrainConfig, text: Text, trainer: Trainer) -> CheckpointMeta:
    return CheckpointMeta(
        run=trainer.run,
        step=trainer.step,
        data_fingerprint=text.corpus.fingerprint,
        tokenizer_fingerprint=text.tokenizer.fingerprint,
        trainers=config.trainers,
        sequences=config.sequences,
    )


def _train(session: _Session) -> None:
    config, trainer, stop = session.config, session.trainer, session.stop
    started_s, first_step = time.monotonic(), trainer.step
    stop.in_steps = True
    try:
        if trainer.step == 0:
            session.evaluate()
        while trainer.step < config.steps and not stop.asked:
            session.step()
            if trainer.step % config.eval_every == 0 and trainer.step < config.steps:
                session.evaluate()
            if config.checkpoint_every and trainer.step % config.checkpoint_every == 0 and trainer.step < config.steps:
                session.checkpoint_on_the_way()
        train_s = time.monotonic() - started_s
        final = session.evaluate()
        checkpoint = session.checkpoint()
    except (NoLiveExpertsError, TooManyDropsError):  # the trunk is here, and has learned
        session.note_faults()
        session.keep()
        raise
    finally:
        session.note_faults()  # above all when they end the training
    stop.in_steps = False
    sample = session.sample()
    session.report()
    tokens = (trainer.step - first_step) * config.sequences * session.run.model.seq_len
    done = {
        "event": "done",
        "steps": trainer.step,
        "val_nats_per_byte": final.val_nats_per_byte,
        "bigram_nats_per_byte": session.text.bigram_nats_per_byte,
        "tokens_per_s": tokens / train_s if train_s > 0 else 0.0,
        "checkpoint": str(checkpoint),
        "sample": sample,
    }
    say(json.dumps(done))
