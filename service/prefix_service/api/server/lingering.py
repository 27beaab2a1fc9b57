"""Closing connections: without a reset that loses the last answer, or with one that leaves nothing behind."""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Final

from prefix_service.api.server.gathering import GatheringTransport

_LINGER: Final = 2.0
"""Seconds in which a peer can read the last answer while it still sends.

Closing with unread input would reset the connection.
"""

_RESET: Final = struct.pack("ii", 1, 0)
"""`struct linger`: on, zero seconds. Without it, the kernel keeps unsent bytes for minutes after an abort."""


class LingeringTransport(GatheringTransport):
    """A transport that goes on reading while it closes.

    A connection that is closed with unread input is reset, and its peer can lose the last answer.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, has_input: Callable[[], bool]
    ) -> None:
        super().__init__(transport, loop)
        self._has_input = has_input
        self._end: asyncio.TimerHandle | None = None
        self._is_lingering = self._is_paused = self._is_held = self._is_still = False

    def pause_reading(self) -> None:
        """Stops reading until `resume_reading`."""
        self._is_paused = True
        self._apply()

    def resume_reading(self) -> None:
        """Reads again, unless reading is held."""
        self._is_paused = False
        self._apply()

    def hold(self, held: bool) -> None:
        """Stops reading while `held`, even if uvicorn resumes it."""
        self._is_held = held
        self._apply()

    def _apply(self) -> None:
        still = (self._is_paused or self._is_held) and not self._is_lingering
        if still != self._is_still and not self._transport.is_closing():
            self._is_still = still
            (self._transport.pause_reading if still else self._transport.resume_reading)()

    def is_closing(self) -> bool:
        """Returns whether nothing more is sent or parsed."""
        return self._is_lingering or self._transport.is_closing()

    def close(self) -> None:
        """Closes the connection after all writes; lingers first if unread input would reset it."""
        if self.is_closing() or not self._has_input():
            super().close()
        else:
            self.linger()

    def abort(self) -> None:
        """Resets the connection: the kernel drops and frees the unsent bytes, up to megabytes, immediately."""
        if not self._transport.is_closing() and (connection := self._transport.get_extra_info("socket")) is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def linger(self) -> None:
        """Closes the sending side, drops input for `_LINGER` seconds or until
        the peer closes, and closes the connection.
        """
        self._is_lingering = True
        self.write_eof()
        self._apply()
        self._end = self._loop.call_later(_LINGER, self.close)

    def forget(self) -> None:
        """Drops what refers to the owner of the transport, once the connection is lost."""
        self._has_input = lambda: False
        if self._end is not None:
            self._end.cancel()
