"""Connects to a service: its address, the certificates to trust, and the deadline of a call."""

import socket
import ssl
import struct
from collections.abc import Mapping
from copy import copy
from pathlib import Path

import httpx

from prefix_service.client.protocol import Request
from prefix_service.client.service_state import ServiceState
from prefix_service.client.transport import dialling
from prefix_service.client.transport.dialling import time_left
from prefix_service.errors import ConnectionFailed, InvalidRequest
from prefix_service.system.forks import close_in_child, renew_in_child


class NotConnected(OSError):
    """There is no connection, so no part of the request was sent."""


class Connection:
    """A service's URL, key, Unix socket, certificate authorities, and the deadline of a call in seconds. `service` is
    what is known of the service, by its answers at this address and others.

    Raises:
        InvalidRequest: the URL is not one of http or https, the key has characters that no header can carry, or
            `ca_file` cannot be read.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        uds: str | Path | None = None,
        ca_file: str | Path | None = None,
        timeout: float = 60.0,
        service: ServiceState | None = None,
    ) -> None:
        self.url = _parsed(base_url)
        self.api_key, self.uds, self.timeout = api_key, uds, timeout
        self.peer_uid: int | None = None  # of the process that listens on the most recently dialled Unix socket
        self.service = service or ServiceState()
        self.address = _address(self.url, uds)
        """For error messages."""
        self.port = self.url.port or (443 if self.url.scheme == "https" else 80)
        self._host = self.url.raw_host
        self._ca_file = ca_file
        if api_key is not None and not isinstance(api_key, str):
            raise InvalidRequest(f"the API key must be a str, got {type(api_key).__name__}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise InvalidRequest(
                "the API key has characters that a key cannot have: a line break, or a letter beyond ASCII"
            )
        self._tls = None if self.url.scheme == "http" else _trusting(ca_file)
        renew_in_child(self)

    @property
    def is_numeric(self) -> bool:
        """Whether the URL has an IP address instead of a name."""
        return dialling.is_numeric(self._host)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "prefix-service-client"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers

    def note_answer(self, request: Request, headers: Mapping[str, str], began: float) -> None:
        """Notes what the headers of an answer say of the service; its request was sent at the time `began` of
        `time.monotonic`.

        Raises:
            InvalidResponse: another catalog answered than before.
        """
        self.service.note_answer(self.address, request, headers, began)

    def renew(self) -> None:
        """Drops the TLS context in a forked child, since a thread of the parent may have held a lock in it.

        The next connection makes a new one, because reading the certificates takes 20 ms and more.
        """
        self._tls = None

    def at(self, host: str) -> "Connection":
        """Returns a connection to one of the addresses of the name in the URL, with the same certificate to expect."""
        one = copy(self)
        one._host = host.encode("ascii")
        one.address = f"{self.address} ({host})"
        renew_in_child(one)
        return one

    def dial(self, until: float) -> socket.socket:
        """Returns a new connection, including its TLS handshake, made before the time `until` of `time.monotonic`.

        Raises:
            NotConnected: no connection could be made; its cause has the reason.
        """
        try:
            dialled = self._dial_unix(until) if self.uds is not None else self._dial_tcp(until)
            return dialled if self.url.scheme == "http" else self._secured(dialled, until)
        except (OSError, ValueError) as error:  # ValueError: a name that no certificate can have
            raise NotConnected(str(error) or type(error).__name__) from error

    def _dial_unix(self, until: float) -> socket.socket:
        dialled = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        close_in_child(dialled)
        try:
            dialled.settimeout(time_left(until))
            dialled.connect(str(self.uds))
            self.peer_uid = _peer_uid(dialled)
        except BaseException:
            dialled.close()
            raise
        return dialled

    def _dial_tcp(self, until: float) -> socket.socket:
        return dialling.connect(self._host, self.port, until)

    def _secured(self, dialled: socket.socket, until: float) -> socket.socket:
        try:
            if self._tls is None:
                self._tls = _trusting(self._ca_file)
            # Else a truncated connection would look like the end of a body without a length.
            secured = self._tls.wrap_socket(
                dialled,
                server_hostname=self.url.raw_host.decode("ascii"),
                suppress_ragged_eofs=False,
                do_handshake_on_connect=False,
            )
        except BaseException:
            dialled.close()
            raise
        close_in_child(secured)
        try:
            secured.settimeout(time_left(until))  # for the whole handshake
            secured.do_handshake()
        except BaseException:
            secured.close()
            raise
        return secured


def _address(url: httpx.URL, uds: str | Path | None) -> str:
    """Returns a Unix socket's path, or a URL without user name and password."""
    if uds is not None:
        return f"unix:{uds}"
    return str(url.copy_with(username=None, password=None)) if url.userinfo else str(url)


def _trusting(ca_file: str | Path | None) -> ssl.SSLContext:
    try:
        context = httpx.create_ssl_context() if ca_file is None else ssl.create_default_context(cafile=str(ca_file))
    except OSError as error:
        raise InvalidRequest(f"ca_file {ca_file} has no certificates that can be read: {error}") from error
    context.set_alpn_protocols(["http/1.1"])
    return context


def _parsed(base_url: str) -> httpx.URL:
    if not isinstance(base_url, str | httpx.URL):
        raise InvalidRequest(f"the service's URL must be a str, got {type(base_url).__name__}")
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise InvalidRequest(f"the service's URL cannot be read: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidRequest(f"the service's URL must begin with http:// or https://, got {base_url!r:.100}")
    if url.port is not None and not 0 < url.port < 65536:
        raise InvalidRequest(f"the service's URL has port {url.port}, and ports end at 65535: {base_url!r:.100}")
    if url.query or url.fragment:
        raise InvalidRequest(f"the service's URL must end with its path, without ? and #, got {base_url!r:.100}")
    return url


def connection_failed(error: Exception, address: str) -> ConnectionFailed:
    """Returns a ConnectionFailed for an error of a socket or of httpx."""
    late = (TimeoutError, httpx.TimeoutException)
    kind = "did not answer in time" if isinstance(error, late) or isinstance(error.__cause__, late) else None
    return ConnectionFailed(f"{address} {kind or 'cannot be reached'}: {str(error) or type(error).__name__}")


def _peer_uid(connected: socket.socket) -> int | None:
    """Returns the user of the process that listens on a Unix socket (unix(7), SO_PEERCRED).

    Returns None on systems without that option.
    """
    option: int | None = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    _, uid, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i")))
    return int(uid)
