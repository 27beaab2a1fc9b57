"""One serving process: uvicorn's `Server`, with this project's errors if the app cannot open."""

import asyncio
import contextlib
import gc
import math
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Final, NoReturn, cast

import uvicorn
from fastapi import FastAPI

from prefix_service.api.server.accepting import Acceptor
from prefix_service.api.server.connections import KEEP_ALIVE, Guarded
from prefix_service.api.server.protocols import connection_class
from prefix_service.catalog.records import Principal
from prefix_service.settings import Settings
from prefix_service.system.file_limit import make_room_for_connections, most_connections
from prefix_service.system.host_memory import return_freed_memory

GRACE: Final = 30
"""Seconds in which requests in progress can finish once the service is asked to end."""

_NOTICE: Final = 3
"""Seconds in which a replica of a fleet goes on to answer once it is asked to end. A proxy that checks once a second
learns meanwhile that the replica is not ready, and sends the next requests to others.
"""

_SWITCH: Final = 0.001
"""Seconds after which a computing thread yields the GIL to the event loop, which needs it after each operation of
torch. With CPython's default of 5 ms, ten waits per answer would add 50 ms to another caller's latency.
"""

_POLL: Final = 0.05  # seconds
_CLOSE: Final = (b"connection", b"close")


class Server(uvicorn.Server):
    """Serves an app on listening sockets; calls `on_ready` on the event loop once the app is open, and
    `on_end` when the server is asked to end: from then on it must say that it is not ready.

    The server opens the app itself: if that fails, uvicorn would log a traceback and hide the reason.
    """

    def __init__(
        self, settings: Settings, app: FastAPI, on_ready: Callable[[], None], on_end: Callable[[], None]
    ) -> None:
        config = uvicorn.Config(
            app,
            http=connection_class(settings, self._remembered),
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE,
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # nothing here needs the caller's address or scheme
            server_header=False,
            timeout_graceful_shutdown=GRACE,
        )
        super().__init__(config)
        self._app, self._on_ready, self._on_end = app, on_ready, on_end
        self._connections = most_connections(settings.max_connections)
        self._notice = 0 if settings.catalog_url is None else _NOTICE
        self._opened = contextlib.AsyncExitStack()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens the app, then accepts connections.

        Raises:
            PrefixServiceError: the app cannot open.
        """
        sys.setswitchinterval(_SWITCH)
        return_freed_memory()
        make_room_for_connections(self._connections)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._app.router.lifespan_context(self._app))
            self._app.openapi()  # takes 0.2 s, which the first caller of the document would block the loop for
            # A collection of garbage stops every thread while it looks through all objects: 30 ms with those that are
            # here by now, which stay until the end.
            gc.freeze()
            await super().startup([])
            self._acceptor = Acceptor(sockets or [], self._protocol)
            self._opened = stack.pop_all()
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finishes the requests in progress, then closes the app. A replica of a fleet goes on for `_NOTICE` before.

        Meanwhile others are answered too, and end their connections. A proxy asks whether the service is ready, and
        cuts everything in progress off if there is no answer; until it knows, it passes requests on.
        """
        until = time.monotonic() + GRACE
        async with self._opened:
            self._on_end()
            self.server_state.default_headers = [*self.server_state.default_headers, _CLOSE]
            await self._wait_while(lambda: True, time.monotonic() + self._notice)
            await self._drain(until)
            await self._acceptor.close()
            self.config.timeout_graceful_shutdown = math.ceil(max(until - time.monotonic(), 1))
            await super().shutdown(sockets)

    async def _drain(self, until: float) -> None:
        """Waits until the requests in progress are answered, at most until a moment of `time.monotonic`."""
        connections = cast("set[Guarded]", self.server_state.connections)
        busy = {each for each in connections if each.is_answering}
        for each in busy:
            each.shutdown()
        await self._wait_while(lambda: any(each.is_answering for each in busy & connections), until)

    async def _wait_while(self, goes_on: Callable[[], bool], until: float) -> None:
        """Waits while `goes_on()`, at most until a moment of `time.monotonic`, or a second signal."""
        while goes_on():
            if time.monotonic() >= until or self.force_exit:
                return
            await asyncio.sleep(_POLL)

    def _remembered(self, header: bytes) -> Principal | None:
        found: Principal | None = self._app.state.prefix_service.authenticator.remembered(header)
        return found

    def _protocol(self) -> asyncio.Protocol:
        uvicorn_s = {"config": self.config, "server_state": self.server_state, "app_state": self.lifespan.state}
        return self.config.http_protocol_class(**uvicorn_s)


def end_in_order_on(*signals: signal.Signals) -> None:
    """Lets these signals end the process with status 0; uvicorn raises them again once it has finished."""
    for number in signals:
        signal.signal(number, _end)


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)
