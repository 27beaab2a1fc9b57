"""The pool of persistent connections to one service, over which bodies are received into memory that is allocated
once.

httpx delivers a body in small pieces, each a copy, at a third of the speed, and has no deadline for a whole request.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Final, Protocol
from urllib.parse import urlencode

from prefix_service.client.protocol import Request
from prefix_service.client.transport.bodies import encoded
from prefix_service.client.transport.connection import Connection
from prefix_service.client.transport.dialling import time_left
from prefix_service.client.transport.http1 import Head
from prefix_service.client.transport.link import (
    MOST_UNDECLARED,
    AllocateBody,
    Link,
    Observer,
    carry_out,
    carry_out_on_loop,
)
from prefix_service.client.transport.racing import Race, first_answer, first_answer_on_loop
from prefix_service.system.forks import renew_in_child

_MOST_IDLE: Final = 32
_PATIENCE: Final = 0.25
"""The share of the remaining time in which a reused connection must send the first byte of an answer; its peer may have
vanished silently.
"""
_MOST_PATIENCE: Final = 60.0  # seconds


class Interrupt:
    """Aborts exchanges from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: set[socket.socket] = set()
        self.is_broken = False

    def watch(self, link: socket.socket) -> None:
        """Registers a socket for `break_off`, until this object is gone.

        Raises:
            ConnectionAbortedError: `break_off` was called before.
        """
        with self._lock:
            if self.is_broken:
                raise ConnectionAbortedError("broken off")
            self._watched.add(link)

    @contextlib.contextmanager
    def watching(self, link: socket.socket) -> Iterator[None]:
        """Registers a socket for `break_off` while the block runs.

        Raises:
            ConnectionAbortedError: `break_off` was called before.
        """
        self.watch(link)
        try:
            yield
        finally:
            with self._lock:
                self._watched.discard(link)

    def break_off(self) -> None:
        """Aborts the exchanges in progress, and those that would begin later."""
        with self._lock:
            self.is_broken = True
            for link in self._watched:
                with contextlib.suppress(OSError):
                    # TLS's own shutdown would take its state from the reader.
                    socket.socket.shutdown(link, socket.SHUT_RDWR)


class Exchanges(Protocol):
    """Sends requests to a service, at one address or several."""

    def exchange(
        self,
        request: Request,
        allocate: AllocateBody,
        until: float,
        interrupt: Interrupt,
        *,
        headers: Mapping[str, str] | None = None,
        observe: Observer | None = None,
        most: int = MOST_UNDECLARED,
    ) -> tuple[Head, memoryview]:
        """Returns head and body of the answer to a request, as `Pool.exchange` does."""

    async def exchange_on_loop(
        self,
        request: Request,
        allocate: AllocateBody,
        until: float,
        *,
        headers: Mapping[str, str] | None = None,
        observe: Observer | None = None,
        most: int = MOST_UNDECLARED,
    ) -> tuple[Head, memoryview]:
        """Returns head and body of the answer to a GET, as `Pool.exchange_on_loop` does."""

    def any(self, avoided: "Pool | None" = None) -> "Pool":
        """Returns the pool to any address that is there, another than `avoided` if possible."""

    def close(self) -> None:
        """Closes every connection."""


class Pool:
    """Exchanges with one service over persistent connections.

    It can be shared between threads, and with forked children.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._path = connection.url.raw_path.decode("ascii").rstrip("/")
        host = connection.url.netloc.decode("ascii").rpartition("@")[2]
        self._fixed = _lines({"Host": host, **connection.headers}) + b"\r\n"
        self._is_closed = False
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Starts without connections, in a forked child too, where the parent's connections are closed already."""
        self._idle: list[Link] = []
        self._lock = threading.Lock()

    def exchange(
        self,
        request: Request,
        allocate: AllocateBody,
        until: float,
        interrupt: Interrupt,
        *,
        headers: Mapping[str, str] | None = None,
        observe: Observer | None = None,
        most: int = MOST_UNDECLARED,
        race: "Race[Pool] | None" = None,
    ) -> tuple[Head, memoryview]:
        """Sends a request with additional `headers`; returns head and body of its answer before the time `until` of
        `time.monotonic`.

        `allocate` returns memory for the body, and `observe` sees its pieces as they arrive. A body without a declared
        length may have `most` bytes. With `race`, another address may answer a GET.

        Raises:
            OSError: the answer is missing or incomplete; TimeoutError if it did not arrive in time; NotConnected if no
                part of the request was sent.
            InvalidResponse: another catalog answered than before.
        """
        began = time.monotonic()
        message, body = self.message(request, headers)

        def over(link: Link, first_by: float) -> tuple[Head, memoryview]:
            pool = self
            try:
                with interrupt.watching(link.socket):
                    if race is None:
                        begun = carry_out(link.begin(message, body), link.socket, first_by)
                    else:
                        pool, link, begun = first_answer(
                            self, link, request, headers, min(first_by, race.first_by), race
                        )
                        interrupt.watch(link.socket)
                    received = carry_out(link.finish(begun, allocate, observe, most), link.socket, until)
                pool.connection.note_answer(request, received[0].headers, began)
            except BaseException:
                link.socket.close()
                raise
            pool._keep(link)
            return received

        patience = _patience(until)
        link = self.idle_one(request)
        if link is not None:
            try:
                received = over(link, patience)
                if received[0].status != HTTPStatus.REQUEST_TIMEOUT:  # that answers an idle connection, no request
                    return received
            except OSError:
                if link.has_begun or interrupt.is_broken or (race is not None and race.has_begun):
                    raise
                self._close_idle()
        return over(self.dial(until if race is None else race.connected_by), until)

    async def exchange_on_loop(
        self,
        request: Request,
        allocate: AllocateBody,
        until: float,
        *,
        headers: Mapping[str, str] | None = None,
        observe: Observer | None = None,
        most: int = MOST_UNDECLARED,
        race: "Race[Pool] | None" = None,
    ) -> tuple[Head, memoryview]:
        """Exchanges a GET on the running event loop; a new connection is made in a thread.

        Raises:
            OSError: the answer is missing or incomplete; TimeoutError if it did not arrive in time; NotConnected if no
                part of the request was sent.
        """
        began = time.monotonic()
        message, _ = self.message(request, headers)

        async def over(link: Link, first_by: float) -> tuple[Head, memoryview]:
            pool = self
            try:
                if race is None:
                    begun = await carry_out_on_loop(link.begin(message), link.socket, first_by)
                else:
                    first_by = min(first_by, race.first_by)
                    pool, link, begun = await first_answer_on_loop(self, link, request, headers, first_by, race)
                received = await carry_out_on_loop(link.finish(begun, allocate, observe, most), link.socket, until)
                pool.connection.note_answer(request, received[0].headers, began)
            except BaseException:
                link.socket.close()
                raise
            pool._keep(link)
            return received

        patience = _patience(until)
        link = self.idle_one(request)
        if link is not None:
            try:
                received = await over(link, patience)
                if received[0].status != HTTPStatus.REQUEST_TIMEOUT:  # that answers an idle connection, no request
                    return received
            except OSError:
                if link.has_begun or (race is not None and race.has_begun):
                    raise
                self._close_idle()
        return await over(await self.dial_in_thread(until if race is None else race.connected_by), until)

    def message(self, request: Request, headers: Mapping[str, str] | None = None) -> tuple[bytes, Iterable[bytes]]:
        """Returns a request's head with additional `headers`, and the pieces of its body."""
        query = _query(tuple(request.params.items()))
        start = f"{request.method} {self._path}{request.path}{query} HTTP/1.1\r\n"
        about_body, body = ({}, ()) if request.method == "GET" else encoded(request)
        lines = _lines({"X-Request-ID": request.request_id, **request.headers, **about_body, **(headers or {})})
        for revision in self.connection.service.needed:
            lines += b"Prefix-Min-Revision: %b\r\n" % revision.encode("ascii")
        return start.encode("ascii") + lines + self._fixed, body

    def idle_one(self, request: Request) -> Link | None:
        """Returns a connection that was used before, if there is one.

        A change gets a new connection: that an idle one is dead shows only after the request, which could not be
        repeated.
        """
        if request.method != "GET":
            return None
        while True:
            with self._lock:
                link = self._idle.pop() if self._idle else None
            if link is None or not link.is_readable():
                return link
            link.socket.close()

    def dial(self, until: float) -> Link:
        """Returns a new connection, made before the time `until` of `time.monotonic`.

        Raises:
            OSError: there is none.
        """
        return Link(self.connection.dial(until))

    async def dial_in_thread(self, until: float) -> Link:
        """Returns a new connection, made in a thread before the time `until` of `time.monotonic`.

        Raises:
            OSError: there is none.
        """
        dialling = asyncio.ensure_future(asyncio.to_thread(self._dial_prepared, until))
        try:
            return await asyncio.wait_for(asyncio.shield(dialling), time_left(until))
        except (asyncio.CancelledError, TimeoutError):
            dialling.add_done_callback(_close_unused)
            raise

    def _dial_prepared(self, until: float) -> Link:
        import prefix_service.prefix.wire.received  # noqa: F401 - imports torch, which would hold up the event loop at the first answer

        return self.dial(until)

    def _keep(self, link: Link) -> None:
        """Keeps a connection for another request, or closes it."""
        with self._lock:
            if link.stays and not self._is_closed and len(self._idle) < _MOST_IDLE:
                self._idle.append(link)
                return
        link.socket.close()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for link in idle:
            link.socket.close()

    def any(self, _avoided: "Pool | None" = None) -> "Pool":
        """Returns this pool, the only one."""
        return self

    def close(self) -> None:
        """Closes every connection; one in use is closed when its exchange ends."""
        self._is_closed = True
        self._close_idle()


def _patience(until: float) -> float:
    """Returns the time until which a reused connection may be silent.

    Raises:
        TimeoutError: no time is left.
    """
    return time.monotonic() + min(_PATIENCE * time_left(until), _MOST_PATIENCE)


def _close_unused(dialling: "asyncio.Future[Link]") -> None:
    if not dialling.cancelled() and dialling.exception() is None:
        dialling.result().socket.close()


@lru_cache(maxsize=256)  # encoding takes as long as a small answer
def _query(params: tuple[tuple[str, str], ...]) -> str:
    return f"?{urlencode(params)}" if params else ""


def _lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
