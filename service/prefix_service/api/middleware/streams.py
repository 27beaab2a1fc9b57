"""Sends streams of events outside of everything that has answered a request."""

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from prefix_service.api.http.event_stream import pending

_OF_FASTAPI: Final = "fastapi_"


class StreamMiddleware:
    """Sends a stream once the route and all that is around it have returned: a stream lasts for hours, and 10,000 of
    them would hold 300 MB more."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, and sends the stream that answers it."""
        await self._app(scope, receive, send)
        if (answer := pending(scope)) is not None:
            for name in [name for name in scope if name.startswith(_OF_FASTAPI)]:
                del scope[name]
            await answer()
