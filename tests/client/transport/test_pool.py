"""`transport.pool`: framing of answers, persistent connections, deadlines, cancellation."""

import asyncio
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from prefix_service.client import AsyncPrefixClient, PrefixClient
from prefix_service.client.transport.link import Link, Steps, Wait, carry_out
from prefix_service.errors import ConnectionFailed, InvalidRequest, InvalidResponse, NotFound, Unavailable
from tests.client.conftest import LLAMA
from tests.client.hostile import BODY, Script, answer, hostile_server, prefix_body, read_request, repr_digest, says
from tests.client.test_client import published
from tests.conftest import Server


def is_right(prefix: Any) -> bool:
    """Returns whether the tensors are those of `BODY`."""
    tensor = prefix.kv.tensor
    return torch.equal(tensor, torch.arange(tensor.numel(), dtype=torch.float32).view(3, 2, 2, 20, 8))


def chunked(body: bytes) -> bytes:
    """Returns a body in chunks of 1,000 bytes, as a proxy may send it."""
    parts = [body[start : start + 1000] for start in range(0, len(body), 1000)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


OK = f"HTTP/1.1 200 OK\r\n{repr_digest()}\r\n".encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)

SOUND = {
    "plain": answer(),
    "letters beyond ASCII in the reason": answer(status="200 all's well, déjà".encode().decode("latin-1")),
    "no reason": answer(status="200"),
    "in chunks": OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY),
    "in chunks with a length beside": OK + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY),
    "after 100 Continue": b"HTTP/1.1 100 Continue\r\n\r\n" + answer(),
    "after early hints": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + answer(),
    "until the end": OK + b"Connection: close\r\n\r\n" + BODY,
    "closing": answer(BODY, "Connection: close"),
    "HTTP/1.0": OK.replace(b"HTTP/1.1", b"HTTP/1.0") + LENGTH + b"\r\n" + BODY,
    "the same length twice": OK + LENGTH * 2 + b"\r\n" + BODY,
    "empty header": answer(BODY, "X-Empty:", "X-Blank:   "),
}


@pytest.mark.parametrize("form", SOUND)
def test_every_form_of_answer_is_read(form: str) -> None:
    """Every form of answer that HTTP/1.1 allows is read, by the own reader or by h11, and the next call
    works."""
    with hostile_server(says(SOUND[form]), says(answer())) as server, PrefixClient(server.url, timeout=60) as client:
        client.get("a/b@1")
        assert is_right(client.get("a/b@1"))
        assert is_right(client.get("a/b"))
        assert len(server.requests) == 2  # the first try was answered


FAULTS = {
    "cut off in the body": answer()[:-1],
    "cut off in the head": OK + b"Content-Le",
    "cut off in a chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY)[:-500],
    "nothing": b"",
    "longer than its length": answer() + b"x",
    "two lengths": OK + LENGTH + b"Content-Length: 1\r\n\r\n" + BODY,
    "two lengths, the last right": OK + b"Content-Length: 1\r\n" + LENGTH + b"\r\n" + BODY,
    "a length that is none": OK + b"Content-Length: -1\r\n\r\n" + BODY,
    "another encoding": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunked(BODY),
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "HTTP/2": b"HTTP/2 200\r\n\r\n",
    "a head without end": OK + b"X: y\r\n" * 20_000 + b"\r\n" + BODY,
    "a header of megabytes": OK + b"X: " + b"y" * 2_000_000 + b"\r\n\r\n" + BODY,
    "a blank before the colon": OK + b"Content-Length : 5\r\n\r\n" + BODY,
    "a null in a header": OK + LENGTH + b"X: \0\r\n\r\n" + BODY,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_broken_framing_passes_for_an_answer(fault: str, two_attempts: None) -> None:
    """An answer that is cut off, ambiguous or malformed is ConnectionFailed, after it was asked for again."""
    with hostile_server(says(FAULTS[fault])) as server, PrefixClient(server.url, timeout=60) as client:
        with pytest.raises(ConnectionFailed):
            client.get("a/b@1")
        assert len(server.requests) == 2


def test_bytes_that_come_one_by_one() -> None:
    """A head is read from pieces of any size."""

    def drip(connection: socket.socket) -> None:
        read_request(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        whole = answer()
        for at in range(80):
            connection.sendall(whole[at : at + 1])
            time.sleep(0.0005)
        connection.sendall(whole[80:])

    with hostile_server(drip) as server, PrefixClient(server.url) as client:
        assert is_right(client.get("a/b@1"))


def test_a_small_answer_after_a_large_one() -> None:
    """After a large body a small answer arrives without delay: the receive threshold is set back for the next head."""

    def dawdling(connection: socket.socket) -> None:
        whole = answer(prefix_body(layers=400))
        read_request(connection)
        connection.sendall(whole[:500])
        time.sleep(0.1)
        connection.sendall(whole[500:])
        says(answer())(connection)
        read_request(connection)  # an end would wake the client too

    with hostile_server(dawdling) as server, PrefixClient(server.url, timeout=60) as client:
        client.get("a/b@1")
        assert is_right(client.get("a/b"))
        assert len(server.requests) == 1


def test_a_length_beyond_memory_is_told() -> None:
    """A length that no memory can hold is InvalidResponse, without a retry."""
    with hostile_server(says(OK + b"Content-Length: %d\r\n\r\n" % 10**17)) as server:
        with PrefixClient(server.url) as client, pytest.raises(InvalidResponse, match="100000000000000000 bytes"):
            client.get("a/b@1")
        assert len(server.requests) == 1


def test_an_error_that_is_too_long_is_told() -> None:
    """The body of an error is bounded; a longer one is InvalidResponse."""
    long = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2000000\r\n\r\n" + bytes(2_000_000)
    with (
        hostile_server(says(long)) as server,
        PrefixClient(server.url) as client,
        pytest.raises(InvalidResponse, match="2000000 bytes"),
    ):
        client.get("a/b@1")


def test_errors_come_over_pooled_connections(two_attempts: None) -> None:
    """A problem is raised as its class, a proxy's 502 as Unavailable, and the connection stays."""
    problem = b'{"code": "not-found", "detail": "there is no a/b"}'
    told = answer(problem, "Content-Type: application/problem+json", status="404 Not Found")
    bad = answer(b"<html>", status="502 Bad Gateway")
    is_back = threading.Event()

    def script(connection: socket.socket) -> None:
        says(told)(connection)
        while read_request(connection):
            connection.sendall(answer() if is_back.is_set() else bad)

    with hostile_server(script) as server:
        with PrefixClient(server.url, timeout=60) as client:
            with pytest.raises(NotFound, match="there is no a/b"):
                client.get("a/b@1")
            with pytest.raises(Unavailable, match="502"):
                client.get("a/b@1")
            is_back.set()
            assert is_right(client.get("a/b@1"))
        assert len(server.requests) == 1


def test_a_connection_stays() -> None:
    """Consecutive calls use one connection, also after a 304."""
    current = b'HTTP/1.1 304 Not Modified\r\nETag: "e"\r\n\r\n'
    with hostile_server(says(answer(), current, answer())) as server, PrefixClient(server.url) as client:
        assert torch.equal(client.get("a/b").kv.tensor, client.get("a/b").kv.tensor)
        assert is_right(client.get("a/b@prod"))
        assert [len(requests) for requests in server.requests] == [3]
        assert b'If-None-Match: "e"\r\n' in server.requests[0][1]


def closes_at_the_second_request(connection: socket.socket) -> None:
    """A server that closes the connection while the second request is under way."""
    read_request(connection)
    connection.sendall(answer())
    read_request(connection)


def says_that_it_waited_too_long(connection: socket.socket) -> None:
    """A server that sends 408 before it closes an idle connection, as some proxies do; the 408 answers no request."""
    read_request(connection)
    connection.sendall(answer())
    time.sleep(0.02)
    connection.sendall(answer(b"", "Connection: close", status="408 Request Timeout"))


def says_so_while_it_is_asked(connection: socket.socket) -> None:
    """A server whose 408 for the idle connection crosses the second request."""
    closes_at_the_second_request(connection)
    connection.sendall(answer(b"<html>", "Connection: close", status="408 Request Timeout"))


ENDS = {
    "idle": says(answer()),
    "asked": closes_at_the_second_request,
    "told": says_that_it_waited_too_long,
    "told while it is asked": says_so_while_it_is_asked,
}
"""Ends of a connection; the last two by a 408, which answers no request (RFC 9110, 15.5.9)."""


@pytest.mark.parametrize("first", ENDS.values(), ids=ENDS)
def test_a_connection_that_ended_while_idle_is_replaced_at_once(first: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that ended while idle is replaced without a failure and without a pause, whether the end is noticed
    before or after the request."""
    monkeypatch.setattr("prefix_service.client.transport.retries._FIRST_PAUSE", 40.0)
    ended = threading.Event()

    def script(connection: socket.socket) -> None:
        first(connection)
        ended.set()

    with hostile_server(script, says(answer())) as server, PrefixClient(server.url) as client:
        client.get("a/b@1")
        assert first in (closes_at_the_second_request, says_so_while_it_is_asked) or ended.wait(60)
        began = time.monotonic()
        assert is_right(client.get("a/b"))
        assert time.monotonic() - began < 40
        assert len(server.requests) == 2


def test_a_fresh_connection_that_gives_nothing_is_a_failure(two_attempts: None) -> None:
    """Only idle connections are replaced without a pause: a server that always hangs up is asked once before each."""
    with hostile_server(says(b"")) as server, PrefixClient(server.url, timeout=60) as client:
        with pytest.raises(ConnectionFailed):
            client.get("a/b@1")
        assert len(server.requests) == 2


def drips(connection: socket.socket) -> None:
    """A server whose answer never ends and never pauses for long."""
    read_request(connection)
    connection.sendall(answer()[:200])
    while True:
        connection.sendall(b"x")
        time.sleep(0.02)


def drips_a_head(connection: socket.socket) -> None:
    """A server whose head never ends and never pauses for long."""
    read_request(connection)
    connection.sendall(OK)
    while True:
        connection.sendall(b"X: y\r\n")
        time.sleep(0.02)


@pytest.mark.parametrize("script", [drips, drips_a_head, lambda connection: time.sleep(60)], ids=["body", "head", "no"])
def test_the_deadline_holds_however_slow_the_answer(script: Script) -> None:
    """The deadline is the whole call's, not that of one read."""
    with hostile_server(script) as server, PrefixClient(server.url, timeout=0.4) as client:
        began = time.monotonic()
        with pytest.raises(ConnectionFailed, match="in time"):
            client.get("a/b@1")
        assert time.monotonic() - began < 30


def test_a_service_behind_a_path() -> None:
    """The path of the URL is in front of every request's path, and each header is sent once."""
    with hostile_server(says(answer())) as server, PrefixClient(f"{server.url}/behind/", "secret") as client:
        client.get("a/b@prod", dtype="float32", layers=(0, 3))
        (request,) = server.requests[0]
        start = (
            b"GET /behind/v1/tenants/a/adapters/b@prod/prefix?layout=stacked&expand=false&dtype=float32&layers=0%3A3"
        )
        assert request.startswith(start + b" HTTP/1.1\r\n")
        assert request.count(b"\r\nHost: " + server.url[7:].encode() + b"\r\n") == 1
        assert request.count(b"\r\nAuthorization: Bearer secret\r\n") == 1
        assert request.count(b"\r\nAccept-Encoding: identity\r\n") == 1


@pytest.mark.parametrize(
    ("url", "key"), [("ftp://service", None), ("service:8080", None), ("http://s", "a\r\nX: y"), ("http://s", "ü")]
)
def test_what_cannot_be_sent_is_refused_at_once(url: str, key: str | None) -> None:
    """A URL without HTTP, and a key that would break the head, are refused immediately."""
    with pytest.raises(InvalidRequest):
        PrefixClient(url, key)


def test_pinned_memory_needs_a_gpu(server: Server) -> None:
    """With a GPU, tensors arrive in pinned memory; without one, `pinned` is refused."""
    with PrefixClient(server.url, server.admin_key, pin_memory=True) as client:
        published(client, "pool/pinned")
        if torch.cuda.is_available():
            assert client.get("pool/pinned").kv.tensor.is_pinned()
        else:
            with pytest.raises(InvalidRequest, match="needs a GPU"):
                client.get("pool/pinned")


# --- asyncio ---


def never(connection: socket.socket) -> None:
    """A server that sends half an answer, and then waits for the client to close the connection."""
    read_request(connection)
    connection.sendall(answer()[:500])
    read_request(connection)


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition, a minute at most."""
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("form", SOUND)
def test_every_form_of_answer_is_read_on_the_event_loop(form: str) -> None:
    """On the event loop every form of answer that HTTP/1.1 allows is read."""

    async def fetch(url: str) -> None:
        async with AsyncPrefixClient(url, timeout=60) as client:
            assert is_right(await client.get("a/b@1"))
            assert is_right(await client.get("a/b"))

    with hostile_server(says(SOUND[form]), says(answer())) as server:
        asyncio.run(fetch(server.url))
        assert len(server.requests) == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_no_broken_framing_passes_on_the_event_loop(fault: str, two_attempts: None) -> None:
    """On the event loop broken framing is the failure that it is in a thread."""

    async def fetch(url: str) -> None:
        async with AsyncPrefixClient(url, timeout=60) as client:
            await client.get("a/b@1")

    with hostile_server(says(FAULTS[fault])) as server:
        with pytest.raises(ConnectionFailed):
            asyncio.run(fetch(server.url))
        assert len(server.requests) == 2


def test_a_408_that_crosses_a_request_is_no_answer_on_the_event_loop() -> None:
    """The request is sent again over a new connection."""

    async def read(url: str) -> None:
        async with AsyncPrefixClient(url) as client:
            await client.get("a/b@1")
            assert is_right(await client.get("a/b"))

    with hostile_server(says_so_while_it_is_asked, says(answer())) as server:
        asyncio.run(read(server.url))
        assert len(server.requests) == 2


def test_a_deadline_holds_on_the_event_loop() -> None:
    """On the event loop an answer that stops half-way is ConnectionFailed at the deadline."""

    async def fetch(url: str) -> None:
        async with AsyncPrefixClient(url, timeout=0.3) as client:
            await client.get("a/b@1")

    began = time.monotonic()
    with hostile_server(never) as server, pytest.raises(ConnectionFailed, match="did not answer in time"):
        asyncio.run(fetch(server.url))
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("verify_digest", [False, True])
def test_cancellation_closes_the_connection(verify_digest: bool) -> None:
    """A cancelled `get` ends immediately and closes its connection, and the client goes on; in a thread and on the
    event loop."""
    ended: list[bool] = []

    def script(connection: socket.socket) -> None:
        never(connection)
        ended.append(True)

    async def cancel(url: str) -> None:
        async with AsyncPrefixClient(url, verify_digest=verify_digest) as client:
            getting = asyncio.ensure_future(client.get("a/b@1"))
            await until(lambda: bool(server.requests and server.requests[0]))
            assert not getting.done()
            getting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await getting
            await until(lambda: bool(ended))
            assert is_right(await client.get("a/b@1"))

    with hostile_server(script, says(answer())) as server:
        asyncio.run(cancel(server.url))


def test_a_large_body_leaves_turns_to_others() -> None:
    """While a large body arrives fast, other tasks get a turn after some megabytes."""
    body = prefix_body(layers=8_000)  # 20 MB
    memory = memoryview(bytearray(len(body)))
    with hostile_server(says(answer(body))) as server:
        host, port = server.url.removeprefix("http://").split(":")
        link = Link(socket.create_connection((host, int(port))))
        begun = carry_out(link.begin(b"GET / HTTP/1.1\r\n\r\n"), link.socket, time.monotonic() + 60)
        steps = link.finish(begun, lambda _head: memory, None)
        turns = [wait for wait in each_step(steps, link.socket) if wait is Wait.TURN]
        link.socket.close()
    assert bytes(memory) == body
    assert len(turns) >= len(body) / (4 << 20)


def each_step(steps: Steps[object], link: socket.socket) -> Iterator[Wait]:
    """Yields the reasons to wait, and makes each come true."""
    for wait in steps:
        if wait is not Wait.TURN:
            select.select([link], [link] if wait is Wait.WRITABLE else [], [], 60)
        yield wait


def test_the_event_loop_stays_free() -> None:
    """Other tasks run while an answer is slow: here it goes on once another task has run for some time."""
    has_run = threading.Event()

    def slow(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(answer()[:500])
        has_run.wait(30)
        connection.sendall(answer()[500:])

    async def tick(url: str) -> int:
        async with AsyncPrefixClient(url) as client:
            getting, ticks = asyncio.ensure_future(client.get("a/b@1")), 0
            while not getting.done():
                await asyncio.sleep(0.01)
                ticks += bool(server.requests and server.requests[0])
                if ticks > 3:
                    has_run.set()
            assert is_right(await getting)
            return ticks

    with hostile_server(slow) as server:
        assert asyncio.run(tick(server.url)) > 3


def test_many_at_once(server: Server) -> None:
    """More parallel gets than threads wait for their turn, and each gets its own tensors."""

    async def fetch() -> list[int]:
        async with AsyncPrefixClient(server.url, server.admin_key, cache_bytes=0) as client:
            found = await asyncio.gather(*(client.get("pool/many@1", layers=(n % 3, 3)) for n in range(100)))
            return [prefix.kv.layers[0] for prefix in found]

    with PrefixClient(server.url, server.admin_key) as client:
        published(client, "pool/many", LLAMA)
    assert asyncio.run(fetch()) == [n % 3 for n in range(100)]
