"""What a member of the DHT unpacks, believes and keeps of what strangers send: hivemind by itself takes anything."""

from __future__ import annotations

import logging
import math
import time
import warnings
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, ClassVar

from moe_net.discovery import layout
from moe_net.discovery.layout import CLOCK_SLACK_S, MAX_NESTING, RUNS_KEY, manifest_key, shard_key
from moe_net.errors import RecordError

with warnings.catch_warnings():
    # hivemind compiles two functions with torch.jit.script, which torch has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from hivemind.dht.routing import DHTID
    from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
    from hivemind.dht.validation import DHTRecord, RecordValidatorBase
    from hivemind.utils import MSGPackSerializer
    from hivemind.utils.logging import use_hivemind_log_handler
    from hivemind.utils.timed_storage import TimedStorage, ValueWithExpiration

# hivemind's import renames the level WARNING, gives its loggers a handler of their own and cuts them off from ours.
# Its INFO tells about every socket.
use_hivemind_log_handler("nowhere")
logging.addLevelName(logging.WARNING, "WARNING")
logging.getLogger("hivemind").setLevel(logging.WARNING)

log = logging.getLogger(__name__)

# Counted for a key beside its value: bounds the number of keys as well.
_KEY_BYTES = 16 * 1024

# Of the thread or task that unpacks.
_nesting: ContextVar[int] = ContextVar("nesting", default=0)
_decode_extension = MSGPackSerializer._decode_ext_types  # pyright: ignore[reportPrivateUsage]


def _decode_within_limit(type_code: int, data: bytes) -> Any:
    depth = _nesting.get()
    if depth == MAX_NESTING:
        raise ValueError(f"more than {MAX_NESTING} msgpack extensions within one another")
    token = _nesting.set(depth + 1)
    try:
        decoded = _decode_extension(type_code, data)
    finally:
        _nesting.reset(token)
    if isinstance(decoded, DictionaryDHTValue):
        # The sender's word, of any type, which the reader would compare with numbers and apply to what others have.
        decoded.maxsize = math.inf
    return decoded


def limit_nesting() -> None:
    """Have hivemind unpack no more than `MAX_NESTING` extensions within one another. Harmless when done again.

    A dictionary, sent to be stored or as an answer, is unpacked by hivemind before any validator sees it, each level
    by another call of msgpack's C code: a kilobyte of them overflows the stack and ends the process. The ValueError
    is one of those that hivemind survives: its handler of a store answers with an error, and its caller of a find
    takes the node for one that did not answer.
    """
    MSGPackSerializer._decode_ext_types = staticmethod(_decode_within_limit)  # pyright: ignore[reportPrivateUsage]


class Validator(RecordValidatorBase):
    """What this node believes, of whom it asks and of who stores with it; what it keeps is `Store`'s to say.

    hivemind drops a whole dictionary that has one invalid entry, so an entry that pretends nothing (no peer's
    subkey) is let through here and skipped by the reader. Values that do not unpack are refused for every key, as
    are names of entries that are no text: hivemind's search never ends after meeting one.
    """

    def __init__(self, shards: int) -> None:
        self.shards = shards
        self.shelf_keys = frozenset([_key_bytes(RUNS_KEY)])
        """Keys of this node's own run and of the list of runs under which dictionaries lie."""
        self.manifest_keys = frozenset[bytes]()

    def guard(self, run: str) -> None:
        """Refuse at the run's keys what does not lie there: with a late expiry it would hide what does."""
        shelves = (RUNS_KEY, *(shard_key(run, shard) for shard in range(self.shards)))
        self.shelf_keys = frozenset(map(_key_bytes, shelves))
        self.manifest_keys = frozenset([_key_bytes(manifest_key(run))])

    def validate(self, record: DHTRecord) -> bool:
        fault = layout.size_fault(record.subkey, record.value)
        # Twice what `Store` grants: an entry it took by a clock that is a little ahead does not spoil a dictionary.
        if fault is None and layout.lasts_too_long(record.expiration_time, time.time(), 2 * CLOCK_SLACK_S):
            fault = f"an entry that expires at {record.expiration_time}"
        if fault is not None:
            log.debug("refused an entry: %s", fault)
            return False
        try:
            subkey, value = layout.unpack(record.subkey), layout.unpack(record.value)
            home = layout.home_of_entry(subkey, value, record.expiration_time, self.shards)
        except (ValueError, RecordError) as error:
            log.debug("refused an entry: %s", error)
            return False
        if home is not None:
            return record.key == _key_bytes(home)
        if subkey is None:
            # There are no plain values but manifests.
            return record.key not in self.shelf_keys and layout.fit_manifest(value) is not None
        return isinstance(subkey, str) and record.key not in self.manifest_keys


class Store(DHTLocalStorage):
    """What this node keeps for others: `Validator` has seen it, but lets pass what is only to be skipped.

    A stranger must neither fill the memory nor a dictionary. An answer has several dictionaries and must fit into
    one message, or the reader gets nothing; so one that is full takes no new entries until others expire, and only
    refreshes of those it has. Beside those of the own run there is `OTHERS_BYTES` for all keys together.

    `get` gives a copy of a dictionary: hivemind's reader merges what others answer into what it got from here.
    """

    OTHERS_BYTES: ClassVar[int] = 64 * 2**20

    def __init__(self, validator: Validator) -> None:
        super().__init__()
        self._validator = validator
        self._runs_key = _key_bytes(RUNS_KEY)
        # Of all keys but those of the own run.
        self._bytes: dict[DHTID, int] = {}

    def get(self, key: DHTID) -> ValueWithExpiration[Any] | None:
        held: Any = super().get(key)
        if held is None or not isinstance(held.value, DictionaryDHTValue):
            return held
        copy = DictionaryDHTValue()
        # Drops what has expired, so that a full dictionary shrinks.
        copy.data = dict(held.value.items())
        copy.key_to_heap, copy.expiration_heap = dict(held.value.key_to_heap), list(held.value.expiration_heap)
        copy.latest_expiration_time = held.value.latest_expiration_time
        return ValueWithExpiration(copy, held.expiration_time)

    def store(self, key: DHTID, value: bytes, expiration_time: float, subkey: object = None) -> bool:
        """Whether a plain value (or with `subkey` an entry) was taken; not when one is there that expires later."""
        if subkey is not None:
            return self.store_subkey(key, subkey, value, expiration_time)
        held: Any = super().get(key)
        if layout.lasts_too_long(expiration_time, time.time()):
            return False
        # A dictionary has signed records, and is no manifest's place.
        if held is not None and (isinstance(held.value, DictionaryDHTValue) or held.expiration_time >= expiration_time):
            return False
        return self._has_room(key, len(value)) and self._put(key, value, expiration_time)

    def store_subkey(self, key: DHTID, subkey: object, value: bytes, expiration_time: float) -> bool:
        """Whether an entry of a dictionary was taken; not when one is there that expires later."""
        listed = key.to_bytes() == self._runs_key
        wanted = layout.is_run_entry(subkey, value) if listed else layout.is_peer_subkey(subkey)
        if not wanted or not isinstance(subkey, str) or layout.lasts_too_long(expiration_time, time.time()):
            return False
        held: Any = super().get(key)
        # A record is signed for this place: a plain value here is nobody's.
        if held is not None and not isinstance(held.value, DictionaryDHTValue):
            held = None
        shelf: Any = DictionaryDHTValue() if held is None else held.value
        known = shelf.get(subkey)
        # hivemind would take the older one's expiry for that of the newer one, and drop it too early.
        if known is not None and known.expiration_time >= expiration_time:
            return False
        size = sum(layout.entry_bytes(name, entry.value) for name, entry in shelf.items())
        added = layout.entry_bytes(subkey, value) - (0 if known is None else layout.entry_bytes(subkey, known.value))
        if known is None and size + added > layout.max_shelf_bytes(self._validator.shards):
            return False
        if not self._has_room(key, size + added) or not shelf.store(subkey, value, expiration_time):
            return False
        if held is None:
            del self[key]
        elif expiration_time <= held.expiration_time:
            return True
        return self._put(key, shelf, expiration_time)

    def _put(self, key: DHTID, value: Any, expiration_time: float) -> bool:
        # Past DHTLocalStorage, which has no rules but those above.
        return TimedStorage.store(self, key, value, expiration_time)

    def _has_room(self, key: DHTID, size: int) -> bool:
        key_bytes = key.to_bytes()
        if key_bytes in self._validator.shelf_keys or key_bytes in self._validator.manifest_keys:
            return True
        self._bytes = {kept: n for kept, n in self._bytes.items() if kept in self.data and kept != key}
        if sum(self._bytes.values()) + size > self.OTHERS_BYTES:
            return False
        self._bytes[key] = size + _KEY_BYTES
        return True


class NoCache(DHTLocalStorage):
    """hivemind's cache, which others may fill, and which answers instead of the store when it expires later."""

    def store(self, key: DHTID, value: bytes, expiration_time: float, subkey: object = None) -> bool:
        """Nothing is kept."""
        return False

    def store_subkey(self, key: DHTID, subkey: object, value: bytes, expiration_time: float) -> bool:
        """Nothing is kept."""
        return False


@lru_cache(maxsize=1024)
def _key_bytes(key: str) -> bytes:
    return DHTID.generate(key).to_bytes()
