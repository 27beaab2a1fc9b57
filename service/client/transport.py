"""Requests over httpx, into memory that is allocated once; deadlines, and retries of what is safe to retry."""

import asyncio
import ssl
import time
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import httpx

from service.client.protocol import Answer, Request, require_success
from service.errors import ConnectionFailed, CorruptBlob, NotFound, PrefixServiceError, Unavailable

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 2.0
_NEVER_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach a service: its URL, key, Unix socket, certificate authorities, and the deadline of a call in
    seconds. `http` replaces httpx's own transport."""

    base_url: str
    api_key: str | None = None
    uds: str | Path | None = None
    ca_file: str | Path | None = None
    timeout: float = 60.0
    http: httpx.BaseTransport | httpx.AsyncBaseTransport | None = None

    @property
    def is_local(self) -> bool:
        """Whether bytes stay on this machine."""
        host = httpx.URL(self.base_url).host
        try:
            return self.uds is not None or host == "localhost" or ip_address(host).is_loopback
        except ValueError:
            return False

    def options(self, transport: type[httpx.HTTPTransport] | type[httpx.AsyncHTTPTransport]) -> dict[str, Any]:
        """The arguments of `httpx.Client` and `httpx.AsyncClient`."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "prefix-service-client"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        trusted = True if self.ca_file is None else ssl.create_default_context(cafile=str(self.ca_file))
        made = self.http or transport(uds=None if self.uds is None else str(self.uds), verify=trusted)
        return {"base_url": self.base_url, "headers": headers, "transport": made, "timeout": self.timeout}


class _Attempts:
    """What is left of a call: its deadline, the growing pauses between tries, and what a try may have done."""

    def __init__(self, request: Request, timeout: float) -> None:
        self._request = request
        self._may_be_done = False
        self._until = time.monotonic() + timeout
        self._pause = _FIRST_PAUSE

    @property
    def left(self) -> float:
        """Seconds until the deadline, at least one millisecond."""
        return max(self._until - time.monotonic(), 0.001)

    def pause_after(self, error: PrefixServiceError) -> float:
        """Seconds to wait before another try.

        Raises:
            PrefixServiceError: this very error, when another try cannot help or has no time.
        """
        if not isinstance(error, ConnectionFailed | Unavailable) or isinstance(error, CorruptBlob):
            raise error
        if not isinstance(error.__cause__, _NEVER_SENT):
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


class Transport:
    """Blocking; safe to share between threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._http = httpx.Client(**connection.options(httpx.HTTPTransport))

    def send(self, request: Request) -> Answer:
        """The answer to a request, a success.

        Raises:
            ConnectionFailed: there was none before the deadline.
            PrefixServiceError: the service reported it.
        """
        attempts = _Attempts(request, self._connection.timeout)
        while True:
            try:
                return require_success(self._once(request, attempts.left))
            except PrefixServiceError as error:
                if attempts.found_done(error):
                    return Answer(204, {}, bytearray())
                time.sleep(attempts.pause_after(error))

    def _once(self, request: Request, timeout: float) -> Answer:
        try:
            with self._http.stream(**_arguments(request, timeout)) as response:
                body = _Body(response)
                for chunk in response.iter_raw():
                    body.add(chunk)
                return body.answer()
        except httpx.TransportError as error:
            raise _failed(error, self._connection.base_url) from error

    def close(self) -> None:
        """Close every connection."""
        self._http.close()


class AsyncTransport:
    """The same for asyncio; belongs to one event loop."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._http = httpx.AsyncClient(**connection.options(httpx.AsyncHTTPTransport))

    async def send(self, request: Request) -> Answer:
        """The answer to a request, a success.

        Raises:
            ConnectionFailed: there was none before the deadline.
            PrefixServiceError: the service reported it.
        """
        attempts = _Attempts(request, self._connection.timeout)
        while True:
            try:
                return require_success(await self._once(request, attempts.left))
            except PrefixServiceError as error:
                if attempts.found_done(error):
                    return Answer(204, {}, bytearray())
                await asyncio.sleep(attempts.pause_after(error))

    async def _once(self, request: Request, timeout: float) -> Answer:  # noqa: ASYNC109 - handed on to httpx
        try:
            async with self._http.stream(**_arguments(request, timeout)) as response:
                body = _Body(response)
                async for chunk in response.aiter_raw():
                    body.add(chunk)
                return body.answer()
        except httpx.TransportError as error:
            raise _failed(error, self._connection.base_url) from error

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()


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


def _failed(error: Exception, base_url: str) -> ConnectionFailed:
    kind = "did not answer in time" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
    return ConnectionFailed(f"{base_url} {kind}: {str(error) or type(error).__name__}")
