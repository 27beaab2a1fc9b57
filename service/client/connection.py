"""How to reach a service: where it is, whom to trust, and the deadline of a call."""

import socket
import ssl
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from service.errors import ConnectionFailed, InvalidRequest


@dataclass(frozen=True)
class Connection:
    """A service's URL, key, Unix socket, certificate authorities, and the deadline of a call in seconds. `http`
    replaces every transport of the client's own.

    Raises:
        InvalidRequest: the URL is not one of http or https, or the key has characters that no header takes.
    """

    base_url: str
    api_key: str | None = None
    uds: str | Path | None = None
    ca_file: str | Path | None = None
    timeout: float = 60.0
    http: httpx.BaseTransport | httpx.AsyncBaseTransport | None = None

    def __post_init__(self) -> None:
        if self.url.scheme not in ("http", "https") or not self.url.host:
            raise InvalidRequest(f"the service's URL must begin with http:// or https://, got {self.base_url!r:.100}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise InvalidRequest("the API key has characters that no key has: a line break, or a letter beyond ASCII")

    @cached_property
    def url(self) -> httpx.URL:
        """The URL in parts."""
        try:
            return httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"the service's URL {self.base_url!r:.100} is none: {error}") from error

    @property
    def _host(self) -> str:
        return self.url.raw_host.decode("ascii")

    @property
    def headers(self) -> dict[str, str]:
        """What goes with every request."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "prefix-service-client"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers

    @cached_property
    def tls(self) -> ssl.SSLContext | None:
        """Whom to trust; None where the URL has no TLS. Reading the authorities takes 20 ms and more."""
        if self.url.scheme == "http":
            return None
        if self.ca_file is None:
            context = httpx.create_ssl_context()
        else:
            context = ssl.create_default_context(cafile=str(self.ca_file))
        context.set_alpn_protocols(["http/1.1"])
        return context

    def options(self, transport: type[httpx.HTTPTransport] | type[httpx.AsyncHTTPTransport]) -> dict[str, Any]:
        """The arguments of `httpx.Client` and `httpx.AsyncClient`."""
        made = self.http or transport(uds=None if self.uds is None else str(self.uds), verify=self.tls or False)
        return {"base_url": self.base_url, "headers": self.headers, "transport": made, "timeout": self.timeout}

    def dial(self, until: float) -> socket.socket:
        """A new connection, with its TLS, before the moment `until` of `time.monotonic`.

        Raises:
            OSError: there is none.
        """
        dialled = self._dial_unix(until) if self.uds is not None else self._dial_tcp(until)
        if self.tls is None:
            return dialled
        try:
            # A ragged end would pass for the end of a body that has no length.
            return self.tls.wrap_socket(dialled, server_hostname=self._host, suppress_ragged_eofs=False)
        except BaseException:
            dialled.close()
            raise

    def _dial_unix(self, until: float) -> socket.socket:
        dialled = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        return _connected(dialled, str(self.uds), until)

    def _dial_tcp(self, until: float) -> socket.socket:
        port = self.url.port or (443 if self.url.scheme == "https" else 80)
        failed: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(self._host, port, type=socket.SOCK_STREAM):
            dialled = socket.socket(family, kind, protocol)
            dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                return _connected(dialled, address, until)
            except OSError as error:
                failed = error
        raise failed or OSError(f"{self._host} has no address")


def connection_failed(error: Exception, base_url: str) -> ConnectionFailed:
    """What a failure of a socket, or of httpx, is called here."""
    late = isinstance(error, TimeoutError | httpx.TimeoutException)
    kind = "did not answer in time" if late else "cannot be reached"
    return ConnectionFailed(f"{base_url} {kind}: {str(error) or type(error).__name__}")


def time_left(until: float) -> float:
    """Seconds until a moment of `time.monotonic`.

    Raises:
        TimeoutError: it has passed.
    """
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _connected(dialled: socket.socket, address: Any, until: float) -> socket.socket:
    try:
        dialled.settimeout(time_left(until))
        dialled.connect(address)
    except BaseException:
        dialled.close()
        raise
    return dialled
