"""Where things lie in the DHT, and what may lie there. Pure; knows neither hivemind nor the network.

A peer's record is one entry (subkey `peer:<peer id>`) of one of `shards` dictionaries; which, is a hash of the peer
id. One dictionary for all would sit on its five nearest nodes only and travel in one message (libp2p daemon: 4 MiB
at most); a key per expert would take a look-up for each. `benchmarks/discovery.py` has the figures.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgpack

from moe_net.discovery.record import (
    MAX_LIFETIME_S,
    MAX_RECORD_BYTES,
    MAX_RUN_CHARS,
    Record,
    check,
    open_record,
    run_fault,
)
from moe_net.errors import RecordError

SHARDS = 16
"""Dictionaries of a run's records; every member must use the same number.

Per shard at 1000 peers with 4 experts each 62 records of about 260 bytes: 16 KiB. hivemind asks a node for the
square root of the number of keys at once, so an answer has four shards and stays under 4 MiB up to 60 000 peers.
"""
RUNS_KEY = "moe-net/runs"
"""Dictionary of the names of the runs in this DHT."""
MAX_MANIFEST_BYTES = 256 * 1024
CLOCK_SLACK_S = 30.0
"""An entry may expire so much after the latest expiry there is: hivemind lets members' clocks differ by 3 s."""
# msgpack's head of a text or of bytes.
_HEAD_BYTES = 5
# An answer's share of the libp2p daemon's 4 MiB; the rest is for the addresses that come with it.
_MAX_ANSWER_BYTES = 3840 * 1024
# The longest is a run's, of 128 characters.
_MAX_NAME_BYTES = _HEAD_BYTES + 4 * MAX_RUN_CHARS
# Packed, an entry has an expiry and a few heads beside its name and its value.
_ENTRY_BYTES = 24
_PEER_PREFIX = "peer:"
# hivemind's msgpack extension for a tuple; the only one that members need to understand.
_TUPLE_EXTENSION = 0x40
_NO_SUBKEY = msgpack.packb(None)
_PACKED_TRUE = msgpack.packb(True)
MAX_NESTING = 8
"""Extensions within one another; nothing of ours has one. Each takes some 20 KiB of the C stack to unpack, and a
stack that overflows is no exception but the end of the process."""


def shard_of(peer_id: str, shards: int) -> int:
    """The dictionary a peer's record belongs to."""
    return int.from_bytes(hashlib.sha256(peer_id.encode()).digest()[:8], "big") % shards


def shard_key(run: str, shard: int) -> str:
    """The DHT key of one dictionary of a run's records."""
    return f"moe-net/{run}/peers/{shard}"


def manifest_key(run: str) -> str:
    """The DHT key of a run's manifest."""
    return f"moe-net/{run}/manifest"


def peer_subkey(peer_id: str) -> str:
    """The name of a peer's entry in its dictionary."""
    return _PEER_PREFIX + peer_id


def unpack(data: bytes) -> Any:
    """Plain msgpack (and hivemind's tuples, `MAX_NESTING` within one another at most); ValueError for all else."""
    depth = 0

    def extension(code: int, payload: bytes) -> Any:
        nonlocal depth
        if code != _TUPLE_EXTENSION:
            raise ValueError(f"msgpack extension {code}")
        if depth == MAX_NESTING:
            raise ValueError(f"more than {MAX_NESTING} msgpack extensions within one another")
        depth += 1
        # An error ends it all, so only success has to count down.
        unpacked = tuple(msgpack.unpackb(payload, ext_hook=extension, raw=False))
        depth -= 1
        return unpacked

    try:
        return msgpack.unpackb(data, ext_hook=extension, raw=False)
    except (TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"not msgpack: {error}") from error


def home_of_entry(subkey: object, value: object, expires_at_s: float, shards: int) -> str | None:
    """The key under which an entry must lie, None when it pretends to be nobody's record and may lie anywhere.

    RecordError when it lies: its subkey is a peer's and it is not that peer's signed record, or its expiry is not
    the signed one (a later one would let an old record outlive its successors).
    """
    if not (isinstance(subkey, str) and subkey.startswith(_PEER_PREFIX)):
        return None
    if not isinstance(value, bytes):
        raise RecordError(f"malformed record: a {type(value).__name__}, not bytes")
    record = open_record(value)
    if subkey != peer_subkey(record.peer_id):
        raise RecordError(f"forged record: signed by peer {record.peer_id}, filed under {subkey[:80]!r}")
    if record.expires_at_s != expires_at_s:
        raise RecordError(f"forged record of peer {record.peer_id}: filed with another expiry than it has")
    return shard_key(record.run, shard_of(record.peer_id, shards))


def size_fault(subkey: bytes, value: bytes) -> str | None:
    """Why a packed entry is larger than any of ours; None when it is not. A plain value's subkey is a packed None."""
    most = _HEAD_BYTES + (MAX_MANIFEST_BYTES if subkey == _NO_SUBKEY else MAX_RECORD_BYTES)
    if len(value) > most:
        return f"an entry of {len(value)} bytes, more than {most}"
    return f"a name of {len(subkey)} bytes, more than {_MAX_NAME_BYTES}" if len(subkey) > _MAX_NAME_BYTES else None


def lasts_too_long(expires_at_s: float, now_s: float, slack_s: float = CLOCK_SLACK_S) -> bool:
    """Whether an entry expires later than any of ours may; also when its expiry is no number."""
    return not expires_at_s <= now_s + MAX_LIFETIME_S + slack_s


def is_run_entry(subkey: object, value: bytes) -> bool:
    """Whether an entry (its value packed) belongs into the list of runs."""
    return isinstance(subkey, str) and run_fault(subkey) is None and value == _PACKED_TRUE


def is_peer_subkey(subkey: object) -> bool:
    """Whether an entry pretends to be a peer's record."""
    return isinstance(subkey, str) and subkey.startswith(_PEER_PREFIX)


def entry_bytes(subkey: str, value: bytes) -> int:
    """What an entry adds to a packed dictionary, at most."""
    return len(subkey.encode()) + len(value) + _ENTRY_BYTES


def max_shelf_bytes(shards: int) -> int:
    """Bytes of one dictionary such that as many as hivemind asks for at once fit into one message."""
    return _MAX_ANSWER_BYTES // max(1, math.isqrt(shards))


def read_entries(entries: Iterable[tuple[object, object]], *, run: str, now_s: float) -> tuple[list[Record], list[str]]:
    """The records of live peers among (subkey, value) entries, and for each that is junk what is wrong with it."""
    records: list[Record] = []
    junk: list[str] = []
    for subkey, value in entries:
        if not (isinstance(subkey, str) and subkey.startswith(_PEER_PREFIX) and isinstance(value, bytes)):
            junk.append(f"{str(subkey)[:80]!r} is no peer's record")
            continue
        try:
            record = open_record(value)
            check(record, run=run, now_s=now_s, peer_id=subkey.removeprefix(_PEER_PREFIX))
        except RecordError as error:
            junk.append(str(error))
            continue
        if not record.withdrawn:
            records.append(record)
    return records, junk


def fit_manifest(value: object) -> str | None:
    """`value` if it can be a manifest."""
    return value if isinstance(value, str) and len(value.encode()) <= MAX_MANIFEST_BYTES else None


def live_entries(found: object, now_s: float) -> dict[object, object] | None:
    """Subkey -> value of what hivemind found under a dictionary's key; None when it is not a dictionary.

    Entries are (value, expiration_time); hivemind's own expiry of entries is lazy.
    """
    if not isinstance(found, Mapping):
        return None
    return {subkey: entry.value for subkey, entry in found.items() if entry.expiration_time > now_s}
