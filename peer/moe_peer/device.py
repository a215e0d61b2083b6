"""One dedicated thread for all work on tensors: the loop stays free, and experts need no locks."""

from __future__ import annotations

import asyncio
import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Generic, NamedTuple, ParamSpec, Self, TypeVar, cast

import torch

from moe_net.errors import DeviceError

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")
LaterT = TypeVar("LaterT", covariant=True)

POLL_S = 20e-6
"""At least, between two looks at a result that is made elsewhere. A thread that waits for it instead cannot give a GPU
the next work meanwhile."""


class Later(ABC, Generic[LaterT]):
    """What a function on the thread may return in place of its result, which something else (a GPU) still makes: the
    thread goes on with other work. Results come in the order of `submit` among them."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether `result` would not wait."""

    @abstractmethod
    def result(self) -> LaterT:
        """Waits for it; raises what it raised."""


class _Work(NamedTuple):
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class DeviceThread:
    """Runs functions one after another, in the order of `submit`, on one thread.

    Cancelling a returned future drops work that has not begun and only the result of work that has: a function is run
    whole or not at all. Not a ThreadPoolExecutor: its future, wrapped into the loop's, costs a call 0.06 ms more.
    """

    def __init__(
        self,
        name: str = "device",
        *,
        check: Callable[[], None] | None = None,
    ) -> None:
        """`check` is run on the thread after work that raised a RuntimeError, and raises one itself when the device
        computes no more: `failed` then raises. A CUDA error like an illegal address stays for as long as the process
        lives."""
        self._name = name
        self._check = check
        self.failure = ""
        """Why it computes no more."""
        self._failed = asyncio.Event()
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(
        self, fn: Callable[ParamsT, ResultT | Later[ResultT]], *args: ParamsT.args, **kwargs: ParamsT.kwargs
    ) -> asyncio.Future[ResultT]:
        """Queue `fn`; the future is of the running loop. RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError(f"the {self._name} thread is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultT] = loop.create_future()
        self._work.put(_Work(loop, future, fn, args, kwargs))
        return future

    async def run(self, fn: Callable[ParamsT, ResultT], *args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
        """`fn(*args, **kwargs)` on the thread: its result, or its exception."""
        return await self.submit(fn, *args, **kwargs)

    def _run(self) -> None:
        begun: deque[_Begun] = deque()
        while True:
            while begun and begun[0].ready():
                self._tell(begun[0].work, begun.popleft().later.result)
            try:
                work = self._work.get(timeout=POLL_S if begun else None)
            except queue.Empty:
                continue
            if work is None:
                break
            if self._closed:
                work.loop.call_soon_threadsafe(work.future.cancel)
            elif not work.future.cancelled():
                later = self._tell(work, partial(work.fn, *work.args, **work.kwargs))
                if later is not None:
                    begun.append(_Begun(work, later))
                    del later
            # An idle thread keeps no tensors alive.
            del work
        for work, later in begun:
            self._tell(work, later.result)

    def _tell(self, work: _Work, make: Callable[[], Any]) -> Later[Any] | None:
        """The work's future gets what `make` returns or raises; unless that comes later."""
        try:
            result = make()
        except BaseException as error:  # noqa: BLE001  (it belongs to whoever awaits the future)
            if isinstance(error, RuntimeError):
                self._look_after(error, work.loop)
            work.loop.call_soon_threadsafe(_settle, work.future, None, error)
        else:
            if isinstance(result, Later):
                return cast("Later[Any]", result)
            work.loop.call_soon_threadsafe(_settle, work.future, result, None)
        finally:
            # An error keeps this frame, and the future keeps the error: without a cycle its arguments go with it.
            del work, make
        return None

    def _look_after(self, error: RuntimeError, loop: asyncio.AbstractEventLoop) -> None:
        """Whether the device still computes after `error`."""
        if self._check is None:
            return
        try:
            self._check()
        except torch.OutOfMemoryError:  # of the check: memory comes back
            pass
        except RuntimeError:
            self._check = None
            self.failure = first_line(error)
            loop.call_soon_threadsafe(self._failed.set)

    async def failed(self) -> None:
        """DeviceError once the device computes no more; waits until then."""
        await self._failed.wait()
        raise DeviceError(f"the device of the experts has failed ({self.failure}): start the peer again")

    async def close(self) -> None:
        """Let what runs finish, drop what waits, end the thread. May be called again."""
        self._closed = True
        self._work.put(None)
        if self._thread is not None:
            # Off the loop: a batch may take a while.
            await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def first_line(error: BaseException) -> str:
    """What torch says, without its advice to programmers."""
    return str(error).partition("\n")[0] or type(error).__name__


class _Begun(NamedTuple):
    work: _Work
    later: Later[Any]

    def ready(self) -> bool:
        try:
            return self.later.ready()
        except RuntimeError:  # of a GPU that has failed: `result` raises it to whom it belongs
            return True


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
