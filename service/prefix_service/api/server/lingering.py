"""How connections end: without a reset that takes the last answer away, or by one that leaves nothing behind."""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Final

from prefix_service.api.server.gathering import GatheringTransport

_LINGER: Final = 2.0
"""Seconds in which a peer may read the last answer while it still sends: unread input would reset the connection."""

_RESET: Final = struct.pack("ii", 1, 0)
"""`struct linger`: on, zero seconds. Without it the kernel keeps what is unsent for minutes after an abort."""


class LingeringTransport(GatheringTransport):
    """A transport that reads on while it closes, since a connection that is closed in front of unread input is reset,
    and its peer may lose the last answer."""

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, has_input: Callable[[], bool]
    ) -> None:
        super().__init__(transport, loop)
        self._has_input = has_input
        self._is_lingering = self._is_paused = self._is_held = self._is_still = False

    def pause_reading(self) -> None:
        """Read nothing until `resume_reading`."""
        self._is_paused = True
        self._apply()

    def resume_reading(self) -> None:
        """Read again, unless reading is held."""
        self._is_paused = False
        self._apply()

    def hold(self, held: bool) -> None:
        """Read nothing while it is held, whatever uvicorn resumes."""
        self._is_held = held
        self._apply()

    def _apply(self) -> None:
        still = (self._is_paused or self._is_held) and not self._is_lingering
        if still != self._is_still and not self._transport.is_closing():
            self._is_still = still
            (self._transport.pause_reading if still else self._transport.resume_reading)()

    def is_closing(self) -> bool:
        """Whether nothing more is sent or parsed."""
        return self._is_lingering or self._transport.is_closing()

    def close(self) -> None:
        """Close, behind what was written; linger before that, if input would reset the connection."""
        if self.is_closing() or not self._has_input():
            super().close()
        else:
            self.linger()

    def abort(self) -> None:
        """Reset the connection: the kernel drops what it has not sent yet, up to megabytes, and frees it now."""
        if not self._transport.is_closing() and (connection := self._transport.get_extra_info("socket")) is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def linger(self) -> None:
        """End the sending side, drop input for `_LINGER` seconds or until the peer closes, and close."""
        self._is_lingering = True
        self.write_eof()
        self._apply()
        self._loop.call_later(_LINGER, self.close)
