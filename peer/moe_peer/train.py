"""`moe-peer train`: the process around a Trainer: joining, data, resuming, signals, and the course of the training."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from moe_net.checkpoint_folder import checkpoints_of, newest_in
from moe_net.client import Membership, join_run
from moe_net.data.batches import Batches
from moe_net.data.corpus import Corpus
from moe_net.errors import NoLiveExpertsError, TooManyDropsError
from moe_net.folder import alone_in
from moe_net.rpc.policy import CallPolicy, DropWindow
from moe_net.trace import FaultEvent
from moe_net.wire.allocator import tune_allocator
from moe_peer.checkpoint import read_meta, saved_versions, set_aside_later
from moe_peer.config import TrainConfig
from moe_peer.display import TrainDisplay
from moe_peer.metrics import EvalMetrics, MetricsLog
from moe_peer.resume import checkpoint_to_resume, compare_experts, live_versions, resume_trunk
from moe_peer.session import Session, checkpoint_meta, say
from moe_peer.stopping import Stop, Waits
from moe_peer.text import Text, load_text, read_corpus
from moe_peer.threads import use_threads
from moe_peer.trainer import Trainer, build_model


def run_train(config: TrainConfig) -> int:
    """Train until `config.steps` steps are made, or until asked to stop; exit code, which is 130 after a SIGINT before
    the steps, or a second one."""
    tune_allocator()
    use_threads(config.threads)
    faults: list[FaultEvent] = []
    with Stop().installed() as stop, ExitStack() as stack:
        try:
            stack.enter_context(alone_in(config.out))
            if config.go_on:
                newest = newest_in(checkpoints_of(config.out))
                if newest is not None and (step := read_meta(newest).step) >= config.steps:
                    print(f"{newest} has {step} of {config.steps} steps: nothing is left to train", file=sys.stderr)
                    return 0
                config = replace(config, go_on=False, resume=newest)
                print(f"going on from {newest}" if newest else f"no checkpoint in {config.out} yet", file=sys.stderr)
            corpus = read_corpus(config)
            if config.data is not None:
                say(json.dumps({"event": "text", "summary": corpus.summary}))
                print(f"text: {corpus.summary}", file=sys.stderr)
            member = stack.enter_context(
                join_run(
                    config.join, name=config.run, trainer=f"trainer-{config.trainer_index}", policy=_policy(config),
                    on_event=faults.append, wait_s=config.wait_s, spread=config.spread_replicas,
                )
            )  # fmt: skip
            session = _open(config, corpus, member, stack, stop, faults)
            with stop.ends(session.waits):
                ready = {"event": "ready", "role": "trainer", "run": member.run.name, "step": session.trainer.step}
                say(json.dumps(ready))
                _train(session)
        except KeyboardInterrupt:
            return stop.exit_code
    return 0


def _policy(config: TrainConfig) -> CallPolicy:
    timeout_s = config.call_timeout_s
    return CallPolicy(
        forward_timeout_s=timeout_s, backward_timeout_s=timeout_s, commit_timeout_s=timeout_s,
        min_timeout_s=min(timeout_s, CallPolicy().min_timeout_s), hedge_fraction=config.hedge_fraction,
    )  # fmt: skip


def _open(
    config: TrainConfig, corpus: Corpus, member: Membership, stack: ExitStack, stop: Stop, faults: list[FaultEvent]
) -> Session:
    run = member.run
    step_tokens = config.sequences * run.model.seq_len
    if step_tokens > run.global_batch_tokens:
        raise ValueError(
            f"sequences={config.sequences} make a step of {step_tokens} tokens, more than the run's "
            f"global_batch_tokens={run.global_batch_tokens}: no peer would take its commits. Give fewer sequences"
        )
    note = run.batch_note(trainers=config.trainers, sequences=config.sequences)
    if note is not None:
        print(note, file=sys.stderr)
    if config.min_experts_per_token > run.model.n_experts:
        raise ValueError(
            f"min_experts_per_token={config.min_experts_per_token}, but a layer of the run has {run.model.n_experts}"
        )
    resumed = None if config.resume is None else checkpoint_to_resume(config.resume)
    text = load_text(config, corpus, run, resumed)
    batches = Batches(
        text.train,
        seq_len=run.model.seq_len,
        sequences_per_micro=config.sequences,
        n_trainers=config.trainers,
        seed=run.seed,
    )
    first = config.cuts[0]
    waits = Waits(member.link.runner)
    link = replace(member.link, runner=waits)
    trainer = Trainer(
        run=run, model=build_model(run, link), link=link, batches=batches, index=config.trainer_index,
        n_micro=first.micro_batches, in_flight=first.in_flight, choices=config.cuts,
    )  # fmt: skip
    stack.enter_context(trainer)
    if resumed is not None:
        _resume(config, resumed, text, trainer, member, faults)
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
        stop=stop, waits=waits, faults=faults, records=list(metrics.kept),
        drops=DropWindow(max_fraction=config.max_dropped_fraction, length=config.drop_window_steps),
        last_checkpoint=resumed, saved_step=trainer.step,
    )  # fmt: skip


def _resume(
    config: TrainConfig, path: Path, text: Text, trainer: Trainer, member: Membership, faults: list[FaultEvent]
) -> None:
    """Go on from the checkpoint at `path`."""
    changed = resume_trunk(path, trainer, checkpoint_meta(config, text, trainer))
    live = member.link.runner.run(live_versions(member.directory.view, member.transport))
    experts = trainer.run.model.expert_ids
    differ = compare_experts(path, saved_versions(path), live, experts, allow_fresh=config.allow_fresh_experts)
    faults += [event for event in (changed, differ) if event is not None]


def _train(session: Session) -> None:
    config, trainer, stop = session.config, session.trainer, session.stop
    started_s, first_step = time.monotonic(), trainer.step
    final: EvalMetrics | None = None
    sample: str | None = None
    try:
        with suppress(CancelledError):  # asked to stop
            final = _make_steps(session)
        train_s = time.monotonic() - started_s
        session.save_at_the_end()
    except (NoLiveExpertsError, TooManyDropsError):  # the trunk is here, and has learned
        session.note_faults()
        session.keep()
        raise
    finally:
        session.note_faults()  # above all when they end the training
    session.report()
    with suppress(CancelledError):
        if not stop.asked:
            sample = session.sample()
    tokens = (trainer.step - first_step) * config.sequences * session.run.model.seq_len
    done = {
        "event": "done",
        "steps": trainer.step,
        "val_nats_per_byte": final and final.val_nats_per_byte,
        "bigram_nats_per_byte": session.text.bigram_nats_per_byte,
        "tokens_per_s": tokens / train_s if train_s > 0 else 0.0,
        "checkpoint": session.last_checkpoint and str(session.last_checkpoint),
        "sample": sample,
    }
    say(json.dumps({key: value for key, value in done.items() if value is not None}))
    if stop.asked:
        where = f"step {trainer.step} is in {session.last_checkpoint}" if trainer.step else "nothing was learned yet"
        print(f"stopping: {where}; leaving the run", file=sys.stderr)


def _make_steps(session: Session) -> EvalMetrics | None:
    """Those that are left, and the evaluation after them; without that when asked to stop."""
    config, trainer = session.config, session.trainer
    if trainer.step == 0:
        session.evaluate()
    while trainer.step < config.steps:
        session.step()
        if session.stop.asked:
            return None
        if trainer.step % config.eval_every == 0 and trainer.step < config.steps:
            session.evaluate()
        if config.checkpoint_every and trainer.step % config.checkpoint_every == 0 and trainer.step < config.steps:
            session.checkpoint_on_the_way()
    return session.evaluate()
