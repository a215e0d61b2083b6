"""The commands' options, and what a local swarm derives from them. No torch, no grpc: `--help` reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from moe_coordinator.faults import Fault, FaultPlan
from moe_net.checkpoint_folder import ANY_STATE, checkpoints_of, newest_in, trainer_folder
from moe_net.config import RunConfig, load_toml, to_json
from moe_net.discovery.listen import MAX_PORT, advertised_address, check_listen, check_multiaddr, dht_multiaddr
from moe_net.discovery.manifest import MANIFEST_TTL_S
from moe_net.discovery.record import MAX_LIFETIME_S
from moe_net.model.config import PRESETS, ModelConfig
from moe_net.optim import OptimizerConfig

RUN_FILE = "run.toml"
MAX_PROCESSES = 1024
"""The most members of one kind on one machine."""
N_BYTES = 256
"""Tokens that every tokenizer of text has at least: one for each byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Start a run, or serve one that exists: answer newcomers and keep the manifest in the DHT."""

    config: Path
    """The run's manifest, as TOML; `moe-coordinator fields` prints one with every field."""
    listen: str = "127.0.0.1:0"
    """host:port of the gRPC service; port 0 takes a free one."""
    advertise: str | None = None
    """Host by which others reach this machine, when it is not the host of --listen, nor an interface's address."""
    dht_listen: str | None = None
    """libp2p multiaddr the DHT node listens on, like /ip4/0.0.0.0/tcp/4001; by default a free port of the same host."""
    dht_advertise: str | None = None
    """libp2p multiaddr by which others reach that, like /dns/run.example/tcp/4001; by default the host of --advertise
    with the port of --dht-listen."""
    state: Path | None = None
    """Folder of what outlives this process: the key of its DHT node and the members it met. With it, and with the same
    ports, a coordinator that is started again is the same one, in the same swarm."""
    join: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Address of a member of the run, to enter its DHT by: a coordinator's host:port or a libp2p multiaddr; repeat for
    more. Without one: a new DHT."""
    manifest_ttl_s: float = MANIFEST_TTL_S
    """Life of the manifest in the DHT; refreshed after a sixth of that."""

    def __post_init__(self) -> None:
        check_listen(self.listen)
        self.dht_multiaddr  # noqa: B018  a wrong one is found now
        advertised_address(self.advertise, self.listen)
        if self.dht_advertise is not None:
            check_multiaddr("dht_advertise", self.dht_advertise)
        if not 0 < self.manifest_ttl_s <= MAX_LIFETIME_S:
            raise ValueError(f"manifest_ttl_s={self.manifest_ttl_s} is not in (0, {MAX_LIFETIME_S:.0f}]")

    @property
    def dht_multiaddr(self) -> str:
        """Where the DHT node listens; ValueError when that does not follow from `listen`."""
        return dht_multiaddr(self.listen) if self.dht_listen is None else self.dht_listen


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyOptions:
    """Be a bad network in front of one server: delay, bandwidth, cuts, silence and damage, changed by lines on stdin.

    A line is a JSON object of `up` and `down` (what that direction does: delay_s, jitter_s, tail_probability, tail_s,
    bandwidth_mib_s, corrupt_per_mib, silent; what is left out is as on a perfect line) and `cut` (true or false). It is
    answered by an event `changed` or `refused` on stdout.
    """

    listen: str
    """host:port that clients connect to; port 0 takes a free one."""
    target: str
    """host:port of the server; a name is resolved anew for each connection."""
    faults: Path | None = None
    """TOML file whose [network] says how it begins, like examples/faults.toml; its [[fault]] tables are not for the
    proxy, but for who drives it."""
    name: str = "peer-0"
    """The server's name: with the file's seed it decides which jitter, tails and damage are drawn."""

    def __post_init__(self) -> None:
        check_listen(self.listen)
        host, _, port = self.target.rpartition(":")
        if not host or not port.isdecimal() or not 1 <= int(port) <= MAX_PORT:
            raise ValueError(f"target={self.target!r} is not host:port")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosOptions:
    """Do to a swarm in containers what a file says, and see whether its training takes it.

    The swarm is a Compose project that runs, like docker/compose.yaml with docker/compose.chaos.yaml. Says each fault
    as it begins and ends, and how long the experts took to be back; exit code 1 when they took too long, the trainer
    ended, or the loss did not fall.
    """

    project: str
    """The Compose project's name."""
    faults: Path
    """TOML file of what goes wrong and when, like docker/chaos.toml; a target is the name of a service."""
    metrics: Path
    """The trainer's metrics.jsonl."""
    trainer: str = "trainer"
    """The trainer's service."""
    for_s: float = 300.0
    """How long, from the trainer's first step on."""
    recovery_limit_s: float = 30.0
    """How long after the end of a fault all experts may take to be live again."""
    ready_timeout_s: float = 180.0
    """How long the trainer may take to its first step."""

    def __post_init__(self) -> None:
        if not all(0 < wait_s < math.inf for wait_s in (self.for_s, self.recovery_limit_s, self.ready_timeout_s)):
            raise ValueError("for_s, recovery_limit_s and ready_timeout_s must be positive numbers of seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldsOptions:
    """Print a run's manifest with every field, what it means and its default: a beginning for a run.toml."""

    preset: Literal["tiny", "small", "switch-base-like", "glam-like", "st-moe-like"] = "tiny"
    """The preset whose model is shown: `tiny` trains in minutes on two cores, the others are the papers'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOptions:
    """Run a whole swarm as processes of this machine: a coordinator, peers, trainers."""

    peers: int = 3
    """Expert servers."""
    trainers: int = 1
    """Trainers. They share the experts; each trains a trunk of its own."""
    replicas: int = 1
    """Peers that host each expert; each steps with the gradients of all."""
    spread_replicas: bool = False
    """Trainers share their tokens out among an expert's replicas, instead of keeping to their favourites."""
    kill_peer_at_step: int | None = None
    """SIGKILL the last peer, and all it started, when the first trainer has made this step."""
    faults: Path | None = None
    """TOML file of what goes wrong and when, like examples/faults.toml; noted in OUT/faults.jsonl as it happens."""
    preset: str | None = None
    """Model preset: tiny, small, switch-base-like, glam-like or st-moe-like; `tiny` unless --config is given."""
    config: Path | None = None
    """Manifest to use instead of one made from the preset."""
    steps: int | None = None
    """Steps each trainer makes; 300, or optimizer.total_steps of --config."""
    sequences: int = 16
    """Sequences per step and trainer."""
    micro_batches: int | None = None
    """Micro-batches in flight per trainer; the trainer's default when absent."""
    eval_every: int | None = None
    """Steps between evaluations; the trainer's default when absent."""
    data: Path | None = None
    """Text to train on; the trainer's own when absent."""
    text_field: str | None = None
    """The field of a record (JSON lines, Parquet, data sets) that is the text; `text` when absent."""
    max_data_mib: int = 256
    """Read no more text than this."""
    tokenizer: Path | None = None
    """The tokenizer.json of a --config whose tokenizer is a BPE; when absent, one is made, for all trainers."""
    out: Path = Path("runs/local")
    """Folder for run.toml, logs and each trainer's results."""
    seed: int | None = None
    """Seed of the run; 0 when absent."""
    wire: Literal["fp32", "bf16", "fp16", "int8"] | None = None
    """Encoding of activations and gradients; bf16 when absent."""
    resume: Path | None = None
    """The --out folder of an earlier local run, to go on from its last checkpoint."""
    allow_fresh_experts: bool = False
    """Resume although experts that were trained begin afresh, because the checkpoint lacks them."""
    base_port: int = 0
    """The coordinator listens here, the peers on the ports after it; 0: free ports."""
    ready_timeout_s: float = 120.0
    """How long a process may take to start (torch's import included)."""
    grace_s: float = 30.0
    """How long a process may take to stop before it is killed; a trainer writes a checkpoint first."""

    def __post_init__(self) -> None:
        if self.peers < 1 or self.trainers < 1:
            raise ValueError("peers and trainers must be at least 1")
        if max(self.peers, self.trainers) > MAX_PROCESSES:
            raise ValueError(f"peers={self.peers} and trainers={self.trainers} must be {MAX_PROCESSES} at most")
        if not 1 <= self.replicas <= self.peers:
            raise ValueError(f"replicas={self.replicas} is not in 1..peers={self.peers}")
        if self.base_port and not 1 <= self.base_port <= MAX_PORT - self.peers:
            raise ValueError(f"base_port={self.base_port}: the coordinator and {self.peers} peers need ports after it")
        if not all(0 < wait_s < math.inf for wait_s in (self.ready_timeout_s, self.grace_s)):
            raise ValueError("ready_timeout_s and grace_s must be positive numbers of seconds")
        if self.sequences < 1 or (self.steps is not None and self.steps < 1) or self.max_data_mib < 1:
            raise ValueError("sequences, steps and max_data_mib must be at least 1")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}: choose one of {', '.join(PRESETS)}")
        fixed = {"--preset": self.preset, "--seed": self.seed, "--wire": None if self.resume else self.wire}
        given = [flag for flag, value in fixed.items() if value is not None]
        if given and (self.config or self.resume):
            source = "--config" if self.config else f"{RUN_FILE} of --resume"
            raise ValueError(f"{', '.join(given)}: the manifest ({source}) says that already")
        if self.config and self.resume:
            raise ValueError(f"--config and --resume exclude each other: {RUN_FILE} of --resume is the manifest")


def check_manifest(run: RunConfig) -> RunConfig:
    """`run`; ValueError when no trainer could join it with text."""
    if run.model.vocab_size < N_BYTES:
        raise ValueError(
            f"model.vocab_size={run.model.vocab_size}: tokenizer={run.tokenizer!r} has {N_BYTES} tokens or more"
        )
    return run


def check_batch(run: RunConfig, *, sequences: int) -> None:
    """ValueError when a trainer's step is more than the batch that experts step with: no peer takes its commits."""
    tokens = sequences * run.model.seq_len
    if tokens > run.global_batch_tokens:
        raise ValueError(
            f"sequences={sequences} of seq_len={run.model.seq_len} make a step of {tokens} tokens, more than the run's "
            f"global_batch_tokens={run.global_batch_tokens}. Give fewer sequences"
        )


def run_config(options: LocalOptions) -> RunConfig:
    """The manifest of a local swarm: that of --config or --resume, else one from preset, steps, sequences and seed.

    More --steps than those of the manifest prolong a run that is resumed, and its learning rates' schedule with it.
    """
    if options.config:
        return check_manifest(load_toml(RunConfig, options.config))
    if options.resume:
        run = check_manifest(load_toml(RunConfig, options.resume / RUN_FILE))
        total_steps = max(run.optimizer.total_steps, options.steps or 0)
        return replace(run, wire=options.wire or run.wire, optimizer=replace(run.optimizer, total_steps=total_steps))
    model = PRESETS[options.preset or "tiny"]
    return RunConfig(
        name="demo",
        seed=options.seed or 0,
        model=model,
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20, total_steps=options.steps or 300),
        global_batch_tokens=options.trainers * options.sequences * model.seq_len,
        wire=options.wire or "bf16",
    )


def fault_plan(options: LocalOptions, *, steps: int) -> FaultPlan:
    """What --faults and --kill-peer-at-step say; ValueError when a run of so many steps cannot have that."""
    kill_at = options.kill_peer_at_step
    if kill_at is not None and not 0 <= kill_at < steps:
        raise ValueError(f"kill_peer_at_step={kill_at} is not one of the steps 0..{steps - 1}")
    plan = FaultPlan() if options.faults is None else load_toml(FaultPlan, options.faults)
    try:
        plan.check(peers=options.peers, trainers=options.trainers, steps=steps)
        for number, fault in enumerate(plan.fault):
            if fault.what == "disconnect":
                raise ValueError(
                    f"fault.{number}: disconnect takes a member's whole network away, and processes of one machine "
                    "share theirs; it is for docker/compose.chaos.yaml"
                )
    except ValueError as error:
        raise ValueError(f"{options.faults}: {error}") from None
    if kill_at is None:
        return plan
    kill = Fault(target=f"peer-{options.peers - 1}", what="kill", at_step=kill_at)
    return replace(plan, fault=(*plan.fault, kill))


def newest_checkpoint(out: Path) -> Path:
    """The latest checkpoint of the first trainer of the local run in `out`; ValueError when there is none."""
    folder = checkpoints_of(trainer_folder(out, 0))
    found = newest_in(folder)
    if found is None:
        raise ValueError(f"--resume {out}: nothing to resume: no {folder}/{ANY_STATE}")
    return found


def deal_experts(model: ModelConfig, *, peers: int, replicas: int) -> list[str]:
    """Each peer's `--experts`: peer p hosts index i of every layer when i mod `peers` is p, or one of the
    `replicas`-1 before p. ValueError when a peer would host nothing."""
    specs: list[str] = []
    for peer in range(peers):
        mine = [i for i in range(model.n_experts) if (peer - i) % peers < replicas]
        if not mine:
            raise ValueError(
                f"peer {peer} would host nothing: {peers} peers are too many for {model.n_experts} experts per layer "
                f"at {replicas} replicas"
            )
        specs.append(",".join(f"*.{i}" for i in mine))
    return specs


def trainer_threads(cores: int, *, peers: int, trainers: int) -> int:
    """Threads of one trainer: what the peers' one thread each leaves, shared among the trainers."""
    return max(1, (cores - peers) // trainers)


def to_toml(config: object) -> str:
    """A dataclass as TOML that `load_toml` reads back: scalars and lists of them, and nested dataclasses as tables."""
    return "\n".join(_toml_table(json.loads(to_json(config)), ())) + "\n"


def _toml_table(values: dict[str, Any], path: Sequence[str]) -> Iterator[str]:
    if path:
        yield f"\n[{'.'.join(path)}]"
    for name, value in values.items():
        if not isinstance(value, dict) and value is not None:
            yield f"{name} = {toml_value(value)}"
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _toml_table(value, (*path, name))


def toml_value(value: object) -> str:
    """A scalar, or a list of them, as TOML."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float() if math.isfinite(value):
            return repr(value)
        case str():
            # JSON's escapes are TOML's; DEL is the one character that only TOML wants escaped.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list():
            return f"[{', '.join(toml_value(item) for item in value)}]"
        case _:
            raise ValueError(f"{value!r} has no place in a configuration file")
