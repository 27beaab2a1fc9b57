"""Requests over a transport of the caller's own, `http=`, driven by httpx.

Such a transport manages its own connections. Each of its reads may take the rest of a call's time, and the clock is
read between the pieces of a body. The transport stays in the process that first used it and, if it is asynchronous, on
that event loop.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Final

import httpx

from prefix_service.client.protocol import Answer, Fetch, Request
from prefix_service.client.transport.bodies import encoded
from prefix_service.client.transport.connection import Connection, connection_failed
from prefix_service.client.transport.dialling import time_left
from prefix_service.client.transport.http1 import Head, declared_length
from prefix_service.client.transport.link import MOST_JSON, MOST_UNDECLARED, allocate_json
from prefix_service.errors import InvalidRequest, InvalidResponse

_FAILURES: Final = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError)


class Foreign:
    """Sends requests over a blocking transport."""

    def __init__(self, connection: Connection, transport: httpx.BaseTransport) -> None:
        self._connection = connection
        self._http = httpx.Client(**_options(connection), transport=transport)
        self._home = _Home()

    def send(self, request: Request, until: float) -> Answer:
        """Returns the answer to a request.

        Raises:
            ConnectionFailed: there is no answer before the time `until` of `time.monotonic`.
            InvalidRequest: another process has used the transport.
            InvalidResponse: the answer is too long, or another catalog's than before.
        """
        self._home.check(None)
        began = time.monotonic()
        headers, content = _headers_and_content(request, self._connection.service.needed)
        try:
            with self._http.stream(**_arguments(request, until), headers=headers, content=content) as response:
                body = _Body(response, request)
                for piece in response.iter_raw():
                    body.add(piece)
                    time_left(until)
                answer = body.answer()
        except _FAILURES as error:
            raise connection_failed(error, self._connection.address) from error
        self._connection.note_answer(request, answer.headers, began)
        return answer

    def close(self) -> None:
        """Closes every connection."""
        self._http.close()


class AsyncForeign:
    """Sends requests over an asynchronous transport."""

    def __init__(self, connection: Connection, transport: httpx.AsyncBaseTransport) -> None:
        self._connection = connection
        self._http = httpx.AsyncClient(**_options(connection), transport=transport)
        self._home = _Home()

    async def send(self, request: Request, until: float) -> Answer:
        """Returns the answer to a request.

        Raises:
            ConnectionFailed: there is no answer before the time `until` of `time.monotonic`.
            InvalidRequest: another process or event loop has used the transport.
            InvalidResponse: the answer is too long, or another catalog's than before.
        """
        self._home.check(asyncio.get_running_loop())
        began = time.monotonic()
        headers, content = _headers_and_content(request, self._connection.service.needed)
        later = None if content is None else _later(content)
        try:
            async with (
                asyncio.timeout(time_left(until)),
                self._http.stream(**_arguments(request, until), headers=headers, content=later) as response,
            ):
                body = _Body(response, request)
                async for piece in response.aiter_raw():
                    body.add(piece)
                answer = body.answer()
        except _FAILURES as error:
            raise connection_failed(error, self._connection.address) from error
        self._connection.note_answer(request, answer.headers, began)
        return answer

    async def close(self) -> None:
        """Closes every connection."""
        await self._http.aclose()


class _Home:
    """The process and the event loop that first used a transport."""

    def __init__(self) -> None:
        self._first: tuple[int, asyncio.AbstractEventLoop | None] | None = None

    def check(self, loop: asyncio.AbstractEventLoop | None) -> None:
        process = os.getpid()
        if self._first is None:
            self._first = process, loop
        if self._first[0] != process:
            raise InvalidRequest("the transport of http= was used before fork(): make a client in each process")
        if self._first[1] is not loop:
            raise InvalidRequest("the transport of http= belongs to another event loop: make a client in each loop")


def _options(connection: Connection) -> dict[str, Any]:
    return {"base_url": connection.url, "headers": connection.headers}


def _arguments(request: Request, until: float) -> dict[str, Any]:
    params = dict(request.params)
    return {"method": request.method, "url": request.path, "params": params, "timeout": time_left(until)}


def _headers_and_content(
    request: Request, revisions: Iterable[str]
) -> tuple[list[tuple[bytes, bytes]], Iterator[bytes] | None]:
    about_body, content = ({}, None) if request.method == "GET" else encoded(request)
    merged: Mapping[str, str] = {"X-Request-ID": request.request_id, **request.headers, **about_body}
    needed = (("Prefix-Min-Revision", revision) for revision in revisions)
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in chain(merged.items(), needed)], content


async def _later(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


class _Body:
    """An answer's body while it is received, in memory of its declared length."""

    def __init__(self, response: httpx.Response, request: Request) -> None:
        pairs = [(name.lower().decode("latin-1"), value.decode("latin-1")) for name, value in response.headers.raw]
        self._status, self._headers = response.status_code, dict(pairs)
        declared = declared_length(self._headers)
        self._declared = declared or 0
        if not isinstance(request, Fetch):
            allocate_json(Head(self._status, self._headers, declared or 0, keeps_alive=False))
        is_followed = isinstance(request, Fetch) and declared and self._status == 200
        self._progress = request.progress if is_followed else None
        self._most = MOST_UNDECLARED if isinstance(request, Fetch) else MOST_JSON
        try:
            self._data = bytearray(declared or 0)
        except MemoryError as error:
            raise InvalidResponse(f"the answer claims {declared} bytes, for which there is no memory") from error
        self._most = max(self._most, len(self._data))
        self._position = 0

    def add(self, piece: bytes) -> None:
        """Adds the next bytes; a body without a declared length grows.

        Raises:
            InvalidResponse: the body is too long.
        """
        self._data[self._position : self._position + len(piece)] = piece
        self._position += len(piece)
        if self._position > self._most:
            raise InvalidResponse(f"the answer has more than {self._most} bytes")
        if self._progress is not None:
            self._progress(self._position, self._declared)

    def answer(self) -> Answer:
        """Returns the whole answer."""
        del self._data[self._position :]
        return Answer(self._status, self._headers, self._data)
