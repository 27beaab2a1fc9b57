"""The way of tensors: an answer's body is received into memory that is allocated once, over connections that stay.

httpx hands a body over in small pieces, each a copy, at a third of the speed; it carries everything else.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import urlencode

from service.client.connection import Connection
from service.client.http1 import Head
from service.client.link import Link, NoAnswer, Observer, Place, carry_out, carry_out_on_loop
from service.client.protocol import Request

_MOST_IDLE: Final = 32


class Interrupt:
    """Breaks off exchanges from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: set[socket.socket] = set()
        self._is_broken = False

    @contextlib.contextmanager
    def watching(self, link: socket.socket) -> Iterator[None]:
        """Break off what happens on this socket in the block.

        Raises:
            ConnectionAbortedError: it was broken off before.
        """
        with self._lock:
            if self._is_broken:
                raise ConnectionAbortedError("broken off")
            self._watched.add(link)
        try:
            yield
        finally:
            with self._lock:
                self._watched.discard(link)

    def break_off(self) -> None:
        """End what is under way, and what would begin."""
        with self._lock:
            self._is_broken = True
            for link in self._watched:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(link, socket.SHUT_RDWR)  # TLS's own would take its state from the reader


class Lane:
    """Exchanges with one service over connections that stay; safe to share between threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._path = connection.url.path.rstrip("/")
        host = connection.url.netloc.decode("ascii").rpartition("@")[2]
        self._fixed = _lines({"Host": host, **connection.headers}) + b"\r\n"
        self._idle: list[Link] = []
        self._lock = threading.Lock()
        self._is_closed = False

    def exchange(
        self,
        request: Request,
        place: Place,
        until: float,
        interrupt: Interrupt,
        *,
        headers: Mapping[str, str] | None = None,
        observe: Observer | None = None,
    ) -> tuple[Head, memoryview]:
        """Send a GET, with more `headers`, and receive its answer's body where `place` says, before the moment `until`
        of `time.monotonic`; `observe` sees the body as it comes.

        Raises:
            OSError: no answer, or not all of it; TimeoutError if it did not come in time.
        """
        message = self._message(request, headers)
        while True:
            link = self._idle_one() or Link(self._connection.dial(until))
            try:
                with self._lent(link), interrupt.watching(link.socket):
                    return carry_out(link.exchange(message, place, observe), link.socket, until)
            except NoAnswer:
                pass

    async def exchange_on_loop(
        self,
        request: Request,
        place: Place,
        until: float,
        *,
        headers: Mapping[str, str] | None = None,
        observe: Observer | None = None,
    ) -> tuple[Head, memoryview]:
        """The same on the running event loop; a new connection is made in a thread.

        Raises:
            OSError: as `exchange`.
        """
        message = self._message(request, headers)
        while True:
            link = self._idle_one() or await self._dial_in_thread(until)
            try:
                with self._lent(link):
                    return await carry_out_on_loop(link.exchange(message, place, observe), link.socket, until)
            except NoAnswer:
                pass

    def _message(self, request: Request, headers: Mapping[str, str] | None) -> bytes:
        query = f"?{urlencode(request.params)}" if request.params else ""
        start = f"GET {self._path}{request.path}{query} HTTP/1.1\r\n"
        return start.encode("ascii") + _lines({**request.headers, **(headers or {})}) + self._fixed

    def _idle_one(self) -> Link | None:
        while True:
            with self._lock:
                link = self._idle.pop() if self._idle else None
            if link is None or not link.is_readable():
                return link
            link.socket.close()

    async def _dial_in_thread(self, until: float) -> Link:
        dialling = asyncio.ensure_future(asyncio.to_thread(self._dial_prepared, until))
        try:
            return await asyncio.shield(dialling)
        except asyncio.CancelledError:
            dialling.add_done_callback(_close_unused)
            raise

    def _dial_prepared(self, until: float) -> Link:
        import service.client.decode  # noqa: F401 - imports torch, which would hold up the event loop at the first answer

        return Link(self._connection.dial(until))

    @contextlib.contextmanager
    def _lent(self, link: Link) -> Iterator[None]:
        """A connection in use, which is closed when that fails."""
        try:
            yield
        except BaseException:
            link.socket.close()
            raise
        with self._lock:
            if link.stays and not self._is_closed and len(self._idle) < _MOST_IDLE:
                self._idle.append(link)
                return
        link.socket.close()

    def close(self) -> None:
        """Close every connection; one in use closes when its exchange ends."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for link in idle:
            link.socket.close()


def _close_unused(dialling: "asyncio.Future[Link]") -> None:
    if not dialling.cancelled() and dialling.exception() is None:
        dialling.result().socket.close()


def _lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
