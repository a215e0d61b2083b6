"""A training that is asked to stop: it waits for nobody any more, so that what was learned is saved in time.

Whoever asks (docker stop, a service manager, a host that shuts down) kills after some seconds: docker after 10.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Generator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any, TypeVar

from moe_net.model.remote_moe import Runner
from moe_net.signals import stop_signals

ResultT = TypeVar("ResultT")

STEP_S = 1.0
"""The step at hand has this long to end. One that is given up has changed nothing: its gradients are not committed."""
FETCH_S = 2.0
"""The experts have this long to come for the last checkpoint. Peers that are stopped at the same moment serve on for
that (`moe_peer.server.LINGER_S`)."""


class Waits:
    """Runs coroutines as the given runner does, until it is closed: then every wait ends by a CancelledError, that of
    concurrent.futures."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._running: set[Future[Any]] = set()
        self._closed = False

    def submit(self, work: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        if self._closed:
            work.close()
            raise CancelledError
        future = self._runner.submit(work)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        if self._closed:  # by the loop's thread, in between
            future.cancel()
        return future

    def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close_after(self, delay_s: float) -> None:
        """Returns at once; a signal handler may call it."""
        self._runner.submit(self._close_after(delay_s))

    async def _close_after(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self._closed = True
        for future in list(self._running):
            future.cancel()


class Stop:
    """SIGTERM, SIGINT and SIGHUP of a training.

    Before its steps they interrupt it at once. During them the step at hand has `STEP_S` to end, and whatever else is
    waited for is given up. Of further ones only a SIGINT interrupts what is left to do.
    """

    def __init__(self) -> None:
        self.asked = False
        self.exit_code = 0
        """Exit code of a training that was interrupted: 130 by SIGINT."""
        self._begun = False
        self._waits: Waits | None = None
        self._in_step = False

    def __call__(self, number: int, frame: object) -> None:
        first, self.asked = not self.asked, True
        if not self._begun if first else number == signal.SIGINT:
            self.exit_code = 128 + number if number == signal.SIGINT else 0
            raise KeyboardInterrupt
        if first and self._waits is not None:
            self._waits.close_after(STEP_S if self._in_step else 0)

    @contextmanager
    def installed(self) -> Generator[Stop]:
        numbers = stop_signals()
        before = [signal.signal(number, self) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    @contextmanager
    def ends(self, waits: Waits) -> Generator[None]:
        """While within, a stop closes `waits`; after it there is nothing left to interrupt."""
        self._begun, self._waits = True, waits
        if self.asked:  # and something took the interrupt for its own
            waits.close_after(0)
        try:
            yield
        finally:
            self._waits = None

    @contextmanager
    def at_a_step(self) -> Generator[None]:
        """What runs within is worth waiting for."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
