"""One process that serves: uvicorn's `Server`, whose app fails and ends in this project's words."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Final, NoReturn

import uvicorn
from fastapi import FastAPI

from prefix_service.api.server.accepting import Acceptor
from prefix_service.api.server.connections import KEEP_ALIVE
from prefix_service.api.server.protocols import connection_class
from prefix_service.settings import Settings

GRACE: Final = 30
"""Seconds that requests under way have once the service is asked to end."""

_SWITCH: Final = 0.001
"""Seconds after which a thread that computes hands Python's lock to the event loop, which asks for it again after each
operation of torch; Python's own 5 ms, ten times in an answer, are a neighbour's latency."""


class Server(uvicorn.Server):
    """Serves an app on sockets that listen already; `on_ready` is called on the event loop once the app is open.

    The server opens the app itself. uvicorn would log a traceback where the app cannot open, and hide the reason.
    """

    def __init__(self, settings: Settings, app: FastAPI, on_ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            http=connection_class(settings),
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE,
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # nothing here asks who the caller was, or by which scheme he came
            server_header=False,
            timeout_graceful_shutdown=GRACE,
        )
        super().__init__(config)
        self._app, self._on_ready = app, on_ready
        self._opened = contextlib.AsyncExitStack()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the app, then accept connections.

        Raises:
            PrefixServiceError: the app cannot open, for the reason that it gives.
        """
        sys.setswitchinterval(_SWITCH)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._app.router.lifespan_context(self._app))
            self._app.openapi()  # takes 0.2 s: the first who asks for the document does not stop the loop for it
            await super().startup([])
            self._acceptor = Acceptor(sockets or [], self._protocol)
            self._opened = stack.pop_all()
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, finish the requests under way, then close the app."""
        self._app.state.ending.set()
        async with self._opened:
            await self._acceptor.close()
            await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        uvicorn_s = {"config": self.config, "server_state": self.server_state, "app_state": self.lifespan.state}
        return self.config.http_protocol_class(**uvicorn_s)


def end_in_order_on(*signals: signal.Signals) -> None:
    """Let these signals end the process with status 0; uvicorn raises them again once it has finished."""
    for number in signals:
        signal.signal(number, _end)


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)
