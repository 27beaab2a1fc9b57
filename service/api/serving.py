"""One process that serves: uvicorn's `Server`, whose app fails and ends in this project's words."""

import contextlib
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Final, NoReturn

import uvicorn
from fastapi import FastAPI

from service.api.connections import KEEP_ALIVE
from service.api.protocols import connection_class
from service.settings import Settings

GRACE: Final = 30
"""Seconds that requests under way have once the service is asked to end."""


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
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._app.router.lifespan_context(self._app))
            await super().startup(sockets)
            self._opened = stack.pop_all()
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the requests under way, then close the app."""
        async with self._opened:
            await super().shutdown(sockets)


def end_in_order_on(*signals: signal.Signals) -> None:
    """Let these signals end the process with status 0; uvicorn raises them again once it has finished."""
    for number in signals:
        signal.signal(number, _end)


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)
