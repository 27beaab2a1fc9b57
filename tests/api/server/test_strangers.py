"""Callers without a key that ask for public pages and do not read them keep nobody out, and hold little."""

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from prefix_service.api.http.paths import REFERENCE_FILES
from tests.api.helpers import head, upload, versions_path
from tests.conftest import Server, running_server
from tests.processes import eventually

MOST = 60  # connections
PAGES = head("GET", "/openapi.json") * 8
LARGEST = head("GET", "/docs/swagger-ui-bundle.js") * 8
LARGE: dict[str, Any] = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 64, "num_layers": 8} | {
    "num_attention_heads": 8,
    "token_dim": 512,
}  # 2 MiB in float32
PREFIX = "/v1/tenants/t/adapters/large@1/prefix?batch_size=8"


@pytest.fixture(scope="module", params=["httptools", "h11"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service with this parser that takes few connections."""
    environment = {
        "PREFIX_HTTP_PARSER": request.param,
        "PREFIX_MAX_CONNECTIONS": str(MOST),
        "PREFIX_RECEIVE_TIMEOUT": "4",
    }
    with running_server(tmp_path_factory.mktemp(request.param) / "data", environment=environment) as running:
        made = running.client().post(versions_path("t", "large"), json={"config": LARGE, "seed": 1})
        assert made.status_code == 201
        assert upload(running.client(), "t", "a").status_code == 201
        yield running


def connected(server: Server, sent: bytes, source: str) -> socket.socket:
    """Returns a connection from an address of this machine that sent something, and has a small buffer."""
    address = urlsplit(server.url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.bind((source, 0))
    connection.connect((address.hostname, address.port))
    connection.sendall(sent)
    return connection


def is_answered(connection: socket.socket) -> bool:
    """Returns whether an answer has begun that is no refusal, without reading it."""
    try:
        return connection.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
    except ConnectionResetError:
        return False


def reads_on(connection: socket.socket) -> bool:
    """Returns whether more comes than the caller's buffers held, so that its connection was not reset."""
    left = 128 << 10
    try:
        while left > 0 and (piece := connection.recv(left)):
            left -= len(piece)
    except ConnectionResetError:
        return False
    return left == 0


def reading(server: Server) -> bytes:
    return head("GET", PREFIX, Authorization=f"Bearer {server.admin_key}")


def test_connections_that_read_no_public_page_give_way(server: Server) -> None:
    """New callers are served although a flood has taken all places, and a slow reader with a key reads on."""
    with ExitStack() as stack:
        slow = stack.enter_context(connected(server, reading(server), "127.0.0.3"))
        assert is_answered(slow)
        for _ in range(2 * MOST):
            is_answered(stack.enter_context(connected(server, PAGES, "127.0.0.2")))
        for _ in range(5):
            assert httpx.get(f"{server.url}/livez", timeout=60).status_code == 200
            assert server.client().get("/v1/tenants/t/adapters/a/prefix").status_code == 200
        assert reads_on(slow)


def test_readers_with_a_key_that_take_nothing_give_way_to_others(server: Server) -> None:
    """An address with more than half of all connections loses the longest stalled, and its neighbour none."""
    with ExitStack() as stack:
        calm = [stack.enter_context(connected(server, reading(server), "127.0.0.3")) for _ in range(2)]
        assert all(map(is_answered, calm))
        for _ in range(MOST - 2):  # one by one: until its request is read, a connection is idle, and gives way
            assert is_answered(stack.enter_context(connected(server, reading(server), "127.0.0.2")))
        eventually(lambda: httpx.get(f"{server.url}/livez", timeout=60).status_code == 200)
        assert all(map(reads_on, calm))


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_the_end_does_not_wait_for_who_reads_no_public_page(tmp_path: Path, parser: str) -> None:
    """SIGTERM ends the service in order, and no request that was cut off leaves a traceback."""
    with running_server(tmp_path / "data", environment={"PREFIX_HTTP_PARSER": parser}) as server, ExitStack() as stack:
        for _ in range(MOST):
            assert is_answered(stack.enter_context(connected(server, PAGES, "127.0.0.2")))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=90) == 0
        assert "timeout graceful shutdown exceeded" not in server.log.read_text()
        assert "Traceback" not in server.log.read_text()


def test_a_page_is_made_once_and_has_an_entity_tag(server: Server) -> None:
    """A client that has a page gets 304, and other methods are answered as before."""
    for path in ("/openapi.json", *REFERENCE_FILES):
        first, again = (httpx.get(server.url + path) for _ in range(2))
        assert first.status_code == 200
        assert (first.content, first.headers["etag"]) == (again.content, again.headers["etag"])
        known = httpx.get(server.url + path, headers={"If-None-Match": first.headers["etag"]})
        assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", first.headers["etag"])
        length = httpx.head(server.url + path).headers["content-length"]
        assert length == first.headers["content-length"]
    assert json.loads(httpx.get(f"{server.url}/openapi.json").content)["openapi"]


def memory(server: Server) -> int:
    """Returns the bytes of the process that are resident now."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def test_unread_pages_are_no_copies(server: Server) -> None:
    """A connection that does not read several pages holds less than one page."""
    for path, asked in (("/openapi.json", PAGES), ("/docs/swagger-ui-bundle.js", LARGEST)):
        page = len(httpx.get(server.url + path).content)
        with ExitStack() as stack:
            before = memory(server)
            for _ in range(MOST):
                is_answered(stack.enter_context(connected(server, asked, "127.0.0.2")))
            assert memory(server) - before < MOST * min(page, 1 << 18)
