"""`moe-peer train`: the process around a Trainer: joining, data, resuming, signals, and the course of the training."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moe_net.checkpoint_folder import checkpoints_of
from moe_net.client import Membership, join_run
from moe_net.data.batches import Batches
from moe_net.errors import NoLiveExpertsError, TooManyDropsError
from moe_net.folder import alone_in
from moe_net.rpc.policy import CallPolicy, DropWindow
from moe_net.trace import FaultEvent
from moe_net.wire.allocator import tune_allocator
from moe_peer.checkpoint import saved_versions, set_aside_later
from moe_peer.config import TrainConfig
from moe_peer.display import TrainDisplay
from moe_peer.metrics import MetricsLog
from moe_peer.resume import compare_experts, live_versions, resume_trunk
from moe_peer.session import Session, checkpoint_meta, say
from moe_peer.text import Text, load_text
from moe_peer.threads import use_threads
from moe_peer.trainer import Trainer, build_model


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


def run_train(config: TrainConfig) -> int:
    """Train until `config.steps` steps are made, or until asked to stop; exit code."""
    tune_allocator()
    use_threads(config.threads)
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
            _train(session, stop)
        except KeyboardInterrupt:
            return 130
    return 0


def _policy(config: TrainConfig) -> CallPolicy:
    timeout_s = config.call_timeout_s
    return CallPolicy(
        forward_timeout_s=timeout_s, backward_timeout_s=timeout_s, commit_timeout_s=timeout_s,
        min_timeout_s=min(timeout_s, CallPolicy().min_timeout_s), hedge_fraction=config.hedge_fraction,
    )  # fmt: skip


def _open(config: TrainConfig, member: Membership, stack: ExitStack, stop: _Stop, faults: list[FaultEvent]) -> Session:
    run = member.run
    step_tokens = config.sequences * run.model.seq_len
    if step_tokens > run.global_batch_tokens:
        raise ValueError(
            f"sequences={config.sequences} make a step of {step_tokens} tokens, more than the run's "
            f"global_batch_tokens={run.global_batch_tokens}: no peer would take its commits. Give fewer sequences"
        )
    if config.min_experts_per_token > run.model.n_experts:
        raise ValueError(
            f"min_experts_per_token={config.min_experts_per_token}, but a layer of the run has {run.model.n_experts}"
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
    return Session(
        config=config, run=run, text=text, member=member, trainer=trainer, metrics=metrics, display=display,
        asked_to_stop=lambda: stop.asked, faults=faults, records=list(metrics.kept),
        drops=DropWindow(max_fraction=config.max_dropped_fraction, length=config.drop_window_steps),
        last_checkpoint=resumed, saved_step=trainer.step,
    )  # fmt: skip


def _resume(
    config: TrainConfig, folder: Path, text: Text, trainer: Trainer, member: Membership, faults: list[FaultEvent]
) -> Path:
    """Go on from the newest checkpoint in `folder`; its path."""
    path = resume_trunk(folder, trainer, checkpoint_meta(config, text, trainer))
    live = member.link.runner.run(live_versions(member.directory.view, member.transport))
    event = compare_experts(path, saved_versions(path), live, allow_fresh=config.allow_fresh_experts)
    if event is not None:
        faults.append(event)
    return path


def _train(session: Session, stop: _Stop) -> None:
    config, trainer = session.config, session.trainer
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
