"""Configuration from TOML and JSON into typed dataclasses, and the manifest that all members of a run share."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from moe_net.model.config import ModelConfig
from moe_net.optim import OptimizerConfig
from moe_net.types import Encoding

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The manifest of a run: what every peer and every trainer must agree on."""

    name: str = "demo"
    """The run's name; records and manifests of other runs are ignored."""
    seed: int = 0
    """Seeds expert initialisation, the trunk and the order of the data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of the trunk and of every expert."""
    global_batch_tokens: int = 2048
    """Committed tokens after which every expert makes a step; the sum over all trainers of one step's tokens."""
    wire: Literal["fp32", "bf16", "fp16", "int8"] = "bf16"
    """Encoding of activations and gradients between trainers and peers."""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """Bytes, or a BPE of up to `model.vocab_size` tokens."""
    tokenizer_sha256: str | None = None
    """SHA-256 of the BPE's file, which `moe-peer tokenizer` makes and every trainer is given. Without it, a run of one
    trainer has a BPE of that trainer's text."""
    record_ttl_s: float = 30.0
    """Life of a peer's record in the DHT; peers refresh it after a third of that."""

    def __post_init__(self) -> None:
        if self.global_batch_tokens < 1:
            raise ValueError("global_batch_tokens must be at least 1")
        if not self.name or not 0 < self.record_ttl_s < float("inf"):
            raise ValueError("name must not be empty, and record_ttl_s positive")
        if self.tokenizer_sha256 is not None:
            if self.tokenizer != "bpe":
                raise ValueError(f'tokenizer_sha256 is of a BPE\'s file, and tokenizer is "{self.tokenizer}"')
            if not re.fullmatch("[0-9a-f]{64}", self.tokenizer_sha256):
                raise ValueError(f"tokenizer_sha256={self.tokenizer_sha256!r} is not 64 hexadecimal digits")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is not in 0..2**63-1")

    def batch_note(self, *, trainers: int, sequences: int) -> str | None:
        """What to know when steps of so many trainers, with so many sequences each, are not the batch that experts step
        with."""
        tokens, batch = trainers * sequences * self.model.seq_len, self.global_batch_tokens
        if tokens == batch:
            return None
        often = f"every {batch / tokens:.3g} steps" if tokens < batch else f"{tokens / batch:.3g} times a step"
        return (
            f"note: trainers={trainers} x sequences={sequences} x seq_len={self.model.seq_len} make {tokens} tokens a "
            f"step, and experts step once global_batch_tokens={batch} are committed: {often}"
        )

    @property
    def wire_encoding(self) -> Encoding:
        return Encoding.parse(self.wire)


def _unexpected(kind: type[Any], values: dict[str, Any], prefix: str) -> Iterator[str]:
    hints = get_type_hints(kind)
    for name, value in values.items():
        known = [f.name for f in dataclasses.fields(kind)]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            yield f"{prefix}{name}: unexpected keyword" + (f" (is {near[0]} meant?)" if near else "")
        elif dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            yield from _unexpected(hints[name], value, f"{prefix}{name}.")
        elif isinstance(value, list):
            kinds = [arg for arg in get_args(hints[name]) if isinstance(arg, type) and dataclasses.is_dataclass(arg)]
            for number, item in enumerate(value):
                if kinds and isinstance(item, dict):
                    yield from _unexpected(kinds[0], item, f"{prefix}{name}.{number}.")


def from_dict(kind: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """`values` as a `kind` (a dataclass); ValueError lists every wrong key as `serve.prot: unexpected keyword`."""
    mistakes = list(_unexpected(kind, values, ""))
    if not mistakes:
        try:
            return TypeAdapter(kind).validate_python(values)
        except ValidationError as error:
            for item in error.errors():
                place = ".".join(str(part) for part in item["loc"])
                # A check of ours: in its own words, without pydantic's before them.
                what = str(item["ctx"]["error"]) if "ctx" in item and item["type"] == "value_error" else item["msg"]
                mistakes.append(f"{place}: {what}" if place else what)
    raise ValueError("; ".join(mistakes))


def load_toml(kind: type[ConfigT], path: Path) -> ConfigT:
    """The TOML file at `path` as a `kind`; ValueError names the file and each wrong key."""
    try:
        return from_dict(kind, tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def to_json(config: object) -> str:
    """A dataclass as JSON, keys in the order of its fields."""
    return TypeAdapter(type(config)).dump_json(config).decode()


def from_json(kind: type[ConfigT], text: str) -> ConfigT:
    """The inverse of `to_json`, with the checks of `from_dict`."""
    values = TypeAdapter(dict[str, Any]).validate_json(text)
    return from_dict(kind, values)
