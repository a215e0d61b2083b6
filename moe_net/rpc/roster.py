"""Who is there: the directory's word, and our own experience where the directory has lost sight of somebody.

A record lapses when its peer cannot refresh it or we cannot read it: the DHT's nodes may be gone, cut off or asleep
while the peers answer every call. Whoever answers is there. Whoever is not listed and does not answer is not.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_net.placement.view import View
from moe_net.trace import EventSink, FaultEvent


class Roster:
    """The directory's view, and the peers that it lists no more but that are `alive`. Any thread may ask."""

    def __init__(self, directory: Callable[[], View], alive: Callable[[str], bool], on_event: EventSink) -> None:
        self._directory = directory
        self._alive = alive
        self._on_event = on_event
        # One reference, replaced whole: (the directory's view, the ids that are kept, both together).
        self._known: tuple[View, tuple[str, ...], View] = (View(), (), View())

    def view(self) -> View:
        """The snapshot of now."""
        listed, (before, kept_before, known) = self._directory(), self._known
        if listed is before and not kept_before:
            return known
        unlisted = (p for p in known.peers if p not in listed.peers)
        kept = tuple(peer_id for peer_id in unlisted if self._alive(peer_id))
        if listed is before and kept == kept_before:
            return known
        view = View([*listed.peers.values(), *(known.peers[p] for p in kept)]) if kept else listed
        self._known = (listed, kept, view)
        for peer_id in kept:
            if peer_id not in kept_before:
                self._on_event(FaultEvent(what="peer_unlisted", peer=peer_id, action="kept", detail="it still answers"))
        return view
