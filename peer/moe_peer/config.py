"""The commands' options. No torch, no grpc: `--help` reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from moe_net.discovery.listen import advertised_address, check_listen, check_multiaddr, dht_multiaddr
from moe_net.model.config import ModelConfig
from moe_net.types import ExpertId
from moe_peer.cut import Cut, open_cuts

MAX_THREADS = 1024
MAX_SEQUENCES = 2**16
"""The most sequences of one step: the ways to cut it into micro-batches are listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Host experts of a run: join it, serve, and leave without a trace on Ctrl-C or SIGTERM."""

    config: Path | None = None
    """TOML file with any of these options; what stands on the command line wins."""
    join: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Way into the run: a coordinator's host:port, or the libp2p multiaddr of any member; repeat for more."""
    run: str | None = None
    """The run's name; needed only where several runs share a DHT."""
    experts: str | None = None
    """What to host: `layer.index`, ranges and lists of it, `*` for all, as in `0.0-3,1.5` or `*.0-3`. Without it: the
    experts with the fewest replicas."""
    max_experts: int | None = None
    """Without --experts, how many; by default as many as fit into half of the memory that the caches leave, or
    into a third of it where less than 4 GiB are available: the rest is for the work."""
    listen: str | None = None
    """host:port of the gRPC service; port 0 takes a free one. By default a free port of every interface, or of
    127.0.0.1 when the whole run is on this machine."""
    advertise: str | None = None
    """Host by which others reach this machine, when it is not the address from which it reaches the run (forwarded
    port, proxy); or HOST:PORT, when the port is another one as well."""
    dht_listen: str | None = None
    """libp2p multiaddr to listen on, like /ip4/0.0.0.0/tcp/4001; by default a free TCP port of --listen's host."""
    dht_advertise: str | None = None
    """libp2p multiaddr by which others reach that, like /dns/home.example/tcp/4001; by default the host of --advertise
    with the port of --dht-listen."""
    load: Path | None = None
    """Take the experts' state from a checkpoint: its folder, or any folder of a run that holds some (the newest). While
    it holds none they start afresh, so that the same command begins a run and comes back to it. Experts of which a
    living replica has a later version are taken from there all the same."""
    identity: Path | None = None
    """PEM file of this peer's key, made when it does not exist; without it, a new identity each time."""
    device: str | None = None
    """Where the experts run: cpu, cuda or cuda:1. By default the first CUDA device, or the CPU where there is none."""
    threads: int | None = None
    """Threads for tensor work; by default as many as cores, or as a container's quota has processors."""
    stage_mib: int | None = None
    """Memory for calls between their forward and their trainer's commit. By default 576, or where memory is scarce (as
    in a container) less: with the queue it takes a quarter of what is available at most. A backward for which there is
    no room is refused."""
    max_batch_rows: int = 2048
    """Rows that run together."""
    max_queue_rows: int = 65_536
    """Rows that may wait; further calls are refused with RESOURCE_EXHAUSTED."""
    max_queue_mib: int | None = None
    """Memory they may take; by default 256 or less."""
    join_timeout_s: float = 20.0
    """How long to look for the run."""
    share_gradients: bool = True
    """Make each step with the gradients of the other replicas of the experts here, as long as these answer soon:
    replicas stay equal, and one that is lost takes nothing with it. Up to 4 bytes a parameter, step and replica."""
    exchange_every_s: float = 0.2
    """How often to average with one of the other replicas of the experts here; 0: never on this peer's initiative."""
    catch_up_timeout_s: float = 120.0
    """How long fetching what other replicas have learned may take; experts not here by then start without it."""
    grace_s: float = 5.0
    """How long running calls may take to finish at a stop, and a trainer that saves what was learned here to do so."""

    def __post_init__(self) -> None:
        if self.listen is not None:
            check_listen(self.listen)
            self.dht_multiaddr(self.listen)
        advertised_address(self.advertise, "0.0.0.0:1")
        if self.dht_advertise is not None:
            check_multiaddr("dht_advertise", self.dht_advertise)
        if self.experts is not None and self.max_experts is not None:
            raise ValueError("experts and max_experts exclude each other")
        for part in (self.experts or "*.*").split(","):
            _read_part(part, self.experts or "")
        positive = {
            "max_experts": self.max_experts,
            "max_batch_rows": self.max_batch_rows,
            "max_queue_rows": self.max_queue_rows,
            "max_queue_mib": self.max_queue_mib,
            "join_timeout_s": self.join_timeout_s,
            "catch_up_timeout_s": self.catch_up_timeout_s,
        }
        for name, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, not {value}")
        _check_threads(self.threads)
        if not all(map(math.isfinite, (self.exchange_every_s, self.grace_s))):
            raise ValueError("exchange_every_s and grace_s must be numbers of seconds")
        if min(self.stage_mib or 0, self.exchange_every_s, self.grace_s) < 0:
            raise ValueError("stage_mib, exchange_every_s and grace_s must not be negative")

    def dht_multiaddr(self, listen: str) -> str:
        """Where the DHT node listens beside a gRPC server at `listen`; ValueError when that does not follow from it."""
        return dht_multiaddr(listen) if self.dht_listen is None else self.dht_listen


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Train the trunk of a run whose experts are hosted by its peers."""

    config: Path | None = None
    """TOML file with any of these options; what stands on the command line wins."""
    join: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Way into the run: a coordinator's host:port, or the libp2p multiaddr of any member; repeat for more."""
    run: str | None = None
    """The run's name; needed only where several runs share a DHT."""
    out: Path = Path("runs/train")
    """Folder for metrics.jsonl, loss.png and checkpoints. A new training in a used one renames what the earlier one
    measured and saved there to replaced-*."""
    data: Path | None = None
    """File or folder of text, JSON lines (.jsonl, .ndjson, also .gz of these), Parquet, or data sets that `datasets` of
    Hugging Face saved; without it, the source of Python's standard library. What of it is left out is said."""
    text_field: str = "text"
    """The field of a record (JSON lines, Parquet, data sets) that is the text."""
    max_data_mib: int = 256
    """Read no more text than this."""
    tokenizer: Path | None = None
    """The run's tokenizer.json, where its tokenizer is a BPE; a resume takes it from the checkpoint."""
    steps: int = 300
    """Stop after this step of the run (resumed steps included)."""
    trainer_index: int = 0
    """Which of the run's trainers this is; no two may be the same."""
    trainers: int = 1
    """How many trainers the run has: the data is dealt out to them. They share the experts; each has its own trunk."""
    sequences: int = 16
    """Sequences in one step of this trainer."""
    micro_batches: int = 0
    """Parts that a step is cut into; must divide the sequences. 0: chosen after a few steps, from the measured round
    trip and compute time. (Router losses and capacity are those of a micro-batch.)"""
    in_flight: int = 0
    """Micro-batches at once: while one waits for its experts, another computes. 0: chosen likewise; 1: one after the
    other, which takes the least memory."""
    eval_every: int = 50
    """Steps between evaluations on held-out text."""
    eval_batches: int = 8
    """Batches of 16 held-out sequences in an evaluation."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0: only one, at the end."""
    keep_checkpoints: int = 3
    """How many checkpoints stay in --out, the newest ones; 0: all."""
    keep_checkpoints_gib: float = 0.0
    """How much they may take together; the newest one stays whatever its size. 0: any size."""
    resume: Path | None = None
    """Go on from a checkpoint: its folder, or the --out folder of an earlier training (the newest one in it)."""
    go_on: bool = False
    """Go on from the newest checkpoint in --out, if there is one; otherwise begin. The same command begins a training,
    comes back to it, and has nothing to do once it is over."""
    allow_fresh_experts: bool = False
    """Resume although experts begin afresh that were trained: at peers that did not --load them, or because nobody
    answered for them when the checkpoint was made. Otherwise refused."""
    sample_tokens: int = 240
    """Length of the sample written at the end."""
    threads: int | None = None
    """Threads for tensor work; by default as many as cores, or as a container's quota has processors."""
    wait_s: float = 60.0
    """How long to wait until every expert has a host, and, later on, for a layer's experts that are all gone."""
    call_timeout_s: float = 20.0
    """The most that a layer's calls may take, retries included; shorter deadlines are learned."""
    hedge_fraction: float = 0.05
    """Calls sent to a second replica because the first is late, as a share of all calls; 0: none."""
    spread_replicas: bool = False
    """Share each layer's tokens out among equal replicas. Otherwise a trainer keeps to its favourites, and the others
    learn what these have learned from them."""
    fetch_timeout_s: float = 120.0
    """Deadline for one peer's experts, when a checkpoint is made."""
    min_experts_per_token: int = 1
    """Stop when a layer has fewer live experts than this for `wait_s`."""
    max_dropped_fraction: float = 0.5
    """Stop when more of the (token, expert) pairs than this got no answer, forward or backward, over the window."""
    drop_window_steps: int = 20
    """Length of that window."""
    max_staleness: int = 16
    """Note a step in which an expert made more updates than this between a call's forward and its backward; 0: never.
    Several trainers, or one that is slow, make gradients old."""

    def __post_init__(self) -> None:
        at_least_one = {
            name: getattr(self, name)
            for name in (
                "max_data_mib", "steps", "trainers", "sequences", "eval_every", "eval_batches",
                "drop_window_steps", "min_experts_per_token",
            )
        }  # fmt: skip
        for name, value in at_least_one.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.sequences > MAX_SEQUENCES:
            raise ValueError(f"sequences={self.sequences} is more than {MAX_SEQUENCES}")
        if self.go_on and self.resume is not None:
            raise ValueError("go_on and resume exclude each other: go_on is to resume from --out")
        if not 0 <= self.trainer_index < self.trainers:
            raise ValueError(f"trainer_index={self.trainer_index} is not in 0..trainers-1={self.trainers - 1}")
        self.cuts  # noqa: B018  contradictions are found now
        if not 0 <= self.max_dropped_fraction <= 1:
            raise ValueError("max_dropped_fraction must be in 0..1")
        if min(self.checkpoint_every, self.max_staleness, self.sample_tokens, self.keep_checkpoints) < 0:
            raise ValueError("checkpoint_every, keep_checkpoints, max_staleness and sample_tokens must not be negative")
        if not 0 <= self.keep_checkpoints_gib < math.inf:
            raise ValueError(f"keep_checkpoints_gib={self.keep_checkpoints_gib} must be a number, and not negative")
        for name in ("wait_s", "call_timeout_s", "fetch_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.hedge_fraction <= 1:
            raise ValueError(f"hedge_fraction={self.hedge_fraction} is not in 0..1")
        _check_threads(self.threads)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """What `micro_batches` and `in_flight` leave open."""
        return open_cuts(sequences=self.sequences, micro_batches=self.micro_batches, in_flight=self.in_flight)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """Make the vocabulary of a run: a BPE, once, for all of its trainers. Prints what belongs into the run's TOML."""

    config: Path | None = None
    """TOML file with any of these options; what stands on the command line wins."""
    data: Path | None = None
    """File or folder of text, as of `train`; without it, the source of Python's standard library."""
    text_field: str = "text"
    """The field of a record (JSON lines, Parquet, data sets) that is the text."""
    max_data_mib: int = 256
    """Read no more text than this."""
    vocab_size: int = 4096
    """Tokens, the 256 bytes included; model.vocab_size of the run must have room for them."""
    out: Path = Path("tokenizer.json")
    """The file to write."""

    def __post_init__(self) -> None:
        if self.max_data_mib < 1:
            raise ValueError(f"max_data_mib must be at least 1, not {self.max_data_mib}")
        if not 256 <= self.vocab_size <= 2**24:
            raise ValueError(f"vocab_size={self.vocab_size} is not in 256..{2**24}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """Say in one line whether a member is well; exit code 0 if it is, 1 if not."""

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WHAT")]
    """host:port of a peer or a coordinator, which is asked; or the --out folder of a trainer, where its last step is
    looked up."""
    timeout_s: float = 2.0
    """How long a peer or a coordinator may take to answer."""
    within_s: float = 120.0
    """How long ago a trainer's last step may be."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s must be positive, not {self.timeout_s}")


def _check_threads(threads: int | None) -> None:
    # Beyond this torch ends the process, without a word that names the option.
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads={threads} is not in 1..{MAX_THREADS}")


def parse_experts(spec: str, model: ModelConfig) -> tuple[ExpertId, ...]:
    """The experts that `0.0-3,1.5`, `*.0-3` or `2.*` names, ascending. ValueError says which part is wrong."""
    chosen: set[ExpertId] = set()
    for part in spec.split(","):
        some_layers, some_indices = _read_part(part, spec)
        layers = model.moe_layers if some_layers is None else some_layers
        indices = range(model.n_experts) if some_indices is None else some_indices
        for what, numbers, known in (
            ("layer", layers, model.moe_layers),
            ("index", indices, range(model.n_experts)),
        ):
            # Both are short; a range of a billion must not become a list.
            wrong = next((n for n in numbers if n not in known), None)
            if wrong is not None:
                raise ValueError(f"experts: the run has no {what} {wrong} (of {part.strip()!r}); it has {_few(known)}")
        chosen |= {ExpertId(layer, index) for layer in layers for index in indices}
    return tuple(sorted(chosen))


def _read_part(part: str, spec: str) -> tuple[range | None, range | None]:
    """Layers and indices that one part of `spec` names (None: all); ValueError when it names none."""
    layer_text, dot, index_text = part.strip().partition(".")
    try:
        if not dot:
            raise ValueError("no dot")
        return _numbers(layer_text), _numbers(index_text)
    except ValueError as error:
        raise ValueError(
            f"experts: {part.strip()!r} is not layer.index, like 0.0-3 or *.2 (of {spec!r}): {error}"
        ) from None


def _numbers(text: str) -> range | None:
    if text == "*":
        return None
    first, dash, last = text.partition("-")
    low = int(first)
    high = int(last) if dash else low
    if high < low:
        raise ValueError(f"{text} runs backwards")
    return range(low, high + 1)


def _few(known: tuple[int, ...] | range) -> str:
    if isinstance(known, range):
        return f"0-{known[-1]}"
    return ", ".join(map(str, known))
