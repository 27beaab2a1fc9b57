"""A real server meets more connections than a process takes, and connections that end at any moment."""

import contextlib
import json
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import httpx
import pytest

from prefix_service.settings import Settings
from tests.api.helpers import RawAnswer, assert_alive, head, read_answer, upload, versions_path
from tests.commands import PREFIX_SERVICE
from tests.conftest import Server, running_server

MOST = 40
FLOOD = 300
LARGE: dict[str, Any] = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 64, "num_layers": 8} | {
    "num_attention_heads": 8,
    "token_dim": 512,
}  # 2 MiB in float32


@pytest.fixture(scope="module", params=["httptools", "h11"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service with this parser that takes few connections."""
    environment = {"PREFIX_HTTP_PARSER": request.param, "PREFIX_MAX_CONNECTIONS": str(MOST)}
    with running_server(tmp_path_factory.mktemp(request.param) / "data", environment=environment) as running:
        made = running.client().post(versions_path("t", "large"), json={"config": LARGE, "seed": 1})
        assert made.status_code == 201
        yield running


def connected(server: Server, sent: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
    """Returns a connection that sent something, from an address of this machine."""
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=60, source_address=(source, 0))
    connection.sendall(sent)
    return connection


def is_open(connection: socket.socket) -> bool:
    """Returns whether the service has not ended a connection that it has not answered on."""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    finally:
        connection.settimeout(60)


def answered(connection: socket.socket) -> RawAnswer:
    connection.sendall(head("GET", "/livez"))
    return read_answer(connection)


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHost: a\r\nX: "], ids=["nothing", "a part of a head"])
def test_idle_connections_of_one_peer_shut_nobody_out(server: Server, sent: bytes) -> None:
    """A flood without a key loses its own places, and no other peer's; the newest connections are served."""
    with ExitStack() as stack:
        calm = stack.enter_context(connected(server, source="127.0.0.2"))
        assert answered(calm).status == 200
        flood = [stack.enter_context(connected(server, sent, "127.0.0.3")) for _ in range(FLOOD)]
        assert httpx.get(f"{server.url}/livez", timeout=60).status_code == 200
        assert answered(calm).status == 200
        still = [is_open(connection) for connection in flood]
        assert sum(still) < MOST
        assert still[-1]
    assert_alive(server)


def test_connections_with_requests_in_progress_stay(server: Server) -> None:
    """If all connections have requests, a new one is refused; when a request ends, its place is free. (No address has
    more than half of them, or one whose reader has stalled would give way.)"""
    slow = head(
        "GET", "/v1/tenants/t/adapters/large@1/prefix?batch_size=64", Authorization=f"Bearer {server.admin_key}"
    )
    with ExitStack() as stack:
        readers: list[socket.socket] = []
        for number in range(MOST):  # one by one: until its request is read, a connection is idle, and gives way
            readers.append(stack.enter_context(connected(server, slow, f"127.0.0.{2 + number % 2}")))
            assert readers[-1].recv(1)
        with connected(server) as refused:
            answer = read_answer(refused)
            assert (answer.status, answer.headers["content-type"]) == (503, "application/problem+json")
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["connection"] == "close"
            assert json.loads(answer.body)["code"] == "overloaded"
            assert refused.recv(1) == b""
        for reader in readers:
            assert reader.recv(1)
        readers[0].close()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with connected(server) as last, contextlib.suppress(OSError):
                if answered(last).status == 200:
                    break
        else:
            pytest.fail("the place did not become free")
    assert_alive(server)


def test_the_end_does_not_wait_for_idle_connections(tmp_path: Path) -> None:
    """SIGTERM ends a service with thousands of idle connections, some with a part of a head, with status 0."""
    with running_server(tmp_path / "data") as server, ExitStack() as stack:
        for number in range(2000):
            stack.enter_context(connected(server, b"GET /" * (number % 2)))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=90) == 0
        assert "timeout graceful shutdown exceeded" not in server.log.read_text()


@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_the_end_does_not_cut_off_who_waits_for_a_turn(tmp_path: Path, parser: str) -> None:
    """SIGTERM while pipelined requests of a hundred connections wait for their turns: a connection ends behind a whole
    answer, and the service with status 0."""
    with running_server(tmp_path / "data", environment={"PREFIX_HTTP_PARSER": parser}) as server, ExitStack() as stack:
        asked = head("GET", "/v1/whoami", Authorization=f"Bearer {server.admin_key}") * 30
        peers = [stack.enter_context(connected(server, asked)) for _ in range(100)]
        assert read_answer(peers[0]).status == 200
        server.process.send_signal(signal.SIGTERM)
        for peer in peers[1:]:
            with peer.makefile("rb") as answers:
                assert_whole(answers)
        assert server.process.wait(timeout=90) == 0
        log = server.log.read_text()
        assert "timeout graceful shutdown exceeded" not in log
        assert "Traceback" not in log


def assert_whole(answers: BinaryIO) -> None:
    """Reads answers to the end of a connection, which is not within one of them."""
    while line := answers.readline():
        assert line == b"HTTP/1.1 200 OK\r\n"
        fields = dict(field.lower().split(b": ", 1) for field in iter(answers.readline, b"\r\n"))
        length = int(fields[b"content-length"])
        assert len(answers.read(length)) == length


def with_files(limit: str) -> list[str]:
    """Returns the program with this limit of open files."""
    return ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", *PREFIX_SERVICE]


def test_the_soft_limit_of_files_is_raised(tmp_path: Path) -> None:
    """The service raises its soft limit of files to the hard one, because a shell may have set 1,024; and the kernel's
    table of its files has room for all connections, so that no `accept` waits for the table to grow."""
    with running_server(tmp_path / "data", program=with_files("-S -n 300")) as server:
        soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        assert soft == min(hard, 1 << 20)
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        assert int(status.partition("FDSize:")[2].split()[0]) > 2 * Settings().max_connections


def test_a_flood_leaves_files_for_work(tmp_path: Path) -> None:
    """Uploads and cold reads go on during more idle connections without a key than the process may open files."""
    with running_server(tmp_path / "data", program=with_files("-n 400")) as server, ExitStack() as stack:
        started = next(
            line for line in map(json.loads, server.log.read_text().splitlines()) if line["event"] == "serving"
        )
        assert started["connections"] == (400 - 256) // 2
        for _ in range(1000):
            stack.enter_context(connected(server, source="127.0.0.3"))
        assert upload(server.client(), "t", "a").status_code == 201
        assert server.client().get("/v1/tenants/t/adapters/a/prefix").status_code == 200


# Resets


def reset(connection: socket.socket) -> None:
    """Ends a connection by RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _upload(server: Server, **fields: str) -> bytes:
    key = f"Bearer {server.admin_key}"
    return head(
        "POST", versions_path("t", "r"), Authorization=key, Content_Type="multipart/form-data; boundary=x", **fields
    )


STAGES: dict[str, Callable[[Server], bytes]] = {
    "nothing": lambda _: b"",
    "in the head": lambda _: b"GET /livez HTTP/1.1\r\nHost",
    "behind a request": lambda _: head("GET", "/livez"),
    "in a body with a length": lambda server: _upload(server, Content_Length="100000") + b"--x\r\n",
    "in a chunked body": lambda server: _upload(server, Transfer_Encoding="chunked") + b"5\r\n--x\r\n",
    "in a JSON body": lambda server: (
        head(
            "POST",
            "/v1/prefixes",
            Authorization=f"Bearer {server.admin_key}",
            Content_Type="application/json",
            Content_Length="1000",
        )
        + b"{"
    ),
    "before 100 Continue": lambda server: _upload(server, Content_Length="100000", Expect="100-continue"),
    "in a body that was answered early": lambda _: (
        head("POST", versions_path("t", "r"), Content_Length="1000000") + b"a"
    ),
    "lingering": lambda _: b"no HTTP\r\n\r\n" + b"a" * 100_000,
    "pipelined": lambda _: head("GET", "/livez") * 100,
    "in the answer": lambda server: head(
        "GET", "/v1/tenants/t/adapters/large@1/prefix?batch_size=64", Authorization=f"Bearer {server.admin_key}"
    ),
    "in the weights": lambda server: head(
        "GET", "/v1/tenants/t/adapters/large@1/parameters", Authorization=f"Bearer {server.admin_key}"
    ),
    "in the metrics": lambda server: head("GET", "/metrics", Authorization=f"Bearer {server.admin_key}"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("waits", [False, True], ids=["immediately", "after what came"])
def test_a_reset_leaves_no_traceback(server: Server, stage: str, waits: bool) -> None:
    """A reset in any stage of a request logs neither an error nor a traceback."""
    before = len(server.log.read_text())
    for _ in range(5):
        connection = connected(server, STAGES[stage](server))
        if waits:
            connection.settimeout(0.2)
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                connection.recv(1)
        reset(connection)
    assert answered_soon(server)
    text = server.log.read_text()[before:]
    for word in (
        "Traceback",
        "Exception in ASGI",
        "never retrieved",
        "was destroyed",
        "Fatal error",
        '"level": "error"',
    ):
        assert word not in text, text


def answered_soon(server: Server) -> bool:
    """Waits until the only request in flight is the one that asks; returns whether that came."""
    client, deadline = server.client(), time.monotonic() + 60
    while time.monotonic() < deadline:
        text = client.get("/metrics").text
        line = next(line for line in text.splitlines() if line.startswith("prefix_service_requests_in_flight"))
        if float(line.split()[1]) <= 1:
            return True
        time.sleep(0.05)
    return False
