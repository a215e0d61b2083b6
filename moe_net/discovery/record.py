"""Signed peer records: what a peer says of itself, provable by its key and good until a moment.

A peer id is the SHA-256 of the peer's Ed25519 public key, so a record proves by itself whose it is. The encoding
is canonical: there is one sequence of bytes for one record, and whatever differs in a bit is refused.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from google.protobuf.message import DecodeError

from moe_net.errors import RecordError
from moe_net.proto.v1 import record_pb2
from moe_net.types import ExpertId, PeerInfo

MAX_RECORD_BYTES = 16 * 1024
"""A record with 1000 experts of which no two are neighbours has about 9 KiB."""
MAX_EXPERTS = 8192
"""Experts in one record; checked on the counts of the ranges, before one ExpertId exists."""
MAX_LAYER = 2**16 - 1
MAX_INDEX = 2**20 - 1
MAX_LIFETIME_S = 3600.0
"""A record may not expire later than this from now: a stolen or mistaken one must go away by itself."""
MAX_RUN_CHARS = 128

PUBLIC_KEY_BYTES = 32
PEER_ID_CHARS = 40
# Deriving a signature check costs about 0.1 ms; a refresh sees each record once per replica and most of them
# unchanged since the last refresh.
_REMEMBERED_SIGNATURES = 4096
_PAYLOAD_CONTEXT = b"moe-net peer record v1\n"
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*\.?")  # fmt: skip  # noqa: E501
_PORT = re.compile(r"[1-9][0-9]{0,4}")


class Identity:
    """A peer's Ed25519 key. `peer_id` is 40 hex digits of the SHA-256 of the public key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()
        self.peer_id = peer_id_of(self.public_key)

    @classmethod
    def generate(cls) -> Identity:
        """A new key from the system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Identity:
        """The key in the PEM file at `path`; ValueError when it is not an Ed25519 key, or others may read it and the
        owner may write it. What nobody may write is a secret as Docker (0444, 0440) and Kubernetes (a read-only file
        system) mount it: as private as the container."""
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            read_only = not mode & 0o222 or os.fstatvfs(file.fileno()).f_flag & os.ST_RDONLY
            if mode & 0o077 and not read_only:
                raise ValueError(f"{path}: mode {mode:04o} lets others read the private key; run: chmod 600 {path}")
            pem = file.read(MAX_RECORD_BYTES)
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ValueError(f"{path}: not a private key in PEM without a password: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{path}: a {type(key).__name__}, but a peer's identity is an Ed25519 key")
        return cls(key)

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The key at `path`, or a new one written there with mode 0600. Of several processes one creates it."""
        if path.exists():
            return cls.load(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        pem = cls.generate()._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        # mkstemp makes the file with mode 0600; the link appears at once with its whole content, or not at all.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(pem)
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
        return cls.load(path)

    def sign(self, data: bytes) -> bytes:
        """The 64 bytes of the Ed25519 signature (RFC 8032) of `data`."""
        return self._key.sign(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record whose signature holds; whether it counts now and here is `check`'s business."""

    run: str
    peer_id: str
    public_key: bytes
    address: str
    ranges: tuple[tuple[int, int, int], ...]
    """(layer, first index, count) of the experts, ascending."""
    sequence: int
    expires_at_s: float
    withdrawn: bool

    @property
    def experts(self) -> tuple[ExpertId, ...]:
        """All that it claims, up to `MAX_EXPERTS`; ascending."""
        return tuple(ExpertId(layer, first + i) for layer, first, count in self.ranges for i in range(count))

    def peer_info(self, experts: tuple[ExpertId, ...]) -> PeerInfo:
        """The peer, with these of its experts."""
        return PeerInfo(
            peer_id=self.peer_id,
            address=self.address,
            experts=experts,
            sequence=self.sequence,
            expires_at_s=self.expires_at_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawn:
    """A peer's word that it is gone."""

    peer_id: str
    sequence: int
    expires_at_s: float


def peer_id_of(public_key: bytes) -> str:
    """The peer id that belongs to a raw Ed25519 public key."""
    return hashlib.sha256(public_key).hexdigest()[:PEER_ID_CHARS]


def address_fault(address: str) -> str | None:
    """Why `address` is not a `host:port` (or `[ipv6]:port`) that somebody could call; None when it is one."""
    host, colon, port = address.rpartition(":")
    if not colon:
        return "no port"
    if not _PORT.fullmatch(port) or int(port) > 65535:
        return "port is not in 1..65535"
    if host.startswith("[") and host.endswith("]"):
        host, is_v6 = host[1:-1], True
    else:
        is_v6 = False
    try:
        ip = ipaddress.IPv6Address(host) if is_v6 else ipaddress.IPv4Address(host)
    except ValueError:
        return None if not is_v6 and _is_name(host) else "host is neither a name nor an IP address"
    return "an unspecified or multicast address cannot be called" if ip.is_unspecified or ip.is_multicast else None


def _is_name(host: str) -> bool:
    # A name whose last label is a number would be an IPv4 address by the rules of the web, and is not one.
    return bool(_HOST_NAME.fullmatch(host)) and not host.rstrip(".").rpartition(".")[2].isdigit()


def run_fault(run: str) -> str | None:
    """Why `run` cannot name a run; None when it can."""
    if not 1 <= len(run) <= MAX_RUN_CHARS:
        return f"a run's name has 1..{MAX_RUN_CHARS} characters"
    return None if run.isprintable() else "a run's name is printable"


def to_ranges(experts: Iterable[ExpertId]) -> list[tuple[int, int, int]]:
    """(layer, first index, count) of the maximal ranges, ascending; duplicates count once."""
    ranges: list[tuple[int, int, int]] = []
    for expert in sorted(set(experts)):
        if ranges:
            layer, first, count = ranges[-1]
            if expert.layer == layer and expert.index == first + count:
                ranges[-1] = (layer, first, count + 1)
                continue
        ranges.append((expert.layer, expert.index, 1))
    return ranges


def sign(
    identity: Identity, *, run: str, address: str, experts: Sequence[ExpertId], sequence: int, expires_at_s: float
) -> bytes:
    """A record (serialized SignedRecord) that `identity` serves `experts` of `run` at `address` until `expires_at_s`.

    ValueError when `verify` would refuse it whatever the time.
    """
    fault = address_fault(address) or run_fault(run)
    if fault:
        raise ValueError(f"cannot announce address {address!r} in run {run!r}: {fault}")
    return _sign(identity, run, address, experts, sequence, expires_at_s, withdrawn=False)


def sign_withdrawal(identity: Identity, *, run: str, sequence: int, expires_at_s: float) -> bytes:
    """A record that `identity` has left `run`; it must outlive the record that it takes back."""
    return _sign(identity, run, "", (), sequence, expires_at_s, withdrawn=True)


def _sign(
    identity: Identity,
    run: str,
    address: str,
    experts: Sequence[ExpertId],
    sequence: int,
    expires_at_s: float,
    *,
    withdrawn: bool,
) -> bytes:
    ranges = to_ranges(experts)
    fault = _ranges_fault(ranges)
    if fault:
        raise ValueError(f"cannot announce {len(experts)} experts: {fault}")
    message = record_pb2.PeerRecord(
        run=run,
        public_key=identity.public_key,
        address=address,
        experts=[record_pb2.ExpertRange(layer=layer, first_index=first, count=n) for layer, first, n in ranges],
        sequence=sequence,
        expires_at_s=expires_at_s,
        withdrawn=withdrawn,
    )
    payload = message.SerializeToString(deterministic=True)
    signed = record_pb2.SignedRecord(payload=payload, signature=identity.sign(_PAYLOAD_CONTEXT + payload))
    data = signed.SerializeToString(deterministic=True)
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(
            f"the record of {len(experts)} experts has {len(data)} bytes, more than {MAX_RECORD_BYTES}: "
            "host experts with neighbouring indices, they travel as ranges"
        )
    return data


def _ranges_fault(ranges: Sequence[tuple[int, int, int]]) -> str | None:
    total = sum(count for _, _, count in ranges)
    if total > MAX_EXPERTS:
        return f"{total} experts, more than {MAX_EXPERTS}"
    previous: tuple[int, int] | None = None
    for layer, first, count in ranges:
        if count < 1:
            return "an empty range"
        if not (0 <= layer <= MAX_LAYER and 0 <= first <= MAX_INDEX and first + count - 1 <= MAX_INDEX):
            return f"layer {layer} or index {first}..{first + count - 1} out of bounds"
        # Ascending with a gap: one set of experts has one encoding.
        if previous is not None and (layer, first) <= previous:
            return "ranges are not ascending and maximal"
        previous = (layer, first + count)
    return None


@lru_cache(maxsize=_REMEMBERED_SIGNATURES)
def _check_signature(public_key: bytes, signature: bytes, payload: bytes) -> None:
    # Only successes are remembered: an exception leaves nothing in the cache.
    Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _PAYLOAD_CONTEXT + payload)


def open_record(data: bytes) -> Record:
    """The record in `data` if it is well-formed and its signature holds, whatever the run and the time; RecordError."""
    if len(data) > MAX_RECORD_BYTES:
        raise RecordError(f"record too large: {len(data)} bytes, more than {MAX_RECORD_BYTES}")
    try:
        signed = record_pb2.SignedRecord.FromString(data)
        message = record_pb2.PeerRecord.FromString(signed.payload)
    except DecodeError as error:
        raise RecordError(f"malformed record: {error}") from error
    # protobuf keeps unknown fields and would write them again: bytes that no signature covers.
    signed.DiscardUnknownFields()
    message.DiscardUnknownFields()
    canonical = message.SerializeToString(deterministic=True) == signed.payload
    if not canonical or signed.SerializeToString(deterministic=True) != data:
        raise RecordError("malformed record: not in canonical encoding, or with unknown fields")
    if len(message.public_key) != PUBLIC_KEY_BYTES:
        raise RecordError(f"malformed record: a public key of {len(message.public_key)} bytes")
    try:
        _check_signature(message.public_key, signed.signature, signed.payload)
    except (InvalidSignature, ValueError) as error:
        raise RecordError("forged record: its signature does not match its key") from error
    peer_id = peer_id_of(message.public_key)
    ranges = [(r.layer, r.first_index, r.count) for r in message.experts]
    fault = run_fault(message.run) or _ranges_fault(ranges)
    if fault is None and not math.isfinite(message.expires_at_s):
        fault = "no expiry"
    if fault is None and message.withdrawn and (message.address or ranges):
        fault = "a withdrawal that still offers something"
    if fault is None and not message.withdrawn:
        address_problem = address_fault(message.address)
        fault = None if address_problem is None else f"bad address {message.address[:80]!r}: {address_problem}"
    if fault is not None:
        raise RecordError(f"malformed record of peer {peer_id}: {fault}")
    return Record(
        run=message.run,
        peer_id=peer_id,
        public_key=message.public_key,
        address=message.address,
        ranges=tuple(ranges),
        sequence=message.sequence,
        expires_at_s=message.expires_at_s,
        withdrawn=message.withdrawn,
    )


def check(record: Record, *, run: str, now_s: float, peer_id: str | None = None) -> None:
    """RecordError when an opened record says nothing in `run` at Unix time `now_s`."""
    if peer_id is not None and record.peer_id != peer_id:
        raise RecordError(f"forged record: signed by peer {record.peer_id}, filed under {peer_id[:80]!r}")
    if record.run != run:
        raise RecordError(f"record of peer {record.peer_id} is of another run: {record.run!r}, not {run!r}")
    if record.expires_at_s <= now_s:
        raise RecordError(f"record of peer {record.peer_id} expired {now_s - record.expires_at_s:.1f} s ago")
    if record.expires_at_s > now_s + MAX_LIFETIME_S:
        raise RecordError(
            f"record of peer {record.peer_id} expires in {record.expires_at_s - now_s:.0f} s, "
            f"more than {MAX_LIFETIME_S:.0f} s from now: is one of the two clocks wrong?"
        )


def verify(data: bytes, *, run: str, now_s: float, peer_id: str | None = None) -> PeerInfo | Withdrawn:
    """What the bytes of a record say in `run` at Unix time `now_s`.

    `peer_id`, when given, is whose record it must be. RecordError gives the reason: too large, malformed (also a
    bad address or absurd expert ranges), forged, of another run, expired, or too far in the future.
    """
    record = open_record(data)
    check(record, run=run, now_s=now_s, peer_id=peer_id)
    if record.withdrawn:
        return Withdrawn(peer_id=record.peer_id, sequence=record.sequence, expires_at_s=record.expires_at_s)
    return record.peer_info(record.experts)
