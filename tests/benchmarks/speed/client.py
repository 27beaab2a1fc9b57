"""How long until a prefix's tensors are usable, for the clients of this project and what they are compared with.

Each size is a Llama-3-8B prefix of so many virtual tokens in bfloat16. A service runs in a process of its own; beside
it a bare asyncio server gives the service's own answer from memory, so that the client's part is seen where the service
is the slower half. In each round every contestant fetches once, in turn; figures are medians with quartiles, and ratios
to the raw loop of the same run. Nothing is cached: every fetch brings all bytes.

raw         one connection, a prebuilt request, `recv_into` until the fresh memory is full; nothing is parsed
client      PrefixClient.get, which compares the body with its CRC-32C
async       AsyncPrefixClient.get, which does that too
unverified  the clients with verify_digest=False
http.client the standard library's: a kept HTTPConnection, and `readinto` into the fresh memory; no tensor is made of it
httpx       a reused httpx.Client().get(…).content, then safetensors.torch.load
"""

import asyncio
import contextlib
import http.client
import io
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import safetensors.torch
import torch

from prefix_service.client import AsyncPrefixClient, PrefixClient
from prefix_service.prefix.buffers import bytes_of
from tests.benchmarks.fleet import Shape
from tests.benchmarks.speed.harness import QUIET, Chart, Outcome, Spread, against_control, in_turns, ratio, say
from tests.benchmarks.tables import Grid
from tests.conftest import running_server

_CHUNK = 1 << 20

Fetch = Callable[[], float]
"""Fetches once; seconds until it was done."""


def timed(fetch: Callable[[], object]) -> Fetch:
    """The seconds that a call takes; what it returned is freed afterwards."""

    def once() -> float:
        began = time.perf_counter()
        kept = fetch()
        seconds = time.perf_counter() - began
        del kept
        return seconds

    return once


def timed_async(runner: asyncio.Runner, fetch: Callable[[], Awaitable[object]]) -> Fetch:
    """The same inside a running event loop."""

    async def once() -> float:
        began = time.perf_counter()
        kept = await fetch()
        seconds = time.perf_counter() - began
        del kept
        return seconds

    return lambda: runner.run(once())


def raw_loop(port: int, path: str, key: str) -> Callable[[], object]:
    """The least that a client can do."""
    connected = socket.create_connection(("127.0.0.1", port))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    scratch = bytearray(65536)

    def fetch() -> object:
        connected.sendall(request)
        count = connected.recv_into(scratch)
        start = scratch.index(b"\r\n\r\n", 0, count) + 4
        head = bytes(scratch[:start]).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        memory = torch.empty(length, dtype=torch.uint8)
        view, position = bytes_of(memory), count - start
        view[:position] = memoryview(scratch)[start:count]
        while position < length:
            position += connected.recv_into(view[position:])
        return memory

    return fetch


def standard_library(connection: http.client.HTTPConnection, path: str, key: str) -> Callable[[], object]:
    """The least that a client can do which leaves HTTP to the standard library."""

    def fetch() -> object:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        memory = torch.empty(int(answer.headers["Content-Length"]), dtype=torch.uint8)
        view, position = bytes_of(memory), 0
        while position < len(view):
            position += answer.readinto(view[position:])
        answer.read()  # marks the answer as read, so that the connection is kept
        return memory

    return fetch


@contextlib.contextmanager
def bare_server(answer: bytes) -> Iterator[int]:
    """A server that gives one answer to everything; its port."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, answer), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()


def _serve(told: Connection, answer: bytes) -> None:
    import uvloop

    class Always(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._transport = transport

        def data_received(self, _data: bytes) -> None:
            view = memoryview(answer)
            for start in range(0, len(view), _CHUNK):
                self._transport.write(view[start : start + _CHUNK])  # type: ignore[attr-defined]

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Always, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(serve())


@contextlib.contextmanager
def contestants(port: int, path: str, key: str, reference: str) -> Iterator[dict[str, Fetch]]:
    """Each with a connection of its own that has been used."""
    url = f"http://127.0.0.1:{port}"
    with (
        PrefixClient(url, key, cache_bytes=0) as client,
        PrefixClient(url, key, cache_bytes=0, verify_digest=False) as trusting,
        asyncio.Runner() as runner,
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as by_httpx,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as by_library,
    ):
        later = AsyncPrefixClient(url, key, cache_bytes=0)
        later_trusting = AsyncPrefixClient(url, key, cache_bytes=0, verify_digest=False)
        found = {
            "raw": timed(raw_loop(port, path, key)),
            "client": timed(lambda: client.get(reference)),
            "async": timed_async(runner, lambda: later.get(reference)),
            "client, unverified": timed(lambda: trusting.get(reference)),
            "async, unverified": timed_async(runner, lambda: later_trusting.get(reference)),
            "http.client": timed(standard_library(by_library, path, key)),
            "httpx": timed(lambda: safetensors.torch.load(by_httpx.get(path).content)),
        }
        for fetch in found.values():
            fetch()
        yield found
        runner.run(later.close())
        runner.run(later_trusting.close())


def cost_of_the_digest(url: str, key: str, reference: str, rounds: int) -> list[str]:
    """Returns the time of a fetch with the digest ÷ without it, and, as a control, without ÷ without."""
    with contextlib.ExitStack() as stack:
        mine, other, control = (
            timed(
                partial(stack.enter_context(PrefixClient(url, key, cache_bytes=0, verify_digest=verify)).get, reference)
            )
            for verify in (None, False, False)
        )
        return list(map(str, against_control(mine, other, control, rounds)))


def compared(rows: list[list[str]], title: str, fetches: dict[str, Fetch], size: int, rounds: int) -> dict[str, float]:
    """Runs every contestant in turn; adds a row for each. Returns median seconds."""
    found = in_turns(fetches, rounds)
    for name, seconds in found.items():
        spread = Spread.of([1000 * value for value in seconds])
        of_raw, of_httpx = (ratio(found[peer], seconds) for peer in ("raw", "httpx"))
        rate = f"{size / Spread.of(seconds).median / 1e9:.2f}"
        rows.append([title if name == "raw" else "", name, str(spread), rate, str(of_raw), str(of_httpx)])
    return {name: Spread.of(seconds).median for name, seconds in found.items()}


def measure(*, quick: bool) -> Outcome:
    """Publish, fetch, compare."""
    rows: list[list[str]] = []
    costs: list[list[str]] = []
    medians: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "data", environment=QUIET) as server:
        port = int(server.url.rpartition(":")[2])
        for tokens, rounds in [(20, 5)] if quick else [(20, 200), (80, 100), (2048, 9)]:
            shape, reference = Shape(tokens=tokens), f"bench/tokens-{tokens}@1"
            with PrefixClient(server.url, server.admin_key) as publisher:
                weights, _ = shape.weights(tokens)
                publisher.publish_files(f"bench/tokens-{tokens}", shape.config, io.BytesIO(weights))
            path = f"/v1/tenants/bench/adapters/tokens-{tokens}@1/prefix?layout=stacked&expand=false"
            answer = server.client().get(path, headers={"Want-Repr-Digest": "crc32c=1"})
            head = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
            whole = f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + answer.content
            size = f"{shape.nbytes / 1e6:.1f} MB"
            say(f"  {size}, {rounds} rounds")
            with contestants(port, path, server.admin_key, reference) as fetches:
                medians[f"{size}, service"] = compared(rows, f"{size} from the service", fetches, shape.nbytes, rounds)
            costs.append([size, *cost_of_the_digest(server.url, server.admin_key, reference, 3 * rounds)])
            with bare_server(whole) as bare, contestants(bare, path, server.admin_key, reference) as fetches:
                medians[f"{size}, bare"] = compared(rows, f"{size} from a bare server", fetches, shape.nbytes, rounds)
    head_row = ["", "", "ms (quartiles)", "GB/s", "raw's time ÷ its", "httpx's time ÷ its"]
    names = list(next(iter(medians.values())))
    series: dict[str, list[float | None]] = {name: [1000 * found[name] for found in medians.values()] for name in names}
    chart = Chart("bars", "Until tensors are usable", "ms", list(medians), series)
    headings = ["", "with it", "without, as a control"]
    cost = Grid("What the digest costs: time of a fetch ÷ time without it", headings, costs)
    return Outcome([Grid("Until a prefix's tensors are usable", head_row, rows), cost], chart)
