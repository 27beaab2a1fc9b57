"""Many requests on one connection, many connections of one tenant, and many pieces of one body hold neither memory nor
the loop.
"""

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest
import uvicorn

from prefix_service.api.server.connections import Deadlines
from prefix_service.api.server.input_turns import InputTurns
from prefix_service.api.server.protocols import protocol_class
from prefix_service.catalog.records import Principal
from tests.api.framing.conftest import PARSERS

COUNT = 6000
QUEUED = 200
"""The most requests that may be queued: those of 4 KiB."""
SECOND = b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKS = 40_000
CHUNKS_IN_A_TURN = CHUNKS // 4
"""The most chunks of a turn: those of 4 KiB, and of the piece before, which had fewer than 500 events."""

Parser = Literal["httptools", "h11"]


class Gate:
    """An app that answers with the request's path, as often as it is allowed to."""

    def __init__(self) -> None:
        self.allowed = asyncio.Semaphore(0)
        self.waiting = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answers once it is allowed to."""
        self.waiting += 1
        await self.allowed.acquire()
        self.waiting -= 1
        body = scope["path"].encode() + b"\n"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    def allow(self, count: int) -> None:
        """Allows so many answers."""
        for _ in range(count):
            self.allowed.release()


@pytest.fixture(params=PARSERS)
def parser(request: pytest.FixtureRequest) -> Any:
    """Returns each parser."""
    return request.param


@asynccontextmanager
async def serving(
    app: Any, parser: Parser, known: Mapping[bytes, Principal] | None = None
) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """Yields uvicorn with this parser's connections in this process, and its port. `known` maps values of
    `Authorization` to those whose keys they are.
    """
    http = protocol_class(parser, Deadlines(60, 60), (known or {}).get)
    server = uvicorn.Server(uvicorn.Config(app, http=http, lifespan="off", log_config=None, ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        task = asyncio.create_task(server.serve([listening]))
        while not server.started:  # noqa: ASYNC110  # uvicorn offers no event
            await asyncio.sleep(0.01)
        yield server, listening.getsockname()[1]
        server.should_exit = server.force_exit = True
        await task


def held(server: uvicorn.Server) -> tuple[int, int]:
    """Returns the number of queued requests and of waiting bytes in the server's one connection."""
    (connection,) = _connections(server)
    return len(getattr(connection, "pipeline", ())), len(getattr(connection, "_unparsed", ()))


async def test_pipelined_requests_are_bounded_and_answered_in_order(parser: Parser) -> None:
    """However many requests a client sends, few are queued, at the start and after each answer."""
    gate = Gate()
    async with serving(gate, parser) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"".join(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(COUNT)))
        found = []
        for number in range(COUNT):
            if number % 100 == 0:
                await asyncio.sleep(0.01)
                queued, unparsed = held(server)
                assert queued <= QUEUED
                assert unparsed <= 256 << 10
                gate.allow(100)
            await reader.readuntil(b"\r\n\r\n")
            found.append((await reader.readline()).decode())
        assert found == [f"/{number}\n" for number in range(COUNT)]
        writer.close()


@pytest.mark.parametrize("spelling", [b"Authorization: %s\r\n", b"aUTHORIZATION:\t%s \r\n"])
async def test_a_known_key_does_not_wait_behind_the_crowd_of_another_tenant(parser: Parser, spelling: bytes) -> None:
    """A tenant's first request on a new connection is read before those of a hundred connections that another tenant
    opened from the same address; so is not a request with a key that nobody knows.
    """
    known = {name: Principal(name.decode(), name.decode(), "read") for name in (b"crowd", b"other")}
    order: list[str] = []
    everyone = asyncio.Event()

    async def app(scope: dict[str, Any], _receive: Any, send: Any) -> None:
        order.append(scope["path"])
        if len(order) == 102:
            everyone.set()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    with contextlib.ExitStack() as stack:
        async with serving(app, parser, known) as (_server, port):
            for name in [b"crowd"] * 100 + [b"stranger", b"other"]:  # in the backlog: the loop does not run meanwhile
                one = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                one.sendall(b"GET /%s HTTP/1.1\r\nHost: a\r\n%s\r\n" % (name, spelling % name))
            async with asyncio.timeout(30):
                await everyone.wait()
    assert order.index("/other") < 40
    assert order.count("/crowd") == 100


async def test_each_pipelined_request_waits_for_a_turn(parser: Parser) -> None:
    """Thirty costly requests on each of a hundred connections do not fill a turn of the event loop, which others wait
    for: few begin in one turn.
    """
    begun: list[int] = [0]
    everyone = asyncio.Event()
    loop = asyncio.get_running_loop()

    def turn() -> None:
        begun.append(0)
        if not everyone.is_set():
            loop.call_soon(turn)

    async def app(_scope: object, _receive: object, send: Any) -> None:
        begun[-1] += 1
        if sum(begun) == 3000:
            everyone.set()
        time.sleep(0.0005)  # noqa: ASYNC251  # the cost of an answer, on the event loop
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    with contextlib.ExitStack() as stack:
        async with serving(app, parser) as (_server, port):
            for _ in range(100):
                one = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                one.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 30)
            turn()
            async with asyncio.timeout(90):
                await everyone.wait()
    assert max(begun) <= 12


class Held(InputTurns):
    """Turns that come when a test lets them."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[], None]] = []

    def take(self, caller: str, parse: Callable[[], None]) -> bool:
        """Lets every connection wait."""
        self.wait(caller, parse)
        return False

    def wait(self, _caller: str, parse: Callable[[], None]) -> None:
        """Keeps what a connection does in its turn."""
        self.waiting.append(parse)

    def let(self) -> None:
        """Lets those that wait take their turns, and those that wait thereafter."""
        while self.waiting:
            self.waiting.pop(0)()


@pytest.mark.parametrize(
    ("pipelined", "later", "answer"),
    [(SECOND, b"", b"/2\n"), (b"", SECOND, b"/2\n"), (b"", SECOND[:-9], b"")],
    ids=["pipelined", "later", "a part of a head"],
)
async def test_a_request_that_waits_for_its_turn_at_the_end_is_answered(
    parser: Parser, pipelined: bytes, later: bytes, answer: bytes
) -> None:
    """A service that ends answers what it had received before it closes the connection, and waits for no rest of a
    head.
    """
    gate, turns = Gate(), Held()
    async with serving(gate, parser) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\n" + pipelined)
        await _until(lambda: gate.waiting == 1)
        (connection,) = _connections(server)
        connection._turns = turns
        gate.allow(2)
        await reader.readuntil(b"/1\n")
        writer.write(later)
        await _until(lambda: turns.waiting)
        connection.shutdown()
        assert connection.is_answering
        turns.let()
        async with asyncio.timeout(30):
            rest = await reader.read()
        assert rest.partition(b"\r\n\r\n")[2] == answer
        writer.close()


async def test_tiny_chunks_leave_the_loop_to_others(parser: Parser) -> None:
    """A body of 40,000 chunks of a byte is parsed a few chunks in each turn of the event loop, and none is lost."""
    gate, seen = Gate(), [0]
    async with serving(gate, parser) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"1\r\na\r\n" * CHUNKS + b"0\r\n\r\n")
        async with asyncio.timeout(60):
            while seen[-1] < CHUNKS:
                await asyncio.sleep(0)
                seen += [len(connection.cycle.body) for connection in _connections(server) if connection.cycle]
        assert max(after - before for before, after in itertools.pairwise(seen)) <= CHUNKS_IN_A_TURN
        gate.allow(1)
        assert (await reader.readuntil(b"/x\n")).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()


async def _until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110  # a connection has no event
            await asyncio.sleep(0.01)


def _connections(server: uvicorn.Server) -> list[Any]:
    return list(server.server_state.connections)
