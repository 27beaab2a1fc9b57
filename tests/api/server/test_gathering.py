"""`api.server.gathering` sends writes in order, many at a time, and holds an answer's memory until it has left."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from prefix_service.api.server.gathering import GatheringTransport
from tests.api.helpers import head, upload
from tests.benchmarks.fleet import Shape
from tests.conftest import Server


class _Counting:
    """A real transport that counts how often it is written to."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self.writes = transport, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def writelines(self, pieces: list[bytes]) -> None:
        self.writes += 1
        self._transport.writelines(pieces)


Made = tuple[GatheringTransport, _Counting, asyncio.StreamReader]


@contextlib.asynccontextmanager
async def connected() -> Any:
    """Yields both ends of a connection: the gathering transport over a real one, and a reader."""
    loop, made = asyncio.get_running_loop(), asyncio.Queue[asyncio.Transport]()

    class Accepts(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            made.put_nowait(transport)

    server = await loop.create_server(Accepts, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    counting = _Counting(await made.get())
    yield GatheringTransport(counting, loop), counting, reader  # type: ignore[arg-type]  # it delegates all but one
    counting.abort()
    writer.close()
    server.close()


async def test_what_is_written_in_one_turn_leaves_at_once() -> None:
    """Writes of one turn of the loop leave together, in order, without empty ones, and wait for no more."""
    async with connected() as (transport, counting, reader):
        for piece in (b"head ", b"", b"body ", memoryview(b"end")):
            transport.write(piece)
        assert counting.writes == 0
        assert transport.get_write_buffer_size() == 13
        assert await reader.readexactly(13) == b"head body end"
        assert counting.writes == 1
        assert transport.get_write_buffer_size() == 0


async def test_much_does_not_wait() -> None:
    """A batch's rows are handed on every two megabytes, so that the writer learns that it must wait."""
    row = bytes(1 << 19)
    async with connected() as (transport, counting, reader):
        for _ in range(12):
            transport.write(row)
        assert counting.writes == 2
        assert len(await reader.readexactly(12 << 19)) == 12 << 19


Ends: dict[str, Callable[[GatheringTransport], object]] = {
    "close": lambda transport: transport.close(),
    "write_eof": lambda transport: transport.write_eof(),
}


@pytest.mark.parametrize("end", Ends)
async def test_an_end_comes_behind_what_was_written(end: str) -> None:
    """Each way to end a connection sends what was written before."""
    async with connected() as (transport, _, reader):
        transport.write(b"all")
        Ends[end](transport)
        assert await reader.read() == b"all"


async def test_a_connection_that_is_cut_sends_nothing_more() -> None:
    """An aborted connection sends nothing more, and nothing fails later."""
    failed: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failed.append(context))
    async with connected() as (transport, _, reader):
        transport.write(b"held")
        transport.abort()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        await asyncio.sleep(0)
    assert failed == []


async def _until(holds: Callable[[], Awaitable[bool]]) -> None:
    until = time.monotonic() + 60
    while not await holds():
        assert time.monotonic() < until
        await asyncio.sleep(0.02)


async def test_an_answer_that_is_not_read_holds_its_rendering(server: Server) -> None:
    """A body of which the sockets take only a part stays pinned until its reader has it."""
    shape = Shape(tokens=56)  # 7.3 MB, below the largest piece, above what Linux buffers for a socket
    with server.client() as client:
        weights, _ = shape.weights(0)
        assert upload(client, "gathering", "a", shape.config, weights).status_code in (200, 201)
        path = "/v1/tenants/gathering/adapters/a/prefix"
        length = len(client.get(path).content)

        async def readers(wanted: int) -> bool:
            found = client.get("/v1/residency").json()["resident"]
            return sum(int(row["readers"]) for row in found if row["tenant"] == "gathering") == wanted

        await _until(lambda: readers(0))
        host, port = httpx.URL(server.url).host, httpx.URL(server.url).port
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            reader.connect((host, port))
            reader.sendall(head("GET", path, authorization=f"Bearer {server.admin_key}"))
            reader.recv(1, socket.MSG_PEEK)
            await asyncio.sleep(0.3)
            assert await readers(1)
            received = 0
            while received < length:
                received += len(reader.recv(1 << 20))
            await _until(lambda: readers(0))
