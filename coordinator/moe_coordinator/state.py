"""What of a coordinator outlives its process: in a folder, the key of its DHT node and the members that it met."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)


class State:
    """See the module's text. The folder is there, and nobody else writes to it."""

    def __init__(self, folder: Path) -> None:
        self.dht_key = folder / "dht.key"
        """The libp2p key; the DHT node makes it when there is none."""
        self._members = folder / "members"
        self._kept: Sequence[str] = ()

    def members(self) -> tuple[str, ...]:
        """Multiaddrs of the members that were met last; none where this is the first time."""
        try:
            return tuple(self._members.read_text(encoding="utf-8", errors="replace").splitlines())
        except FileNotFoundError:
            return ()

    def keep_members(self, members: Sequence[str]) -> None:
        """Write them down, if they are others than the last time; a disk that is full is no reason to end."""
        if not members or members == self._kept:
            return
        unfinished = self._members.with_suffix(".new")
        try:
            unfinished.write_text("".join(f"{member}\n" for member in members), encoding="utf-8")
            os.replace(unfinished, self._members)
        except OSError as error:
            log.warning("the members were not written to %s: %s", self._members, error.strerror)
        self._kept = members
