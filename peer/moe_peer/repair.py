"""Experts whose weights are not finite (a bit that flipped, a device that failed) come back from whoever has them.

Until then no call runs on them here (`ExpertHost.broken`), the others serve on, and the record leaves them out, so that
trainers mask them or go to other replicas.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from torch import Tensor

from moe_net.discovery.announcer import Announcer
from moe_net.errors import CheckpointError, MoeNetError
from moe_net.experts.host import ExpertHost
from moe_net.placement.view import View
from moe_net.rpc.base import CallError, ExpertTransport
from moe_net.types import ExpertId
from moe_net.wire.state import split_name

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks at what is broken."""
FETCH_S = 60.0
"""For the state of a layer's broken experts from one replica."""
MAX_PAUSE_S = 60.0
"""Between two attempts when nobody has them."""

FromCheckpoint = Callable[[int], dict[str, Tensor]]
"""Layer -> the state that this peer began with; empty when it has none."""


class Repair:
    """Restores broken experts; `run` it as long as its host serves."""

    def __init__(
        self,
        host: ExpertHost,
        run_on_device: Callable[..., Awaitable[Any]],
        announcer: Announcer,
        transport: ExpertTransport,
        view: Callable[[], Awaitable[View]],
        from_checkpoint: FromCheckpoint,
        *,
        own_id: str,
        look_s: float = LOOK_S,
    ) -> None:
        """`view`: who hosts what, asked for when something is broken."""
        self._host = host
        self._run = run_on_device
        self._announcer = announcer
        self._transport = transport
        self._view = view
        self._from_checkpoint = from_checkpoint
        self._own_id = own_id
        self._look_s = look_s

    async def run(self) -> None:
        """For ever."""
        experts, pause_s = self._host.experts, self._look_s
        while True:
            await asyncio.sleep(pause_s)
            broken = self._host.broken
            if not broken and set(self._announcer.experts) == set(experts):
                pause_s = self._look_s
                continue
            for layer in sorted({expert.layer for expert in broken}):
                await self._restore(layer, [expert for expert in broken if expert.layer == layer])
            await self._announce([expert for expert in experts if expert not in self._host.broken])
            pause_s = min(MAX_PAUSE_S, 2 * pause_s) if self._host.broken else self._look_s

    async def _announce(self, experts: Iterable[ExpertId]) -> None:
        try:
            await self._announcer.announce(tuple(experts))
        except (MoeNetError, OSError, TimeoutError) as error:  # its own refresh comes soon
            log.warning("the record was not changed: %s", error or type(error).__name__)

    async def _restore(self, layer: int, broken: list[ExpertId]) -> None:
        view = await self._view()
        for peer_id, peer in view.peers.items():
            there = [expert.index for expert in broken if expert in peer.experts]
            if peer_id == self._own_id or not there:
                continue
            try:
                state = await self._transport.fetch(peer, layer, there, timeout_s=FETCH_S)
            except CallError as error:
                log.warning("restoring experts of layer %d: %s", layer, error)
                continue
            broken = await self._adopt(layer, broken, state, f"peer {peer_id}")
            if not broken:
                return
        try:
            state = await asyncio.to_thread(self._from_checkpoint, layer)
        except CheckpointError as error:
            log.warning("restoring experts of layer %d: %s", layer, error)
            return
        left = await self._adopt(layer, broken, state, "the checkpoint that it was started with")
        if left:
            log.error("nobody has experts %s, which are not finite here", ", ".join(map(str, left)))

    async def _adopt(self, layer: int, broken: list[ExpertId], state: dict[str, Tensor], source: str) -> list[ExpertId]:
        """Those that are still broken."""
        wanted = {str(expert) for expert in broken}
        mine = {name: value for name, value in state.items() if split_name(name)[0] in wanted}
        if not mine:
            return broken
        try:
            await self._run(self._host.replace_state, layer, mine)
        except MoeNetError as error:
            log.warning("restoring experts of layer %d from %s: %s", layer, source, error)
            return broken
        left = [expert for expert in broken if expert in self._host.broken]
        log.warning("experts of layer %d were restored from %s: %d", layer, source, len(broken) - len(left))
        return left
