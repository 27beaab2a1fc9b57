"""`timeout` is the deadline of a whole call, whatever the service does; no address or connection uses up all of it."""

import asyncio
import inspect
import io
import itertools
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from prefix_service.client import AsyncPrefixClient, Fingerprint, PrefixClient
from prefix_service.client.flows import management
from prefix_service.client.transport import dialling
from prefix_service.errors import ConnectionFailed, InvalidResponse, PrefixServiceError
from tests.client.conftest import LLAMA
from tests.client.hostile import Script, answer, hostile_server, read_request, says
from tests.client.transport.test_pool import OK, drips, drips_a_head, is_right
from tests.conftest import free_port

KINDS = [PrefixClient, AsyncPrefixClient]

SOON = datetime(2100, 1, 1, tzinfo=UTC)
Call = Callable[[Any], Any]
CALLS: dict[str, Call] = {
    "get": lambda client: client.get("a/b"),
    "get_many": lambda client: client.get_many(["a/b", ["a/c", "a/d"]]),
    "prefetch": lambda client: client.prefetch([f"a/b{n}" for n in range(30)]),
    "float8_error": lambda client: client.float8_error("a/b"),
    "inspect": lambda client: client.inspect("a/b"),
    "list": lambda client: client.list("a"),
    "is_ready": lambda client: client.is_ready(),
    "compose": lambda client: client.compose("a/b", ["a/c"]),
    "resolve": lambda client: client.resolve("a/b"),
    "publish": lambda client: client.publish("a/b", LLAMA),
    "publish_files": lambda client: client.publish_files("a/b", b"{}", io.BytesIO(bytes(9_000_000))),
    "aliases": lambda client: client.aliases("a/b"),
    "put_alias": lambda client: client.put_alias("a/b", "prod", 1),
    "put_alias once": lambda client: client.put_alias("a/b", "prod", 1, create_only=True),
    "delete_alias": lambda client: client.delete_alias("a/b", "prod"),
    "rollback": lambda client: client.rollback("a/b", "prod"),
    "parameters": lambda client: client.parameters("a/b", 0, 1),
    "delete": lambda client: client.delete("a/b"),
    "load": lambda client: client.load("a/b"),
    "unload": lambda client: client.unload("a/b"),
    "residency": lambda client: client.residency(),
    "versions": lambda client: client.versions("a/b"),
    "tenants": lambda client: client.tenants(),
    "tenant": lambda client: client.tenant("a"),
    "put_tenant": lambda client: client.put_tenant("a", {"max_bytes": 1}),
    "delete_tenant": lambda client: client.delete_tenant("a"),
    "audit": lambda client: client.audit("a", 10**9),
    "whoami": lambda client: client.whoami(),
    "keys": lambda client: client.keys("a"),
    "key": lambda client: client.key("0" * 16),
    "create_key": lambda client: client.create_key("read", "a"),
    "shorten_key": lambda client: client.shorten_key("0" * 16, SOON, "a"),
    "revoke_key": lambda client: client.revoke_key("0" * 16),
    "card": lambda client: client.card("a/b"),
    "put_card": lambda client: client.put_card("a/b", "text"),
    "annotations": lambda client: client.annotations("a/b"),
    "put_annotations": lambda client: client.put_annotations("a/b", {"run": "1"}),
    "usage": lambda client: client.usage("a"),
    "list_page": lambda client: client.list_page("a"),
    "base_model": lambda client: client.base_model("a/b"),
    "put_base_model": lambda client: client.put_base_model("a/b", Fingerprint(tokenizer="x")),
    "config_file": lambda client: client.config_file("a/b"),
    "service": lambda client: client.service(),
}


def called(client: Any, call: Call) -> Any:
    """Returns what a call of a client of either kind returns, and closes the client."""

    async def awaited() -> Any:
        try:
            return await call(client)
        finally:
            await client.close()

    if isinstance(client, AsyncPrefixClient):
        return asyncio.run(awaited())
    with client:
        return call(client)


def reads_nothing(connection: socket.socket) -> None:
    """A server that neither reads the request nor closes the connection."""
    time.sleep(60)


def storms(connection: socket.socket) -> None:
    """A server that sends interim answers without end, one at a time."""
    read_request(connection)
    while True:
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n")
        time.sleep(0.05)


def drips_chunks(connection: socket.socket) -> None:
    """A server that sends a body without a length and without an end."""
    read_request(connection)
    connection.sendall(OK + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"1\r\n[\r\n")
        time.sleep(0.02)


SLOW: dict[str, Script] = {
    "nothing is read": reads_nothing,
    "a head in drops": drips_a_head,
    "a body in drops": drips,
    "chunks in drops": drips_chunks,
    "interim answers": storms,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", SLOW.values(), ids=SLOW)
def test_the_deadline_is_that_of_the_whole_call(kind: type[Any], script: Script) -> None:
    """Every method of both clients ends at the deadline; all of them run side by side here."""
    took: dict[str, float] = {}
    wrong: dict[str, object] = {}

    def run(name: str, call: Call) -> None:
        began = time.monotonic()
        try:
            wrong[name] = called(kind(server.url, timeout=1), call)
        except ConnectionFailed:
            pass
        except BaseException as error:  # noqa: BLE001 - told below
            wrong[name] = error
        took[name] = time.monotonic() - began

    with hostile_server(script) as server:
        threads = [threading.Thread(target=run, args=item) for item in CALLS.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert took.keys() == CALLS.keys()
    assert wrong == {}
    assert {name: seconds for name, seconds in took.items() if seconds > 40} == {}


JSON = "Content-Type: application/json"
VERSION = json.dumps({"tenant": "a", "adapter": "b", "version": 1, "digest": "sha256:" + "0" * 64}).encode()


def pages_for_ever(connection: socket.socket) -> None:
    """A server that sends page after page, each with another cursor, as fast as they are asked for."""
    for number in itertools.count():
        if not read_request(connection):
            return
        page = b'{"items": [' + b", ".join([b'{"adapter": "a", "of": "%d"}' % number] * 100)
        connection.sendall(answer(page + b'], "next": "%d"}' % number, JSON))


def a_page_without_end(connection: socket.socket) -> None:
    """A server that sends one answer without end, as fast as it is read."""
    read_request(connection)
    connection.sendall(OK + JSON.encode() + b'\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n{"items"\r\n')
    piece = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    while True:
        connection.sendall(piece)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", [pages_for_ever, a_page_without_end])
@pytest.mark.parametrize("name", ["list", "audit", "tenants"])
def test_a_listing_without_end_costs_neither_time_nor_memory(kind: type[Any], script: Script, name: str) -> None:
    """A listing without end fails at the deadline, or at the most that a listing may have."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    with hostile_server(script) as server, pytest.raises((ConnectionFailed, InvalidResponse)):
        called(kind(server.url, timeout=1.5), CALLS[name])
    assert time.monotonic() - began < 40
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


def test_a_listing_has_a_bounded_number_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing of too many pages fails, however long the deadline and however small the pages."""
    monkeypatch.setattr("prefix_service.client.flows.listing._MOST_PAGES", 20)
    with hostile_server(pages_for_ever) as server, PrefixClient(server.url) as client:
        with pytest.raises(InvalidResponse, match="20 pages"):
            client.list("a")
        assert len(server.requests[0]) == 20


def test_a_listing_has_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing of too many bytes fails, in any number of pages."""
    monkeypatch.setattr("prefix_service.client.flows.listing._MOST_BYTES", 20_000)
    with hostile_server(pages_for_ever) as server, PrefixClient(server.url) as client:
        with pytest.raises(InvalidResponse, match="20000 bytes"):
            client.list("a")
        assert len(server.requests[0]) < 20


# --- half-open connections ---


def then_swallows(*answers: bytes) -> Script:
    """A server that answers, then takes requests and keeps silent, as a peer that vanished seems to."""

    def script(connection: socket.socket) -> None:
        says(*answers)(connection)
        while connection.recv(65536):
            pass

    return script


EMPTY_PAGE = answer(b'{"items": [], "next": null}', JSON)


@pytest.mark.parametrize("name", ["get", "list"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_half_open_connection_costs_a_part_of_the_deadline(kind: type[Any], name: str) -> None:
    """After a silent idle connection a new one is tried within the deadline, although another idle one is silent
    too."""
    told, call = answer() if name == "get" else EMPTY_PAGE, CALLS[name]

    async def awaited(client: Any) -> float:
        async with client:
            await asyncio.gather(call(client), call(client))
            began = time.monotonic()
            await call(client)
            return time.monotonic() - began

    def blocking(client: Any) -> float:
        with client:
            threads = [threading.Thread(target=call, args=(client,)) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            began = time.monotonic()
            call(client)
            return time.monotonic() - began

    both = threading.Barrier(2)

    def waits(connection: socket.socket) -> None:
        read_request(connection)
        both.wait(60)  # so that both connections are needed
        connection.sendall(told)
        then_swallows()(connection)

    with hostile_server(waits, waits, says(told)) as server:
        client = kind(server.url, timeout=12, cache_bytes=0)
        took = asyncio.run(awaited(client)) if kind is AsyncPrefixClient else blocking(client)
        assert 1 < took < 11
        assert len(server.requests) == 3


def test_a_change_goes_over_a_new_connection() -> None:
    """A change is sent on a new connection, since a dead idle one would be noticed only after the change may have been
    made."""
    made = answer(b"{}", JSON, status="201 Created")
    with hostile_server(says(EMPTY_PAGE), says(made)) as server, PrefixClient(server.url, timeout=60) as client:
        client.list("a")
        assert client.put_alias("a/b", "prod", 1, create_only=True)
        assert len(server.requests) == 2


# --- no deadline ---


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_deadline_every_way_works(kind: type[Any]) -> None:
    """Without a deadline calls work over TCP and a Unix socket, in ranges and over httpx."""
    http = httpx.HTTPTransport if kind is PrefixClient else httpx.AsyncHTTPTransport
    with hostile_server(says(answer(), answer())) as server, hostile_server(says(answer()), uds=True) as local:
        for client in (
            kind(server.url, timeout=None),
            kind(server.url, timeout=None, connections=3),
            kind(server.url, timeout=None, http=http()),
            kind(timeout=None, uds=local.uds),
        ):
            assert called(client, CALLS["get"]).num_virtual_tokens == 20
        named = server.url.replace("127.0.0.1", "localhost")  # is looked up
        assert called(kind(named, timeout=None), lambda client: client.get_many(["a/b", None])).batch_size == 2
    with hostile_server(says(EMPTY_PAGE)) as server:
        assert called(kind(server.url, timeout=None), CALLS["list"]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_deadline_a_call_waits_for_a_service_that_is_away(kind: type[Any]) -> None:
    """Without a deadline a call is repeated until the service is there."""
    port = free_port()
    found: list[Any] = []
    client = kind(f"http://127.0.0.1:{port}", timeout=None)
    waiting = threading.Thread(target=lambda: found.append(called(client, CALLS["get"])))
    waiting.start()
    time.sleep(0.5)
    assert not found
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.settimeout(60)
        connection, _ = listener.accept()
        with connection:
            says(answer())(connection)
            waiting.join(60)
    assert is_right(found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_deadline_a_half_open_connection_costs_a_minute_at_most(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a deadline a silent idle connection is given up after a minute at most, and a new one is tried."""
    monkeypatch.setattr("prefix_service.client.transport.pool._MOST_PATIENCE", 0.3)
    call = CALLS["list"]

    async def awaited(client: Any) -> None:
        async with client:
            await call(client)
            await call(client)

    def blocking(client: Any) -> None:
        with client:
            call(client)
            call(client)

    with hostile_server(then_swallows(EMPTY_PAGE), says(EMPTY_PAGE)) as server:
        client = kind(server.url, timeout=None)
        began = time.monotonic()
        asyncio.run(awaited(client)) if kind is AsyncPrefixClient else blocking(client)
        assert 0.25 < time.monotonic() - began < 40
        assert len(server.requests) == 2


def test_a_wait_that_the_system_has_no_room_for_is_taken_in_parts() -> None:
    """A deadline beyond the milliseconds of poll(2), which has 32 bits, is waited for in parts."""
    until = time.monotonic() + 1e12
    assert dialling.time_left(until) == dialling.time_left(float("inf")) == 1_000_000


# --- addresses ---


@contextmanager
def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> Iterator[None]:
    """Resolves a name to these addresses while the block runs."""
    real = socket.getaddrinfo

    def found(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host not in (b"several.test", "several.test"):
            return real(host, port, *args, **options)
        if options.get("flags"):
            raise socket.gaierror(socket.EAI_NONAME, "a name")
        return [entry for address, port in addresses for entry in real(address, port, type=socket.SOCK_STREAM)]

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", found)
        yield


@contextmanager
def silent_port() -> Iterator[int]:
    """Yields a port whose queue is full: a connection to it is neither accepted nor refused."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        filling = [socket.socket() for _ in range(4)]
        for each in filling:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        time.sleep(0.1)
        yield listener.getsockname()[1]
        for each in filling:
            each.close()


@pytest.mark.parametrize("name", ["get", "inspect"])
@pytest.mark.parametrize("dead", ["refuses", "silent", "no route"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_address_of_a_name_is_tried(
    kind: type[Any], dead: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead addresses before the living one cost moments, for tensors and for all other calls."""
    told = answer() if name == "get" else answer(VERSION, JSON)
    with hostile_server(says(told)) as server, silent_port() as silent:
        port = int(server.url.rpartition(":")[2])
        before = {
            "refuses": ("127.0.0.1", free_port()),
            "silent": ("127.0.0.1", silent),
            "no route": ("240.0.0.1", port),
        }[dead]
        with resolving(monkeypatch, before, before, ("127.0.0.1", port)):
            began = time.monotonic()
            client = kind(f"http://several.test:{port}", timeout=60, verify_digest=False)
            assert called(client, CALLS[name])
            assert time.monotonic() - began < 30


def test_localhost_means_both_its_addresses() -> None:
    """A service on 127.0.0.1 is found if localhost is ::1 too."""
    with hostile_server(says(answer())) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        with PrefixClient(url, timeout=60) as client:
            assert is_right(client.get("a/b"))


def test_no_address_at_all_is_an_error_of_this_project(monkeypatch: pytest.MonkeyPatch, two_attempts: None) -> None:
    """If no address answers, ConnectionFailed names the last failure within the deadline, also if the resolver
    hangs."""
    with resolving(monkeypatch, ("127.0.0.1", free_port()), ("127.0.0.1", free_port())):
        client = PrefixClient("http://several.test", timeout=60)
        with client, pytest.raises(ConnectionFailed, match="refused"):
            client.inspect("a/b")
    hangs = threading.Event()
    real = socket.getaddrinfo

    def never(host: Any, *args: Any, **options: Any) -> Any:
        if not options.get("flags"):
            hangs.wait(60)
        return real(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", never)
    began = time.monotonic()
    with PrefixClient("http://several.test", timeout=0.5) as client, pytest.raises(ConnectionFailed, match="in time"):
        client.get("a/b")
    assert time.monotonic() - began < 30
    hangs.set()


def test_addresses_alternate_between_families() -> None:
    """Addresses alternate between families (RFC 8305), so that a broken family costs one head start."""
    v6, v4 = (socket.AF_INET6, "six"), (socket.AF_INET, "four")
    assert dialling._interleaved([v6, v6, v4, v4, v4]) == [v6, v4, v6, v4, v4]


# --- what is sent ---


def test_an_answer_that_comes_before_the_end_of_an_upload_is_read() -> None:
    """If a service refuses an upload in the middle, the error is raised, and the rest is not sent."""
    problem = b'{"code": "too-large", "detail": "no more than 10 bytes"}'
    refused = answer(problem, "Content-Type: application/problem+json", status="413 Content Too Large")

    def script(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(refused)
        time.sleep(60)

    for kind in KINDS:
        with hostile_server(script) as server, pytest.raises(PrefixServiceError, match="no more than 10 bytes"):
            called(kind(server.url, timeout=60), CALLS["publish_files"])


def test_every_call_is_here() -> None:
    """Every method of the clients, and every flow of `management`, is called by the tests of this module."""
    flows = {name for name, made in vars(management).items() if inspect.isgeneratorfunction(made)}
    flows = {name for name in flows if not name.startswith("_") and name not in ("pages", "adapter_alone")}
    methods = {name for name in vars(PrefixClient) if not name.startswith("_")} - {"close"}
    assert flows <= methods <= CALLS.keys()
    assert methods == {name for name in vars(AsyncPrefixClient) if not name.startswith("_")} - {"close"}
