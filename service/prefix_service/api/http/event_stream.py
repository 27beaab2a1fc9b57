"""Server-sent events: a stream that ends with its reader, its key or its service."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefix_service.api.http.presence import while_connected
from prefix_service.errors import PrefixServiceError

MEDIA_TYPE: Final = "text/event-stream"
STREAM: Final = "stream"
"""In the scope of a request whose answer is a stream: how long it takes says nothing of the service."""

TICK: Final = 0.5
"""Seconds between two looks whether the stream may go on."""

_PING: Final = 15.0  # seconds without an event after which a comment shows that the stream lives


class EventStream(Response):
    """Sends what `events` yields, each with the id that it has. `events` yields None where there is nothing new; then
    it is asked again after `TICK` seconds. The stream ends once `ending` is set, or `require_authority` raises; `place`
    is taken while it lasts."""

    media_type = MEDIA_TYPE

    def __init__(
        self,
        events: AsyncGenerator[tuple[str, bytes] | None, None],
        ending: asyncio.Event,
        require_authority: Callable[[], Awaitable[object]],
        place: contextlib.AbstractContextManager[None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._ending, self._require_authority = events, ending, require_authority
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the stream ends."""
        with self._place:
            scope[STREAM] = True
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        clock = asyncio.get_running_loop().time
        last = clock()
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                if event is not None:
                    await _body(send, b"id: %b\ndata: %b\n\n" % (event[0].encode(), event[1]))
                    last = clock()
                elif clock() - last >= _PING:
                    await _body(send, b":\n\n")
                    last = clock()
                if await self._has_ended():
                    break
        await send({"type": "http.response.body", "body": b""})

    async def _has_ended(self) -> bool:
        try:
            async with asyncio.timeout(TICK):
                await self._ending.wait()
        except TimeoutError:
            try:
                await self._require_authority()
            except PrefixServiceError:
                return True
            return False
        return True


async def _body(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
