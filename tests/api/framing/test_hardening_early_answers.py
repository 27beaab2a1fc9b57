"""An answer that the service sends before it has read the request's body reaches the client."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from prefix_service.api.server.lingering import _LINGER
from tests.api.framing.conftest import PARSERS
from tests.api.framing.proxies import nginx
from tests.api.framing.victim import TENANT, address
from tests.api.helpers import read_answer, sent_whole, versions_path
from tests.conftest import Server

TIMES = 8
UPLOAD = 20 << 20
PATH = versions_path(TENANT, "early")
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
UNKNOWN_PART = b"--b\r\nContent-Disposition: form-data; name=foo\r\n\r\n" + b"x" * UPLOAD


@pytest.fixture(scope="module", params=["off", "on"], ids=["nginx", "nginx, buffering"])
def proxied(
    request: pytest.FixtureRequest, servers: dict[str, Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Yields the URLs of nginx in front of each service; it asks in HTTP/1.0, which ends a connection with its
    answer."""
    with ExitStack() as stack:
        yield {
            parser: stack.enter_context(
                nginx(server.url, tmp_path_factory.mktemp("early"), buffering=request.param == "on", kept=False)
            )
            for parser, server in servers.items()
        }


@pytest.mark.parametrize("parser", PARSERS)
def test_early_refusals_come_through_nginx(proxied: dict[str, str], servers: dict[str, Server], parser: str) -> None:
    """While 20 MB arrive, a bad key is 401 and an unknown part 422 each time, and never 502."""
    good = f"Bearer {servers[parser].admin_key}"
    for key, status in (("Bearer bad", 401), (good, 422)):
        headers = {"Authorization": key, **FORM}
        for _ in range(TIMES):
            began = time.monotonic()
            answer = httpx.post(proxied[parser] + PATH, content=UNKNOWN_PART, headers=headers, timeout=60)
            if answer.status_code == 502 and time.monotonic() - began > _LINGER:
                continue  # nginx took longer to send than the service reads on
            assert answer.status_code == status


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_early_refusals_reach_direct_clients(server: Server, version: str) -> None:
    """A client that sends its whole body before it reads gets the answer and the end of the connection."""
    sent = f"POST {PATH} HTTP/{version}\r\nHost: a\r\nConnection: close\r\nContent-Length: {UPLOAD}\r\n\r\n"
    for _ in range(TIMES):
        with socket.create_connection(address(server.url), timeout=60) as connection:
            is_whole = sent_whole(connection, sent.encode(), b"x" * UPLOAD)
            assert read_answer(connection).status == 401
            assert not is_whole or connection.recv(1) == b""


def test_the_rest_is_not_awaited_for_long(server: Server) -> None:
    """A client that goes on sending is cut off a few seconds after its answer."""
    sent = f"POST {PATH} HTTP/1.0\r\nContent-Length: {1 << 40}\r\n\r\n"
    with socket.create_connection(address(server.url), timeout=60) as connection:
        connection.sendall(sent.encode())
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_slowly(connection)


def send_slowly(connection: socket.socket) -> None:
    """Sends a byte now and then for 10 seconds."""
    for _ in range(200):
        connection.sendall(b"x")
        time.sleep(0.05)
