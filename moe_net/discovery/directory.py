"""The background reader of a run's directory: whoever decides looks at its latest snapshot and never waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from types import TracebackType

from moe_net.discovery.base import Discovery
from moe_net.discovery.crowd import RunExperts
from moe_net.errors import MoeNetError
from moe_net.placement.view import View
from moe_net.types import ExpertId

log = logging.getLogger(__name__)


class DirectoryWatcher:
    """Refreshes a View every `interval_s` seconds while it is open (`async with`).

    A refresh that fails keeps the last view: peers that have really gone are found out by calling them.
    The discovery stays the caller's.
    """

    def __init__(
        self,
        discovery: Discovery,
        *,
        experts: Iterable[ExpertId] | None = None,
        interval_s: float = 5.0,
        on_view: Callable[[View], None] | None = None,
    ) -> None:
        """`experts`: those of the run; the view has no others, whatever a record claims."""
        if interval_s <= 0:
            raise ValueError(f"interval_s={interval_s} must be positive")
        self.failures = 0
        """Refreshes that failed, since the start."""
        self.failures_in_a_row = 0
        """Of those, since the last view."""
        self._discovery = discovery
        self._experts = None if experts is None else RunExperts(experts)
        self._interval_s = interval_s
        self._on_view = on_view
        self._view = View(())
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._published = asyncio.Condition()

    @property
    def view(self) -> View:
        """The latest snapshot; empty before the first. One reference, replaced whole: any thread may read it."""
        return self._view

    async def __aenter__(self) -> DirectoryWatcher:
        self._task = asyncio.create_task(self._watch(), name="directory watcher")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop refreshing; the last view stays readable. May be called again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def refresh_soon(self) -> None:
        """Refresh now instead of after the interval, for example when a peer was seen to fail."""
        self._wake.set()

    async def wait_for(self, predicate: Callable[[View], bool], timeout_s: float | None = None) -> View:
        """The first view that fulfils `predicate`, the current one included; TimeoutError after `timeout_s`."""
        async with asyncio.timeout(timeout_s), self._published:
            await self._published.wait_for(lambda: predicate(self._view))
            return self._view

    async def _watch(self) -> None:
        while True:
            self._wake.clear()
            await self._refresh()
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _refresh(self) -> None:
        try:
            view = View(await self._discovery.peers(self._experts))
        except (MoeNetError, OSError, TimeoutError) as error:
            self.failures += 1
            self.failures_in_a_row += 1
            # The first of a series says it all.
            level = logging.WARNING if self.failures_in_a_row == 1 else logging.DEBUG
            log.log(level, "kept the last view of %d peers: %s", len(self._view.peers), error or type(error).__name__)
            return
        self.failures_in_a_row = 0
        async with self._published:
            self._view = view
            self._published.notify_all()
        if self._on_view is not None:
            self._on_view(view)
