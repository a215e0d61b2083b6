"""What a member of the DHT unpacks, believes and keeps of what strangers send: hivemind by itself takes anything."""

from __future__ import annotations

import logging
import warnings
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from moe_net.discovery import layout
from moe_net.discovery.layout import MAX_NESTING, shard_key
from moe_net.errors import RecordError

with warnings.catch_warnings():
    # hivemind compiles two functions with torch.jit.script, which torch has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from hivemind.dht.routing import DHTID
    from hivemind.dht.validation import DHTRecord, RecordValidatorBase
    from hivemind.utils import MSGPackSerializer
    from hivemind.utils.logging import use_hivemind_log_handler

# hivemind's import renames the level WARNING, gives its loggers a handler of their own and cuts them off from ours.
# Its INFO tells about every socket.
use_hivemind_log_handler("nowhere")
logging.addLevelName(logging.WARNING, "WARNING")
logging.getLogger("hivemind").setLevel(logging.WARNING)

log = logging.getLogger(__name__)

# Of the thread or task that unpacks.
_nesting: ContextVar[int] = ContextVar("nesting", default=0)
_decode_extension = MSGPackSerializer._decode_ext_types


def _decode_within_limit(code: int, payload: bytes) -> Any:
    depth = _nesting.get()
    if depth == MAX_NESTING:
        raise ValueError(f"more than {MAX_NESTING} msgpack extensions within one another")
    token = _nesting.set(depth + 1)
    try:
        return _decode_extension(code, payload)
    finally:
        _nesting.reset(token)


def limit_nesting() -> None:
    """Have hivemind unpack no more than `MAX_NESTING` extensions within one another. Harmless when done again.

    A dictionary, sent to be stored or as an answer, is unpacked by hivemind before any validator sees it, each level
    by another call of msgpack's C code: a kilobyte of them overflows the stack and ends the process. The ValueError
    is one of those that hivemind survives: its handler of a store answers with an error, and its caller of a find
    takes the node for one that did not answer.
    """
    MSGPackSerializer._decode_ext_types = staticmethod(_decode_within_limit)


class Validator(RecordValidatorBase):
    """What this node keeps for others and believes from them.

    hivemind drops a whole dictionary that has one invalid entry, so an entry that pretends nothing (no peer's
    subkey) is let through here and skipped by the reader. Values that do not unpack are refused for every key:
    hivemind's search never ends after meeting one.
    """

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self._own_keys = frozenset[bytes]()

    def guard(self, run: str) -> None:
        """Refuse plain values at the run's keys: one with a late expiry would wipe a dictionary."""
        self._own_keys = frozenset(_key_bytes(shard_key(run, shard)) for shard in range(self._shards))

    def validate(self, record: DHTRecord) -> bool:
        try:
            subkey, value = layout.unpack(record.subkey), layout.unpack(record.value)
            home = layout.home_of_entry(subkey, value, record.expiration_time, self._shards)
        except (ValueError, RecordError) as error:
            log.debug("refused an entry: %s", error)
            return False
        if home is not None:
            return record.key == _key_bytes(home)
        return subkey is not None or record.key not in self._own_keys


@lru_cache(maxsize=1024)
def _key_bytes(key: str) -> bytes:
    return DHTID.generate(key).to_bytes()
