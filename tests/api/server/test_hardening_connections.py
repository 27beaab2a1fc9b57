"""With either parser the service bounds and ends large heads, bad framing, slow senders and slow readers."""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.api.helpers import (
    CONFIG,
    RawAnswer,
    assert_alive,
    head,
    peak_memory,
    raw,
    read_answer,
    sent_whole,
    upload,
    versions_path,
    weights,
)
from tests.conftest import Server, running_server
from tests.processes import eventually, lines_of

TENANT = "hard-conn"
VERSIONS = versions_path(TENANT, "slow")
MIB = 1 << 20
RECEIVE = 2.0
SEND = 2.0
SLACK = 20.0  # an eighth of the deadline, and a machine that is busy
LARGE = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 256, "num_layers": 16} | {
    "num_attention_heads": 8,
    "token_dim": 1024,
}  # 32 MiB in float32: 256 rows make 8 GiB


@pytest.fixture(scope="module", params=["httptools", "h11"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service with this parser that does not wait long."""
    environment = {
        "PREFIX_HTTP_PARSER": request.param,
        "PREFIX_RECEIVE_TIMEOUT": str(RECEIVE),
        "PREFIX_SEND_TIMEOUT": str(SEND),
    }
    with running_server(tmp_path_factory.mktemp(request.param) / "data", environment=environment) as running:
        made = running.client().post(versions_path(TENANT, "large"), json={"config": LARGE, "init_weights": "zero"})
        assert made.status_code == 201, made.text
        yield running


def connected(server: Server, receive_buffer: int | None = None) -> socket.socket:
    """Returns a connection; a small buffer lets the service notice a reader that does not read."""
    address = urlsplit(server.url)
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect((address.hostname, address.port))
    return connection


def refused(answer: RawAnswer, status: int, code: str) -> None:
    """Checks that the answer is a problem document, and the last of its connection."""
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.headers["connection"] == "close"
    body = json.loads(answer.body)
    assert (body["status"], body["code"]) == (status, code)
    assert body["detail"]


def sent_and_refused(server: Server, sent: bytes, status: int, code: str) -> None:
    """Sends all that is taken, reads the refusal, and sees the connection end."""
    with connected(server) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not be read to its end
            connection.sendall(sent)
        refused(read_answer(connection), status, code)
        ended(connection)


def ended(connection: socket.socket) -> None:
    """Reads until the service has ended the connection."""
    try:
        while connection.recv(MIB):
            pass
    except ConnectionResetError:
        pass


def upload_head(server: Server, **fields: str) -> bytes:
    """Returns the head of an upload."""
    key = f"Bearer {server.admin_key}"
    return head("POST", VERSIONS, Authorization=key, Content_Type="multipart/form-data; boundary=x", **fields)


def upload_body() -> bytes:
    """Returns a sound upload, as it is sent."""
    config, file = json.dumps(CONFIG).encode(), weights()
    part = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    return part % (b"adapter_config.json", config) + part % (b"adapter_model.safetensors", file) + b"--x--\r\n"


def chunk(data: bytes) -> bytes:
    """Returns a chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


# 19: heads


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(b"X-Large: " + b"a" * MIB + b"\r\n", id="one field of a megabyte"),
        pytest.param(b"".join(b"X-%06d: %s\r\n" % (i, b"a" * 80) for i in range(11_000)), id="a megabyte of fields"),
        pytest.param(b"".join(b"X-%d: a\r\n" % i for i in range(10_000)), id="10,000 fields"),
        pytest.param(b"".join(b"X-%d: a\r\n" % i for i in range(100)), id="100 fields and Host"),
        pytest.param(b"X-Large: " + b"a" * (64 << 10) + b"\r\n", id="just above 64 KiB"),
    ],
)
def test_heads_are_bounded(server: Server, fields: bytes) -> None:
    """A large head is a 431, and takes no memory."""
    raw(server, head("GET", "/livez"))
    before = peak_memory(server)
    for _ in range(4):
        sent_and_refused(
            server, b"GET /livez HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n", 431, "header-fields-too-large"
        )
    assert peak_memory(server) - before < 4 * MIB
    assert_alive(server)


def test_refusal_reaches_who_still_sends(server: Server) -> None:
    """The service reads what follows a refusal for a while, because a reset would lose some peers the answer."""
    before = peak_memory(server)
    with connected(server) as connection:
        is_whole = sent_whole(connection, b"GET /livez HTTP/1.1\r\nHost: a\r\nX-Large: " + b"a" * 32 * MIB)
        refused(read_answer(connection), 431, "header-fields-too-large")
        assert not is_whole or connection.recv(1) == b""
    assert peak_memory(server) - before < 4 * MIB


def test_heads_below_the_bounds_are_taken(server: Server) -> None:
    """100 fields, and one of 60 KiB, are accepted, also in pieces."""
    fields = b"".join(b"X-%d: a\r\n" % i for i in range(99))
    assert raw(server, b"GET /livez HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n").status == 200
    large = b"GET /livez HTTP/1.1\r\nHost: a\r\nX-Large: " + b"a" * (60 << 10) + b"\r\n\r\n"
    assert raw(server, large).status == 200
    assert raw(server, *(large[at : at + 4096] for at in range(0, len(large), 4096))).status == 200


def test_many_small_heads_and_bodies_are_not_one_large_head(server: Server) -> None:
    """The bound counts one head: neither earlier ones of its connection, nor bodies."""
    with connected(server) as connection:
        for _ in range(1000):
            connection.sendall(head("GET", "/livez", X_Filler="a" * 200))
            assert read_answer(connection).status == 200
        body = b'{"config": {}}' + b" " * (MIB - 100)
        key = f"Bearer {server.admin_key}"
        fields = {"Authorization": key, "Content-Type": "application/json"}
        connection.sendall(head("POST", VERSIONS, Content_Length=str(len(body)), **fields) + body)
        assert read_answer(connection).status == 422
        connection.sendall(head("GET", "/livez"))
        assert read_answer(connection).status == 200


def test_trailers_and_chunk_extensions_are_bounded(server: Server) -> None:
    """Trailers and chunk extensions are bounded like heads, so that a body without data takes no memory."""
    before = peak_memory(server)
    for endless in (b"0\r\n" + b"X: a\r\n" * 500_000, b"1;" + b"a" * 4 * MIB):
        sent_and_refused(
            server, upload_head(server, Transfer_Encoding="chunked") + endless, 431, "header-fields-too-large"
        )
    assert peak_memory(server) - before < 8 * MIB


@pytest.mark.parametrize("hosts", [b"", b"Host: a\r\nHost: b\r\n", b"Host: a\r\nHost: a\r\n"])
def test_one_host(server: Server, hosts: bytes) -> None:
    """A request without a Host, or with two, is a 400, whatever they say."""
    sent_and_refused(server, b"GET /livez HTTP/1.1\r\n" + hosts + b"\r\n", 400, "malformed-request")
    assert raw(server, b"GET /livez HTTP/1.0\r\n\r\n").status == 200


# 20: framing


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="length before encoding"),
        pytest.param(b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", id="length after encoding"),
        pytest.param(b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", id="two lengths"),
        pytest.param(b"Content-Length: +5\r\n\r\nhello", id="a signed length"),
        pytest.param(b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", id="two encodings"),
        pytest.param(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="encoded twice"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", id="size that is no number"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n-1\r\na\r\n0\r\n\r\n", id="negative size"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n1\r\naXX0\r\n\r\n", id="chunk without its end"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n", id="bare line feed"),
        pytest.param(b"A : b\r\n\r\n", id="space before the colon"),
        pytest.param(b"A: b\0\r\n\r\n", id="a NUL"),
    ],
)
def test_ambiguous_framing(server: Server, rest: bytes) -> None:
    """Ambiguous framing is a 400 and ends the connection, so that no rest of it is read as the next request."""
    fields = f"Authorization: Bearer {server.admin_key}\r\nContent-Type: application/json\r\n".encode()
    sent_and_refused(
        server, f"POST {VERSIONS} HTTP/1.1\r\nHost: a\r\n".encode() + fields + rest, 400, "malformed-request"
    )
    assert_alive(server)


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"hello\r\n\r\n", b"GET\r\n\r\n"])
def test_what_is_not_http(server: Server, sent: bytes) -> None:
    """A TLS hello, or any other bytes, are a 400."""
    sent_and_refused(server, sent, 400, "malformed-request")


def test_an_answer_is_never_interrupted_by_a_refusal(server: Server) -> None:
    """Malformed bytes after a request cut the connection during its answer, and add nothing to the answer."""
    path = f"/v1/tenants/{TENANT}/adapters/large@1/prefix"
    with connected(server) as connection:
        fields = {"Authorization": f"Bearer {server.admin_key}"}
        connection.sendall(head("GET", f"{path}?batch_size=4", **fields) + b"no HTTP\r\n\r\n")
        received = bytearray()
        try:
            while piece := connection.recv(MIB):
                received += piece
        except ConnectionResetError:
            pass
    assert received.count(b"HTTP/1.1 ") <= 2  # h11 reads on when the answer is complete
    assert b"problem+json" not in received[: 128 * MIB]


# 21: slow senders


def slowly(server: Server, first: bytes, more: Callable[[], bytes]) -> tuple[RawAnswer, float]:
    """Sends something, then a little ten times a second; returns the answer, and how many seconds after the attempt to
    connect it came."""
    began = time.monotonic()
    with connected(server) as connection:
        connection.sendall(first)
        connection.settimeout(0.1)
        while time.monotonic() - began < 60:
            try:
                if connection.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:
                connection.sendall(more())
        seconds = time.monotonic() - began
        connection.settimeout(60)
        answer = read_answer(connection)
        ended(connection)
    return answer, seconds


@pytest.mark.parametrize(
    ("first", "more"),
    [
        pytest.param(b"", b"", id="nothing"),
        pytest.param(b"GET /livez HTT", b"", id="a part"),
        pytest.param(b"GET /livez HTTP/1.1\r\nHost: a\r\n", b"X: a\r\n", id="a field now and then"),
        pytest.param(b"GET /livez HTTP/1.1\r\nHost: a\r\nX: ", b"a", id="a byte now and then"),
    ],
)
def test_slow_heads(server: Server, first: bytes, more: bytes) -> None:
    """A slow head is a 408 at the deadline, whatever still comes."""
    answer, seconds = slowly(server, first, lambda: more)
    refused(answer, 408, "request-timeout")
    assert 0.8 * RECEIVE < seconds < RECEIVE + SLACK


def test_slow_head_on_a_connection_that_was_used(server: Server) -> None:
    """The deadline starts with each head, and idle connections stay."""
    with connected(server) as connection:
        for _ in range(2):
            connection.sendall(head("GET", "/livez"))
            assert read_answer(connection).status == 200
            time.sleep(RECEIVE + 0.5)
        connection.sendall(b"GET /livez")
        refused(read_answer(connection), 408, "request-timeout")


@pytest.mark.parametrize("encoding", ["length", "chunked"])
@pytest.mark.parametrize("more", [b"", b"a"], ids=["stops", "a byte now and then"])
def test_slow_bodies(server: Server, encoding: str, more: bytes) -> None:
    """A slow body is a 408 and ends the connection, and nothing of the upload is left or visible."""
    body = upload_body()[:-20]
    if encoding == "length":
        first, piece = upload_head(server, Content_Length=str(len(body) + 1000)) + body, more
    else:
        first, piece = upload_head(server, Transfer_Encoding="chunked") + chunk(body), more and chunk(more)
    answer, seconds = slowly(server, first, lambda: piece)
    refused(answer, 408, "request-timeout")
    assert 0.8 * RECEIVE < seconds < RECEIVE + SLACK
    assert server.client().get(f"/v1/tenants/{TENANT}/adapters/slow").status_code == 404
    eventually(lambda: not list((server.data_dir / "blobs" / "staging").iterdir()))


def test_body_that_never_ends(server: Server) -> None:
    """An endless preamble in single bytes is ended, and a slow sender above the minimum rate is served."""
    answer, _ = slowly(server, upload_head(server, Transfer_Encoding="chunked"), lambda: chunk(b"\r\n"))
    refused(answer, 408, "request-timeout")
    body = upload_body()
    padded = b"\r\n" * (8 << 10) * 20 + body  # 20 times 16 KiB before the first part
    with connected(server) as connection:
        connection.sendall(upload_head(server, Content_Length=str(len(padded))).replace(b"/slow/", b"/steady/"))
        for at in range(0, len(padded), 16 << 10):
            connection.sendall(padded[at : at + (16 << 10)])
            time.sleep(2 * RECEIVE / 20)
        assert read_answer(connection).status == 201


def test_rest_of_a_body_that_was_answered_early(server: Server) -> None:
    """A client that is refused for its key cannot go on sending its body for ever."""
    with connected(server) as connection:
        connection.sendall(head("POST", VERSIONS, Content_Type="application/json", Content_Length=str(1 << 40)))
        assert read_answer(connection).status == 401
        began = time.monotonic()
        try:
            while time.monotonic() - began < 60:
                connection.sendall(b"a")
                time.sleep(0.05)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert time.monotonic() - began < RECEIVE + SLACK


# 24: readers that never read


def resident_memory(server: Server) -> int:
    """Returns the bytes that the server has in memory now."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) << 10


def large_answers(server: Server, count: int) -> list[socket.socket]:
    """Returns connections that asked for 256 MiB each, and did not read; all answers have begun."""
    path = f"/v1/tenants/{TENANT}/adapters/large@1/prefix?batch_size=8"
    key = server.admin_key
    assert server.client().get(path.replace("=8", "=1")).status_code == 200  # resident, rendered
    connections = [connected(server, 64 << 10) for _ in range(count)]
    for connection in connections:
        connection.sendall(head("GET", path, Authorization=f"Bearer {key}"))
    for connection in connections:
        assert connection.recv(1, socket.MSG_PEEK)
    return connections


def await_end_of_answers(server: Server, connections: list[socket.socket], trickle: bool) -> None:
    """Waits until the only request in flight is the one that asks."""
    client, until = server.client(), time.monotonic() + 60
    while time.monotonic() < until:
        if trickle:
            for connection in connections:
                with contextlib.suppress(ConnectionResetError):
                    connection.recv(64)
        told = client.get("/metrics").text
        in_flight = next(line for line in told.splitlines() if line.startswith("prefix_service_requests_in_flight"))
        if float(in_flight.split()[1]) <= 1:
            return
        time.sleep(0.05)
    raise AssertionError("the readers were not cut off")


@pytest.mark.parametrize("trickle", [False, True], ids=["never", "a few bytes now and then"])
def test_readers_that_do_not_read(server: Server, trickle: bool) -> None:
    """Memory for each of four readers is bounded, and the deadline ends their requests."""
    large_answers(server, 1)[0].close()
    before = resident_memory(server)
    began = time.monotonic()
    connections = large_answers(server, 4)
    time.sleep(0.5)
    grown = resident_memory(server) - before
    assert grown < 4 * 4 * MIB
    await_end_of_answers(server, connections, trickle)
    assert 0.5 * SEND < time.monotonic() - began < SEND + 2 * SLACK
    for connection in connections:
        connection.close()
    assert_alive(server)


def test_slow_readers_that_read_are_served(server: Server) -> None:
    """A reader far slower than the service, and longer than the deadline, gets every byte."""
    (connection,) = large_answers(server, 1)
    received, began = 0, time.monotonic()
    with connection:
        while time.monotonic() - began < 2 * SEND:
            received += len(connection.recv(256 << 10))
            time.sleep(0.02)
        while piece := connection.recv(MIB):
            received += len(piece)
            if received >= 256 * MIB:
                break
    assert received >= 256 * MIB


def test_refusals_are_told_in_the_log(server: Server) -> None:
    """A refusal is logged at info with status and code, and without anything that the peer sent."""
    secret = b"GET /livez HTTP/1.1\r\nHost: a\r\nAuthorization : Bearer pfx_secret\r\n\r\n"
    sent_and_refused(server, secret, 400, "malformed-request")
    expected = {"level": "info", "status": 400, "code": "malformed-request"}.items()
    # A line is written behind the answer.
    eventually(lambda: any(expected <= line.items() for line in lines_of(server.log, "a connection was refused")))
    assert "pfx_secret" not in server.log.read_text()


def test_uploads_still_arrive(server: Server) -> None:
    """Uploads are served with either parser."""
    assert upload(server.client(), TENANT, "sound").status_code == 201
    assert httpx.get(f"{server.url}/livez").status_code == 200
