"""Server-sent events: a stream that ends with its reader, its key or its service."""

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefix_service.api.http.presence import while_connected
from prefix_service.api.http.problems import problem
from prefix_service.errors import PrefixServiceError
from prefix_service.library.watching import Watcher

EVENT_STREAM: Final = "text/event-stream"
"""The media type."""

STREAM: Final = "stream"
"""In the scope of a request whose answer is a stream: how long it takes says nothing of the service."""

_PENDING: Final = "pending stream"

Events = AsyncGenerator[bytes, None]
"""Yields events, each as `event` makes them; it ends with the process, or raises where its key has ended."""


class EventStream(Response):
    """Sends what `events` yields until the reader leaves or `events` ends; the reader counts as a watcher while it
    lasts.

    `pending` returns it to `StreamMiddleware`, which sends it.
    """

    def __init__(self, watching: AbstractContextManager[Watcher], events: Callable[[Watcher], Events]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=EVENT_STREAM)
        del self.headers["Content-Length"]
        self._watching, self._events = watching, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Leaves the stream to be sent by who calls `pending`."""
        scope[_PENDING] = partial(self._answer, scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers. Whatever refuses the caller before the first events is answered instead."""
        try:
            with self._watching as watcher:
                async with contextlib.aclosing(self._events(watcher)) as events:
                    first = await anext(events)
                    scope[STREAM] = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await while_connected(receive, _send(first, events, send))
        except PrefixServiceError as error:
            if STREAM in scope:
                raise
            await problem(error)(scope, receive, send)


def pending(scope: Scope) -> Callable[[], Awaitable[None]] | None:
    """Returns what sends the stream that a route has answered with; None if it has answered with anything else."""
    found: Callable[[], Awaitable[None]] | None = scope.pop(_PENDING, None)
    return found


async def _send(first: bytes, events: Events, send: Send) -> None:
    await send({"type": "http.response.body", "body": first, "more_body": True})
    # A caller whose key has ended, or who must read everything again, comes again, and is told why.
    with contextlib.suppress(PrefixServiceError):
        async for more in events:
            await send({"type": "http.response.body", "body": more, "more_body": True})
    await send({"type": "http.response.body"})


def event(position: str, data: bytes) -> bytes:
    """Returns one event. A browser that comes again sends the position of the last one, and goes on from there."""
    return b"id: %b\ndata: %b\n\n" % (position.encode(), data)
