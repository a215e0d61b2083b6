"""Signed records: what is signed comes back, and nothing else does."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from itertools import pairwise
from pathlib import Path

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from moe_net.discovery.layout import (
    MAX_NESTING,
    home_of_entry,
    peer_subkey,
    read_entries,
    shard_key,
    shard_of,
    unpack,
)
from moe_net.discovery.record import (
    MAX_EXPERTS,
    MAX_INDEX,
    MAX_LIFETIME_S,
    MAX_RECORD_BYTES,
    Identity,
    Withdrawn,
    address_fault,
    open_record,
    peer_id_of,
    sign,
    sign_withdrawal,
    to_ranges,
    verify,
)
from moe_net.errors import RecordError
from moe_net.proto.v1 import record_pb2
from moe_net.types import ExpertId, PeerInfo

NOW_S = 1_800_000_000.0
IDENTITY = Identity.generate()
EXPERT_SETS = st.sets(st.builds(ExpertId, st.integers(0, 5), st.integers(0, 40)), max_size=30)


def make(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "run": "r", "address": "127.0.0.1:1", "experts": (ExpertId(0, 1),), "sequence": 3, "expires_at_s": NOW_S + 30,
    }  # fmt: skip
    return sign(IDENTITY, **(fields | changes))  # type: ignore[arg-type]


def signed(**changes: object) -> bytes:
    """A record signed with the right key over whatever payload, as a hostile peer can make it."""
    payload = changes.pop("payload", None)
    if payload is None:
        fields: dict[str, object] = {
            "run": "r", "public_key": IDENTITY.public_key, "address": "127.0.0.1:1", "sequence": 1,
            "expires_at_s": NOW_S + 30,
        }  # fmt: skip
        payload = record_pb2.PeerRecord(**(fields | changes)).SerializeToString(deterministic=True)  # type: ignore[arg-type]
    assert isinstance(payload, bytes)
    signature = IDENTITY.sign(b"moe-net peer record v1\n" + payload)
    return record_pb2.SignedRecord(payload=payload, signature=signature).SerializeToString(deterministic=True)


@given(
    run=st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=128),
    experts=EXPERT_SETS,
    sequence=st.integers(0, 2**64 - 1),
    left_s=st.floats(0.001, MAX_LIFETIME_S),
)
def test_what_is_signed_is_what_is_verified(run: str, experts: set[ExpertId], sequence: int, left_s: float) -> None:
    data = make(run=run, experts=list(experts), sequence=sequence, expires_at_s=NOW_S + left_s)
    said = verify(data, run=run, now_s=NOW_S, peer_id=IDENTITY.peer_id)
    assert said == PeerInfo(
        peer_id=IDENTITY.peer_id,
        address="127.0.0.1:1",
        experts=tuple(sorted(experts)),
        sequence=sequence,
        expires_at_s=NOW_S + left_s,
    )


@given(experts=EXPERT_SETS)
def test_ranges_are_maximal_and_hold_each_expert_once(experts: set[ExpertId]) -> None:
    ranges = to_ranges([*experts, *experts])
    assert [ExpertId(layer, first + i) for layer, first, n in ranges for i in range(n)] == sorted(experts)
    assert all(a[0] != b[0] or a[1] + a[2] < b[1] for a, b in pairwise(ranges))


@given(experts=st.permutations([ExpertId(0, 1), ExpertId(0, 2), ExpertId(1, 0), ExpertId(7, 3)]))
def test_the_order_of_the_experts_does_not_change_a_byte(experts: list[ExpertId]) -> None:
    assert make(experts=experts) == make(experts=sorted(experts))


def test_every_flipped_bit_is_refused() -> None:
    data = make()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError):
            open_record(bytes(changed))


@given(cut=st.integers(0, 150), tail=st.binary(max_size=20))
def test_cut_or_continued_records_are_refused(cut: int, tail: bytes) -> None:
    data = make()
    changed = data[:cut] + tail
    if changed != data:
        with pytest.raises(RecordError):
            open_record(changed)
    if tail:
        with pytest.raises(RecordError):
            open_record(data + tail)


@given(data=st.binary(max_size=300))
def test_junk_is_refused(data: bytes) -> None:
    with pytest.raises(RecordError):
        open_record(data)


def test_a_record_counts_until_it_expires_and_only_in_its_run_and_for_its_peer() -> None:
    data = make()
    assert isinstance(verify(data, run="r", now_s=NOW_S + 29.9), PeerInfo)
    with pytest.raises(RecordError, match=r"expired 0\.0 s ago"):
        verify(data, run="r", now_s=NOW_S + 30)
    with pytest.raises(RecordError, match="another run: 'r', not 'q'"):
        verify(data, run="q", now_s=NOW_S)
    with pytest.raises(RecordError, match="forged record: signed by peer"):
        verify(data, run="r", now_s=NOW_S, peer_id=Identity.generate().peer_id)
    with pytest.raises(RecordError, match="clocks wrong"):
        verify(make(expires_at_s=NOW_S + MAX_LIFETIME_S + 1), run="r", now_s=NOW_S)


def test_a_withdrawal_names_the_peer_and_offers_nothing() -> None:
    data = sign_withdrawal(IDENTITY, run="r", sequence=9, expires_at_s=NOW_S + 1)
    assert verify(data, run="r", now_s=NOW_S) == Withdrawn(peer_id=IDENTITY.peer_id, sequence=9, expires_at_s=NOW_S + 1)
    with pytest.raises(RecordError, match="withdrawal that still offers"):
        open_record(signed(withdrawn=True))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"address": "nowhere"}, "bad address 'nowhere': no port"),
        ({"address": "0.0.0.0:5"}, "unspecified"),
        ({"run": ""}, "run's name"),
        ({"run": "a\nb"}, "printable"),
        ({"expires_at_s": math.nan}, "no expiry"),
        ({"expires_at_s": math.inf}, "no expiry"),
        ({"public_key": b"short"}, "public key of 5 bytes"),
        ({"experts": [record_pb2.ExpertRange(count=2**32 - 1)]}, "4294967295 experts, more than"),
        ({"experts": [record_pb2.ExpertRange(first_index=2**32 - 1, count=1)]}, "out of bounds"),
        ({"experts": [record_pb2.ExpertRange(layer=2**16, count=1)]}, "out of bounds"),
        ({"experts": [record_pb2.ExpertRange()]}, "empty range"),
        ({"experts": [record_pb2.ExpertRange(count=2), record_pb2.ExpertRange(first_index=1, count=2)]}, "ascending"),
        ({"experts": [record_pb2.ExpertRange(count=2), record_pb2.ExpertRange(first_index=2, count=2)]}, "maximal"),
        ({"experts": [record_pb2.ExpertRange(layer=1, count=1), record_pb2.ExpertRange(count=1)]}, "ascending"),
        ({"experts": [record_pb2.ExpertRange(layer=i, count=MAX_EXPERTS) for i in (0, 1)]}, "16384 experts"),
        ({"payload": b"\xff"}, "malformed"),
        ({"payload": b""}, "public key of 0 bytes"),
        ({"payload": record_pb2.PeerRecord(run="r").SerializeToString() + b"\xf8\x01\x01"}, "canonical"),
    ],
)
def test_what_a_hostile_peer_signs_is_refused_with_a_reason(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        open_record(signed(**changes))


def test_a_record_signed_by_another_key_is_forged() -> None:
    with pytest.raises(RecordError, match="forged"):
        open_record(signed(public_key=Identity.generate().public_key))


def test_a_record_that_is_too_large_is_not_even_parsed() -> None:
    with pytest.raises(RecordError, match="too large"):
        open_record(bytes(MAX_RECORD_BYTES + 1))


def test_what_would_be_refused_cannot_be_signed() -> None:
    for changes in (
        {"address": "x"},
        {"run": ""},
        {"experts": [ExpertId(0, MAX_INDEX + 1)]},
        {"experts": [ExpertId(0, -1)]},
        {"experts": [ExpertId(0, 2 * i) for i in range(4000)]},
        {"experts": [ExpertId(0, i) for i in range(MAX_EXPERTS + 1)]},
    ):
        with pytest.raises(ValueError, match=r"cannot announce|bytes, more than"):
            make(**changes)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "peer.example.org:65535", "localhost:80", "[::1]:4000", "under_score:5", "a-b.c:9"]
)
def test_good_addresses(address: str) -> None:
    assert address_fault(address) is None


@pytest.mark.parametrize(
    "address",
    ["", ":", "host", "host:", ":5", "host:0", "host:65536", "host:+5", "host: 5", "host:5 ", "ho st:5", "http://h:5",
     "::1:5", "[::]:5", "[host]:5", "0.0.0.0:5", "256.1.1.1:5", "1.2.3:5", "224.0.0.1:5", "-a:5", "a..b:5", "a:٥",
     "h" * 300 + ":5", "host:5\n", "host\x00:5"],
)  # fmt: skip
def test_bad_addresses(address: str) -> None:
    assert address_fault(address) is not None


def test_an_identity_is_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "identity.pem"
    one = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load_or_create(path).peer_id == one.peer_id == peer_id_of(one.public_key)
    assert len(one.peer_id) == 40
    assert [p.name for p in path.parent.iterdir()] == ["identity.pem"]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604])
def test_an_identity_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.pem"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(ValueError, match=f"mode {mode:04o} lets others read the private key; run: chmod 600"):
        Identity.load_or_create(path)


@pytest.mark.parametrize("mode", [0o444, 0o440, 0o400])
def test_an_identity_may_be_a_secret_of_docker_that_nobody_may_write(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.pem"
    one = Identity.load_or_create(path)
    path.chmod(mode)
    assert Identity.load_or_create(path).peer_id == one.peer_id


def test_an_identity_may_be_a_secret_of_kubernetes_on_a_read_only_file_system_behind_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "..2026").mkdir()
    one = Identity.load_or_create(tmp_path / "..2026" / "key")
    (tmp_path / "..2026" / "key").chmod(0o644)
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "key").symlink_to("..data/key")
    here = os.statvfs(tmp_path)
    read_only = os.statvfs_result((*here[:8], here.f_flag | os.ST_RDONLY, *here[9:]))
    monkeypatch.setattr(os, "fstatvfs", lambda _: read_only)
    assert Identity.load_or_create(tmp_path / "key").peer_id == one.peer_id


def test_a_file_that_is_no_identity_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    other_kind = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content, reason in ((b"junk", "not a private key"), (other_kind, "an Ed25519 key")):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ValueError, match=reason):
            Identity.load_or_create(path)
        assert path.read_bytes() == content


# Where records lie ----------------------------------------------------------------------------------------------


def test_an_entry_has_one_home_and_one_expiry() -> None:
    data, subkey = make(), peer_subkey(IDENTITY.peer_id)
    assert home_of_entry(subkey, data, NOW_S + 30, 16) == shard_key("r", shard_of(IDENTITY.peer_id, 16))
    assert home_of_entry("anything", 5, 0.0, 16) is None
    for arguments in (
        (subkey, data, NOW_S + 31),
        (peer_subkey("ab" * 20), data, NOW_S + 30),
        (subkey, "text", NOW_S + 30),
        (subkey, data[:-1], NOW_S + 30),
    ):
        with pytest.raises(RecordError):
            home_of_entry(*arguments, 16)


def test_reading_sorts_peers_from_withdrawals_and_junk() -> None:
    gone = Identity.generate()
    withdrawal = sign_withdrawal(gone, run="r", sequence=1, expires_at_s=NOW_S + 9)
    entries: list[tuple[object, object]] = [
        (peer_subkey(IDENTITY.peer_id), make()),
        (peer_subkey(gone.peer_id), withdrawal),
        (peer_subkey("ab" * 20), make()),
        (5, b""),
        (peer_subkey("cd" * 20), None),
    ]
    peers, junk = read_entries(entries, run="r", now_s=NOW_S)
    assert [p.peer_id for p in peers] == [IDENTITY.peer_id]
    assert len(junk) == 3


@given(n=st.integers(1, 64), peer_id=st.text("0123456789abcdef", min_size=40, max_size=40))
def test_shards_are_within_their_number(n: int, peer_id: str) -> None:
    assert 0 <= shard_of(peer_id, n) < n


@given(data=st.binary(max_size=60))
def test_unpacking_junk_raises_nothing_but_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        unpack(data)


def test_tuples_in_tuples_are_refused_beyond_a_depth() -> None:
    data = msgpack.packb([1])
    for _ in range(MAX_NESTING):
        data = msgpack.packb([msgpack.ExtType(0x40, data)])
    # Siblings are not within one another.
    value = unpack(msgpack.packb([msgpack.ExtType(0x40, msgpack.packb([i])) for i in range(3 * MAX_NESTING)]))
    assert value == [(i,) for i in range(3 * MAX_NESTING)]
    assert str(unpack(data)).count("(") == MAX_NESTING
    with pytest.raises(ValueError, match="within one another"):
        unpack(msgpack.packb([msgpack.ExtType(0x40, data)]))
