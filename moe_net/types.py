"""Names that every layer shares. Nothing here imports torch, so `--help` stays fast."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


@dataclass(frozen=True, slots=True, order=True)
class ExpertId:
    """One FFN of one MoE layer; written `layer.index`, as in `3.17`."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"


class Activation(StrEnum):
    """The expert's non-linearity: SwiGLU has a gate projection (`d_ff` wide, beside the up one), GELU none."""

    SWIGLU = "swiglu"
    GELU = "gelu"


class Encoding(IntEnum):
    """How a tensor travels; the numbers are those of `moe_net.v1.Encoding`."""

    FP32 = 1
    BF16 = 2
    FP16 = 3
    INT8 = 4

    @classmethod
    def parse(cls, name: str) -> Encoding:
        """The encoding called `name` ("fp32", "bf16", "fp16", "int8"); ValueError names the choices."""
        try:
            return cls[name.upper()]
        except KeyError:
            choices = ", ".join(member.name.lower() for member in cls)
            raise ValueError(f"unknown encoding {name!r}: choose one of {choices}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """Sizes of one expert FFN: `d_model -> d_ff -> d_model`."""

    d_model: int
    """Width of the rows that the expert takes and gives: the run's `expert_width`, which need not be the trunk's."""
    d_ff: int
    activation: Activation = Activation.SWIGLU

    @property
    def d_hidden(self) -> int:
        """Columns of the first projection: gate and up side by side for SwiGLU."""
        return 2 * self.d_ff if self.activation is Activation.SWIGLU else self.d_ff


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """What the swarm knows of one expert server."""

    peer_id: str
    """Hex digest derived from the peer's public key."""
    address: str
    """`host:port` of its ExpertService."""
    experts: tuple[ExpertId, ...]
    """What it hosts, ascending."""
    sequence: int = 0
    """Of the record this was read from; a later record of the same peer has a larger one."""
    expires_at_s: float = float("inf")
    """Unix time after which the record counts no more."""
