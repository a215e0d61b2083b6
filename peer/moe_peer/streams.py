"""Calls that may last: each kind has few places of its own, so that idle ones cannot take those of other calls.

gRPC counts every call of a server against one limit (`max_concurrent_calls`), however long it does nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from moe_net.errors import BusyError

MAX_WATCHES = 16
MAX_REFLECTIONS = 4
REFLECTION_TIMEOUT_S = 30.0
"""Of one stream: tools ask some questions and leave."""


class Places:
    """At most `most` calls of a kind at once."""

    def __init__(self, kind: str, most: int) -> None:
        self._kind = kind
        self._most = most
        self.taken = 0

    @contextmanager
    def one(self) -> Generator[None]:
        """A place while within; BusyError when all are taken."""
        if self.taken >= self._most:
            raise BusyError(f"{self._kind}: {self.taken} are on their way, at most {self._most} may be")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


# The stub package knows only the threaded servicers.
class FewWatches(health.aio.HealthServicer):  # pyright: ignore[reportAttributeAccessIssue, reportUntypedBaseClass]
    """gRPC's health service with few watchers."""

    def __init__(self) -> None:
        super().__init__()
        self._places = Places("Watch", MAX_WATCHES)

    async def Watch(self, request: Any, context: Any) -> None:
        try:
            with self._places.one():
                await super().Watch(request, context)
        except BusyError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))


class FewReflections(reflection.aio.ReflectionServicer):  # pyright: ignore[reportAttributeAccessIssue, reportUntypedBaseClass]
    """gRPC's reflection with few streams, that end."""

    def __init__(self, services: Iterable[str], *, timeout_s: float = REFLECTION_TIMEOUT_S) -> None:
        super().__init__(services)
        self._places = Places("reflection", MAX_REFLECTIONS)
        self._timeout_s = timeout_s

    async def ServerReflectionInfo(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        # Not a generator: while one waits for its answer to be taken, its time-outs cannot end it.
        try:
            with self._places.one():
                async with asyncio.timeout(self._timeout_s):
                    async for answer in super().ServerReflectionInfo(request_iterator, context):
                        await context.write(answer)
        except BusyError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except TimeoutError:
            detail = f"reflection: a stream may last {self._timeout_s:.0f} s"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, detail)
