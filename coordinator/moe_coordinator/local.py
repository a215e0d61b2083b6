"""`moe-coordinator local`: a whole swarm as real processes of this machine, with faults on demand."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from moe_coordinator.config import (
    RUN_FILE,
    LocalOptions,
    check_batch,
    deal_experts,
    fault_plan,
    newest_checkpoint,
    run_config,
    to_toml,
    trainer_threads,
)
from moe_coordinator.faults import FaultPlan
from moe_coordinator.laboratory import Laboratory, open_proxies
from moe_coordinator.supervisor import Child, ChildError, ChildSpec, Event, Supervisor, describe_exit
from moe_net.checkpoint_folder import TOKENIZER, trainer_folder
from moe_net.config import RunConfig
from moe_net.data.corpus import load_corpus
from moe_net.data.vocabulary import make_tokenizer, sha256_of, tokenizer_of_run
from moe_net.discovery.listen import check_unused
from moe_net.folder import alone_in
from moe_net.machine import processors
from moe_net.preflight import must_be_folder, must_read_file, must_read_text, must_write_folder
from moe_net.signals import on_signals, stop_signals

COORDINATOR = (sys.executable, "-m", "moe_coordinator.cli", "serve")
PEER = (sys.executable, "-m", "moe_peer.cli", "serve")
TRAINER = (sys.executable, "-m", "moe_peer.cli", "train")


def main(options: LocalOptions) -> int:
    """Exit code: 0 when every trainer finished, 1 when one failed, 128 + signal when asked to stop."""
    _check_files(options)
    run = run_config(options)
    faults = fault_plan(options, steps=options.steps or run.optimizer.total_steps)
    check_batch(run, sequences=options.sequences)
    specs = deal_experts(run.model, peers=options.peers, replicas=options.replicas)
    return begin(options, run, specs, faults)


def begin(options: LocalOptions, run: RunConfig, specs: Sequence[str], faults: FaultPlan) -> int:
    """Everything after the checks."""
    with alone_in(options.out):
        run, options = with_tokenizer(options, run)
        (options.out / RUN_FILE).write_text(to_toml(run))
        # Whom an earlier swarm's coordinator met is not here any more.
        shutil.rmtree(coordinator_state(options), ignore_errors=True)
        return uvloop.run(LocalSwarm(options, run, specs, faults).run())


def _check_files(options: LocalOptions) -> None:
    """ValueError or OSError names the first option whose file, folder or port is not as it must be."""
    for option, file in (("--config", options.config), ("--faults", options.faults)):
        if file is not None:
            must_read_file(option, file)
    if options.data is not None:
        must_read_text("--data", options.data)
    if options.resume is not None:
        must_be_folder("--resume", options.resume)
        must_read_file("--resume", options.resume / RUN_FILE)
        newest_checkpoint(options.resume)
    must_write_folder("--out", options.out)
    for index in range(1 + options.peers if options.base_port else 0):
        check_unused(_listen(options, index))


def with_tokenizer(options: LocalOptions, run: RunConfig) -> tuple[RunConfig, LocalOptions]:
    """The run with its tokenizer's SHA-256, and the options with its file, made if there is none: one vocabulary for
    all trainers. A resume has it in its checkpoints. ValueError when the file is not the run's."""
    if options.tokenizer is None:
        if run.tokenizer == "bytes" or options.resume is not None:
            return run, options
        if run.tokenizer_sha256 is not None:
            raise ValueError(
                f"the run's tokenizer has the SHA-256 {run.tokenizer_sha256}: give its file by --tokenizer FILE"
            )
        max_bytes = options.max_data_mib * 2**20
        corpus = load_corpus(options.data, max_bytes=max_bytes, text_field=options.text_field or "text")
        file = options.out / TOKENIZER
        made, sha256 = make_tokenizer(corpus, file, vocab_size=run.model.vocab_size)
        print(f"made a tokenizer for all trainers, {made.vocab_size} tokens: {file}", file=sys.stderr)
        return replace(run, tokenizer_sha256=sha256), replace(options, tokenizer=file)
    if run.tokenizer == "bytes":
        raise ValueError(f"tokenizer: the run's tokens are bytes; {options.tokenizer} has no place in it")
    _, data = tokenizer_of_run(options.tokenizer, run.tokenizer_sha256)
    return replace(run, tokenizer_sha256=sha256_of(data)), options


def coordinator_spec(options: LocalOptions) -> ChildSpec:
    settings = (
        "--config",
        options.out / RUN_FILE,
        "--listen",
        _listen(options, 0),
        "--state",
        coordinator_state(options),
    )
    return ChildSpec(name="coordinator", argv=(*COORDINATOR, *map(str, settings)), env=_threads_env(1))


def coordinator_state(options: LocalOptions) -> Path:
    """By what it knows after a restart who it is and whom it met."""
    return options.out / "coordinator"


def peer_spec(options: LocalOptions, index: int, *, join: str, experts: str, advertise: str | None = None) -> ChildSpec:
    argv = [*PEER, "--join", join, "--experts", experts, "--listen", _listen(options, 1 + index), "--threads", "1"]
    if advertise is not None:
        argv += ["--advertise", advertise]
    if options.resume:
        argv += ["--load", str(newest_checkpoint(options.resume))]
    return ChildSpec(name=f"peer-{index}", argv=tuple(argv), env=_threads_env(1), wave=1)


def trainer_spec(options: LocalOptions, run: RunConfig, index: int, *, join: str, cores: int) -> ChildSpec:
    threads = trainer_threads(cores, peers=options.peers, trainers=options.trainers)
    settings = {
        "--join": join,
        "--run": run.name,
        "--out": trainer_folder(options.out, index),
        "--trainer-index": index,
        "--trainers": options.trainers,
        "--steps": options.steps or run.optimizer.total_steps,
        "--sequences": options.sequences,
        "--threads": threads,
        "--micro-batches": options.micro_batches,
        "--eval-every": options.eval_every,
        "--data": options.data,
        "--text-field": options.text_field,
        "--max-data-mib": options.max_data_mib,
        "--tokenizer": options.tokenizer,
        "--resume": options.resume and trainer_folder(options.resume, index),
    }
    argv = [text for flag, value in settings.items() if value is not None for text in (flag, str(value))]
    if options.spread_replicas:
        argv.append("--spread-replicas")
    if options.allow_fresh_experts:
        argv.append("--allow-fresh-experts")
    return ChildSpec(
        name=f"trainer-{index}",
        argv=(*TRAINER, *argv),
        env=_threads_env(threads),
        wave=2,
        stderr="terminal" if options.trainers == 1 else "log",
    )


def _listen(options: LocalOptions, offset: int) -> str:
    return f"127.0.0.1:{options.base_port + offset if options.base_port else 0}"


def _threads_env(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads)}


class LocalSwarm:
    """One run of the swarm."""

    def __init__(self, options: LocalOptions, run: RunConfig, experts: Sequence[str], faults: FaultPlan) -> None:
        self._options = options
        self._run_config = run
        self._experts = experts
        self._faults = faults
        self._laboratory: Laboratory | None = None
        self._trainers: list[Child] = []
        self._trainer_exits: asyncio.Queue[Child] = asyncio.Queue()
        self._console = Console(stderr=True, highlight=False)

    async def run(self) -> int:
        supervisor = Supervisor(
            self._options.out / "logs",
            grace_s=self._options.grace_s,
            on_event=self._on_event,
            on_exit=self._on_exit,
        )
        work = asyncio.create_task(self._train(supervisor))
        asked: list[int] = []

        def ask(number: int) -> None:
            asked.append(number)
            if len(asked) == 1:
                self._say("stopping (once more: kill)")
                work.cancel()
            else:
                supervisor.hurry()

        try:
            with on_signals(ask, stop_signals()):
                await work
        except ChildError as error:
            self._say(str(error))
            return 1
        except asyncio.CancelledError:
            failed = [(trainer, code) for trainer in self._trainers if (code := await trainer.wait()) > 0]
            for trainer, code in failed:  # what it has learned is not saved
                self._say(trainer.report(f"failed with {describe_exit(code)}"))
            return 128 + asked[0] if asked and not failed else 1
        self._print_summary()
        return 0

    async def _train(self, supervisor: Supervisor) -> None:
        """Start everything, wait for the trainers, stop the rest. ChildError when something failed that must not.

        Left in the reverse order: faults end, trainers stop, then peers, then the coordinator; then proxies close.
        """
        options = self._options
        async with open_proxies(self._faults, n_peers=options.peers) as proxies, supervisor:
            self._say(f"logs in {options.out / 'logs'}")
            note = self._run_config.batch_note(trainers=options.trainers, sequences=options.sequences)
            if note is not None:
                self._say(note)
            async with Laboratory.open(
                self._faults,
                supervisor,
                proxies,
                options.out,
                say=self._say,
                ready_timeout_s=options.ready_timeout_s,
            ) as self._laboratory:
                await self._train_in(self._laboratory, supervisor)

    async def _train_in(self, laboratory: Laboratory, supervisor: Supervisor) -> None:
        options = self._options
        spec = coordinator_spec(options)
        coordinator = await supervisor.start(spec)
        laboratory.add(spec, coordinator)
        join = str((await coordinator.ready(options.ready_timeout_s))["address"])
        peers: list[Child] = []
        for index, experts in enumerate(self._experts):
            proxy = laboratory.proxies.get(f"peer-{index}")
            spec = peer_spec(options, index, join=join, experts=experts, advertise=proxy and proxy.address)
            peers.append(await supervisor.start(spec))
            laboratory.add(spec, peers[-1], hosts=experts)
        for peer, experts in zip(peers, self._experts, strict=True):
            self._say(f"{peer.name} serves at {await laboratory.ready(peer)}: {experts}")
        cores = processors()
        for index in range(options.trainers):
            spec = trainer_spec(options, self._run_config, index, join=join, cores=cores)
            self._trainers.append(await supervisor.start(spec))
            laboratory.add(spec, self._trainers[-1])
        for _ in range(options.trainers):
            trainer = await self._trainer_exits.get()
            code = await trainer.wait()
            if code != 0 and not trainer.stopping:  # one that a fault ended has not failed
                raise ChildError(trainer.report(f"failed with {describe_exit(code)}"))

    def _on_event(self, child: Child, event: Event) -> None:
        if event["event"] == "step" and child is self._trainers[0]:
            assert self._laboratory is not None
            self._laboratory.on_step(event["step"])
        elif event["event"] == "text" and child is self._trainers[0] and len(self._trainers) > 1:
            self._say(f"text: {event['summary']}")  # one trainer alone has the terminal, and says it itself

    def _on_exit(self, child: Child, code: int) -> None:
        if child in self._trainers:
            self._trainer_exits.put_nowait(child)
        elif not child.stopping and "ready" in child.last:
            self._say(child.report(f"ended by itself with {describe_exit(code)}; the run goes on"))

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _print_summary(self) -> None:
        for trainer in self._trainers:
            print_summary(trainer.name, trainer.last.get("done", {}), self._options.out / trainer.name)


def print_summary(name: str, done: Event, out: Path) -> None:
    """The trainer's last event as a table on stdout, and its sample of writing below."""
    console = Console(highlight=False)
    table = Table(title=name, show_header=False)
    for key, value in done.items():
        if key not in ("event", "sample"):
            table.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    for file in ("loss.png", "metrics.jsonl"):
        if (out / file).exists():
            table.add_row(file, str(out / file))
    console.print(table)
    if "sample" in done:
        console.print("sample:", style="bold")
        console.print(_printable(str(done["sample"])), markup=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Without control characters: a byte-level model writes those too, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
