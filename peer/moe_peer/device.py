"""One dedicated thread for all work on tensors: the loop stays free, and experts need no locks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


class DeviceThread:
    """Runs functions one after another, in the order of `submit`, on one thread.

    Cancelling a returned future drops work that has not begun and only the result of work that has: a function is run
    whole or not at all.
    """

    def __init__(self, name: str = "device") -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def submit(
        self, fn: Callable[ParamsT, ResultT], *args: ParamsT.args, **kwargs: ParamsT.kwargs
    ) -> asyncio.Future[ResultT]:
        """Queue `fn`; the future is of the running loop. RuntimeError after `close`."""
        return asyncio.wrap_future(self._pool.submit(fn, *args, **kwargs))

    async def run(self, fn: Callable[ParamsT, ResultT], *args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
        """`fn(*args, **kwargs)` on the thread: its result, or its exception."""
        return await self.submit(fn, *args, **kwargs)

    async def close(self) -> None:
        """Let what runs finish, drop what waits, end the thread. May be called again."""
        # shutdown(wait=True) would hold the loop for as long as a batch takes.
        await asyncio.get_running_loop().run_in_executor(None, lambda: self._pool.shutdown(cancel_futures=True))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
