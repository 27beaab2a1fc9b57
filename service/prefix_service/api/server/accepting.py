"""Accepts connections, a few per turn of the event loop, so that many new ones do not delay existing ones."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from typing import Final

_A_TURN: Final = 4
"""Connections accepted per turn; uvloop and asyncio accept all that wait, up to thousands."""

_PAUSE: Final = 1.0
"""Seconds without accepting when no file descriptor or memory is left for a connection."""

_FULL: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

log = logging.getLogger("prefix_service")


class Acceptor:
    """Accepts the connections of listening sockets, each with its own protocol, until `close`."""

    def __init__(self, sockets: list[socket.socket], protocol: Callable[[], asyncio.Protocol]) -> None:
        self._loop = asyncio.get_running_loop()
        self._protocol = protocol
        self._sockets = sockets
        self._tasks: set[asyncio.Task[None]] = set()
        for each in sockets:
            each.setblocking(False)
            self._listen(each)

    async def close(self) -> None:
        """Stops accepting. When this returns, every accepted socket is a
        connection that the server knows and can end.
        """
        sockets, self._sockets = self._sockets, []
        for each in sockets:
            self._loop.remove_reader(each)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _listen(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_A_TURN):
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                log.warning("no connection is accepted for %g s: %s", _PAUSE, os.strerror(error.errno))
                self._loop.remove_reader(listening)
                self._loop.call_later(_PAUSE, self._listen, listening)
                return
            task = self._loop.create_task(self._connect(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # the connection has ended already
            await self._loop.connect_accepted_socket(self._protocol, connection)
