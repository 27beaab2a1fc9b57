"""Gathers the writes of one event-loop turn, so that the head of an answer and its first bytes are sent together."""

import asyncio
from typing import Any, Final

_GATHERED: Final = 2 << 20  # bytes, none of which are copied


class GatheringTransport:
    """A transport that passes several writes to the operating system together.

    uvloop sends each write immediately, and each wakes the reader, which then competes with the writer for the socket.
    Sent one by one, the head of an answer and the rows of a batch cost more than their bytes.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held: list[bytes | memoryview] = []
        self._nbytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes | memoryview) -> None:
        """Holds data until enough is gathered, or this turn of the event loop ends."""
        if not data:
            return
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._nbytes += len(data)
        if self._nbytes > _GATHERED:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            held, self._held, self._nbytes = self._held, [], 0
            if not self._transport.is_closing():  # the connection was reset or aborted since `write`
                self._transport.writelines(held)

    def get_write_buffer_size(self) -> int:
        """Returns the number of unsent bytes."""
        return self._transport.get_write_buffer_size() + self._nbytes

    def write_eof(self) -> None:
        """Closes the sending side after all writes."""
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Closes the connection after all writes."""
        self._flush()
        self._transport.close()
