"""Steps of flows carried out: tensors over their own lane, all else over httpx; deadlines, and retries of what is safe
to retry."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import httpx

from service.client.connection import Connection, connection_failed
from service.client.fetcher import Fetcher
from service.client.lane import Interrupt
from service.client.protocol import Answer, Fetch, Request, Step, Work, require_success
from service.errors import ConnectionFailed, CorruptBlob, NotFound, PrefixServiceError, RateLimited, Unavailable

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 2.0
_NEVER_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_MOST_THREADS: Final = 32


class _Attempts:
    """What is left of a call: its deadline, the growing pauses between tries, and what a try may have done."""

    def __init__(self, request: Request, timeout: float) -> None:
        self._request = request
        self._may_be_done = False
        self.until = time.monotonic() + timeout
        self._pause = _FIRST_PAUSE

    @property
    def left(self) -> float:
        """Seconds until the deadline, at least one millisecond."""
        return max(self.until - time.monotonic(), 0.001)

    def pause_after(self, error: PrefixServiceError) -> float:
        """Seconds to wait before another try.

        Raises:
            PrefixServiceError: this very error, when another try cannot help or has no time.
        """
        if not isinstance(error, ConnectionFailed | Unavailable) or isinstance(error, CorruptBlob):
            raise error
        if not _was_refused(error):
            if not self._request.is_idempotent:
                raise error
            self._may_be_done = True
        pause = max(self._pause, error.retry_after if isinstance(error, Unavailable) else 0)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        if pause >= self.left:
            raise error
        return pause

    def found_done(self, error: PrefixServiceError) -> bool:
        """Whether a deletion finds nothing because an earlier try, whose answer was lost, has done it."""
        return self._may_be_done and self._request.method == "DELETE" and isinstance(error, NotFound)


def _was_refused(error: PrefixServiceError) -> bool:
    """Whether the request was certainly not carried out."""
    return isinstance(error, RateLimited) or isinstance(error.__cause__, _NEVER_SENT)


class Transport:
    """Blocking; safe to share between threads."""

    def __init__(self, connection: Connection, fetcher: Fetcher | None) -> None:
        self._connection, self._fetcher = connection, fetcher
        self._http = httpx.Client(**connection.options(httpx.HTTPTransport))

    def carry_out(self, step: Step) -> Any:
        """What a flow is sent for its step: the answer to a request, a success, or what a fetch made of it.

        Raises:
            ConnectionFailed: there was none before the deadline.
            PrefixServiceError: the service reported it.
        """
        if isinstance(step, Work):
            return step.run()
        attempts = _Attempts(step, self._connection.timeout)
        while True:
            try:
                return self._once(step, attempts)
            except PrefixServiceError as error:
                if attempts.found_done(error):
                    return Answer(204, {}, bytearray())
                time.sleep(attempts.pause_after(error))

    def _once(self, request: Request, attempts: _Attempts) -> Any:
        if isinstance(request, Fetch) and self._fetcher is not None:
            return self._fetcher.fetch(request, attempts.until, Interrupt())
        answer = require_success(self._send(request, attempts.left))
        return request.read(answer) if isinstance(request, Fetch) else answer

    def _send(self, request: Request, timeout: float) -> Answer:
        try:
            with self._http.stream(**_arguments(request, timeout)) as response:
                body = _Body(response)
                for chunk in response.iter_raw():
                    body.add(chunk)
                return body.answer()
        except httpx.TransportError as error:
            raise connection_failed(error, self._connection.base_url) from error

    def close(self) -> None:
        """Close every connection."""
        self._http.close()
        if self._fetcher is not None:
            self._fetcher.close()


class AsyncTransport:
    """The same for asyncio; belongs to one event loop, and keeps it free: what blocks for long is done in threads."""

    def __init__(self, connection: Connection, fetcher: Fetcher | None) -> None:
        self._connection, self._fetcher = connection, fetcher
        self._http = httpx.AsyncClient(**connection.options(httpx.AsyncHTTPTransport))
        self._threads = ThreadPoolExecutor(_MOST_THREADS, "prefix-client")

    async def carry_out(self, step: Step) -> Any:
        """As `Transport.carry_out`."""
        if isinstance(step, Work):
            return await self._in_thread(step.run)
        attempts = _Attempts(step, self._connection.timeout)
        while True:
            try:
                return await self._once(step, attempts)
            except PrefixServiceError as error:
                if attempts.found_done(error):
                    return Answer(204, {}, bytearray())
                await asyncio.sleep(attempts.pause_after(error))

    async def _once(self, request: Request, attempts: _Attempts) -> Any:
        if isinstance(request, Fetch) and self._fetcher is not None:
            if not self._fetcher.blocks(request):
                return await self._fetcher.fetch_on_loop(request, attempts.until)
            interrupt = Interrupt()
            try:
                return await self._in_thread(partial(self._fetcher.fetch, request, attempts.until, interrupt))
            except asyncio.CancelledError:
                interrupt.break_off()
                raise
        answer = require_success(await self._send(request, attempts.left))
        return await self._in_thread(partial(request.read, answer)) if isinstance(request, Fetch) else answer

    async def _send(self, request: Request, timeout: float) -> Answer:  # noqa: ASYNC109 - handed on to httpx
        try:
            async with self._http.stream(**_arguments(request, timeout)) as response:
                body = _Body(response)
                async for chunk in response.aiter_raw():
                    body.add(chunk)
                return body.answer()
        except httpx.TransportError as error:
            raise connection_failed(error, self._connection.base_url) from error

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()
        if self._fetcher is not None:
            self._fetcher.close()
        self._threads.shutdown(wait=False)


def _arguments(request: Request, timeout: float) -> dict[str, Any]:
    return {
        "method": request.method,
        "url": request.path,
        "params": dict(request.params),
        "headers": dict(request.headers),
        "files": None if request.files is None else dict(request.files),
        "json": request.json,
        "timeout": timeout,
    }


class _Body:
    """An answer's body while it arrives, in memory of its declared length."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        declared = response.headers.get("content-length", "")
        self._data = bytearray(int(declared)) if declared.isdigit() else bytearray()
        self._position = 0

    def add(self, chunk: bytes) -> None:
        """The next bytes; a body without a declared length grows."""
        self._data[self._position : self._position + len(chunk)] = chunk
        self._position += len(chunk)

    def answer(self) -> Answer:
        """The whole answer."""
        del self._data[self._position :]
        return Answer(self._response.status_code, dict(self._response.headers), self._data)
