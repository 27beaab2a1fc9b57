"""Writes that belong together leave together: the head of an answer, and what of its body comes in the same moment."""

import asyncio
from typing import Any, Final

_GATHERED: Final = 2 << 20  # bytes, of which none is copied


class GatheringTransport:
    """A transport whose writes go to the operating system many at a time.

    uvloop writes each at once, and each wakes the reader, which then takes turns with the writer at the socket. The
    head of an answer by itself, and the rows of a batch one by one, cost more than their bytes.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held: list[bytes | memoryview] = []
        self._nbytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes | memoryview) -> None:
        """Hold it until there is more, or nothing more comes in this turn of the event loop."""
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
            if not self._transport.is_closing():  # it was reset or aborted since `write`
                self._transport.writelines(held)

    def get_write_buffer_size(self) -> int:
        """Bytes that were not sent."""
        return self._transport.get_write_buffer_size() + self._nbytes

    def write_eof(self) -> None:
        """End the sending side, behind what was written."""
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Close, behind what was written."""
        self._flush()
        self._transport.close()
