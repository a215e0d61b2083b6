"""Keeps one's own record alive in the directory, and takes it back on a clean stop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from moe_net.discovery.base import Discovery
from moe_net.discovery.record import MAX_LIFETIME_S, Identity, sign, sign_withdrawal
from moe_net.errors import MoeNetError
from moe_net.types import ExpertId

log = logging.getLogger(__name__)

# A withdrawal replaces the record only by a later expiry, and a restart must get over the withdrawal's, so it is
# later by little. Unix time in a double is exact to 0.24 us.
_STEP_S = 1e-5

WITHDRAW_S = 3.5
"""Seconds that a withdrawal may take. Members that stop at the same moment do not answer; the DHT finds that in 3 s."""


class Announcer:
    """Announces `experts` at `address` while it is open (`async with`), every `ttl_s` / 3 seconds anew.

    `address` may be a function, which is asked each time; while it raises ValueError, the last one counts.

    Two refreshes may fail before anybody misses the peer. Entering announces once, and raises what that raises;
    leaving withdraws, within `WITHDRAW_S`. The discovery stays the caller's and must be open until then.
    """

    def __init__(
        self,
        discovery: Discovery,
        identity: Identity,
        *,
        run: str,
        address: str | Callable[[], str],
        experts: Sequence[ExpertId],
        ttl_s: float = 30.0,
        clock_s: Callable[[], float] = time.time,
    ) -> None:
        if not 0 < ttl_s <= MAX_LIFETIME_S:
            raise ValueError(f"ttl_s={ttl_s} is not in (0, {MAX_LIFETIME_S:.0f}]")
        self.experts = tuple(sorted(set(experts)))
        """What the record says."""
        self.failures = 0
        """Refreshes that failed, since the start."""
        self._discovery = discovery
        self._identity = identity
        self._run = run
        self._ask_address = address if callable(address) else None
        self.address = "" if callable(address) else address
        """What the record says; of a function, once it has been announced."""
        self._ttl_s = ttl_s
        self._clock_s = clock_s
        self._sequence = 0
        self._expires_at_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self._withdrawn = False
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Announcer:
        await self.announce()
        self._task = asyncio.create_task(self._refresh(), name="announcer")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def announce(self, experts: Sequence[ExpertId] | None = None) -> None:
        """Announce now, with other experts if given. Raises RecordError or DiscoveryError as the discovery does."""
        if experts is not None:
            self.experts = tuple(sorted(set(experts)))
        async with self._turn:
            self._advance(self._ttl_s)
            record = sign(
                self._identity,
                run=self._run,
                address=self._address_now(),
                experts=self.experts,
                sequence=self._sequence,
                expires_at_s=self._expires_at_s,
            )
            await self._discovery.announce(record, peer_id=self._identity.peer_id, expires_at_s=self._expires_at_s)

    async def close(self) -> None:
        """Stop refreshing and withdraw; may be called again. A withdrawal that fails is logged: the record expires."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._withdrawn or self._sequence == 0:
            return
        self._withdrawn = True
        try:
            async with asyncio.timeout(WITHDRAW_S), self._turn:
                self._advance(0.0)
                record = sign_withdrawal(
                    self._identity, run=self._run, sequence=self._sequence, expires_at_s=self._expires_at_s
                )
                await self._discovery.announce(record, peer_id=self._identity.peer_id, expires_at_s=self._expires_at_s)
        except (MoeNetError, OSError, TimeoutError) as error:
            reason = str(error) or f"not everybody answered within {WITHDRAW_S} s"
            log.warning("perhaps not withdrawn, the record expires by itself: %s", reason)

    def _address_now(self) -> str:
        if self._ask_address is not None:
            try:
                address = self._ask_address()
            except ValueError:
                if not self.address:
                    raise
            else:
                if self.address not in ("", address):
                    log.info("this machine is reached at %s now, not at %s", address, self.address)
                self.address = address
        return self.address

    def _advance(self, ttl_s: float) -> None:
        # Milliseconds: a restarted peer with the same key goes on above its former numbers.
        now_s = self._clock_s()
        self._sequence = max(self._sequence + 1, int(now_s * 1000))
        self._expires_at_s = max(self._expires_at_s + _STEP_S, now_s + ttl_s)

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / 3)
            try:
                await self.announce()
            except (MoeNetError, OSError, TimeoutError) as error:
                self.failures += 1
                log.warning("the record was not refreshed: %s", error or type(error).__name__)
