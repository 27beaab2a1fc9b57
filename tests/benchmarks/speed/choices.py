"""What the client's own code brings, measured by leaving it out: time of a fetch with it ÷ without it.

Each size is a Llama-3-8B prefix of so many virtual tokens in bfloat16; *304* is a revalidation of `latest`, without a
body. Three clients take turns, backwards in every other round: one with the part, one without it, and a second one
without it as a control, whose ratio says how small a difference this machine can tell. Ratios are medians of paired
rounds with their quartiles.

receive path  PrefixClient's own connection, ÷ the standard library's http.client below the same client
head parser   a regular expression for plain heads, ÷ h11 for all of them
event loop    AsyncPrefixClient receives everything on the event loop, ÷ in threads; also sixteen at the same time
ranges        four connections ÷ one; also from a server that sends 5 Gbit/s over each connection
"""

import asyncio
import contextlib
import http.client
import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest import mock
from urllib.parse import urlencode

import h11

from prefix_service.client import AsyncPrefixClient, PrefixClient
from prefix_service.client.protocol import Request
from prefix_service.client.transport import http1, link
from prefix_service.client.transport.fetcher import Fetcher
from tests.benchmarks.fleet import Shape
from tests.benchmarks.speed.client import Fetch, timed, timed_async
from tests.benchmarks.speed.harness import QUIET, Chart, Outcome, Spread, against_control, say
from tests.benchmarks.speed.paced import paced_server
from tests.benchmarks.tables import Grid
from tests.conftest import Server, running_server

_TOGETHER: Final = 16
_CONNECTIONS: Final = 4
_ONE_FLOW: Final = 625_000_000  # bytes a second, EC2's limit of one flow between two instances
_TENANT: Final = "bench"

Three = tuple[Fetch, Fetch, Fetch]
"""A fetch with a part of the client, one without it, and a second one without it."""


class ByLibrary:
    """`Pool.exchange` with http.client; without deadlines, interrupts, and a second try over a new connection."""

    def __init__(self, server: Server) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]))
        self._headers = {"Authorization": f"Bearer {server.admin_key}", "Accept-Encoding": "identity"}

    def exchange(
        self, request: Request, allocate: link.AllocateBody, *_rest: Any, observe: link.Observer | None, **_more: Any
    ) -> tuple[http1.Head, memoryview]:
        """Returns head and body of the answer."""
        path = f"{request.path}?{urlencode(request.params)}"
        self._connection.request(request.method, path, headers={**request.headers, **self._headers})
        answer = self._connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        head = http1.Head(answer.status, headers, answer.length or 0, keeps_alive=True)
        body, position = allocate(head), 0
        step = link._AT_ONCE if observe is None else link._OBSERVED_AT_ONCE
        while position < len(body):
            count = answer.readinto(body[position : position + step])
            if observe is not None:
                observe(body[position : position + count])
            position += count
        answer.read()  # marks the answer as read, so that the connection is kept
        return head, body


@contextlib.contextmanager
def _receive_paths(server: Server, reference: str, cache_bytes: int) -> Iterator[Three]:
    with contextlib.ExitStack() as stack:
        own, *others = _clients(stack, server.url, server.admin_key, [1] * 3, cache_bytes)
        for client in others:
            way = client._transport._way
            assert isinstance(way, Fetcher)
            way._pool.exchange = ByLibrary(server).exchange  # type: ignore[assignment,method-assign]
        mine, other, control = (timed(partial(client.get, reference)) for client in (own, *others))
        yield mine, other, control


def read_by_h11(head: bytes) -> http1.Head | None:
    """What `http1.read_plain` returns, found by h11."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=http1.MAX_HEAD - 1)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "service")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(head)
    event = connection.next_event()
    if not isinstance(event, h11.Response):
        return None
    headers = http1._joined(event.headers)
    keeps_alive = headers.get("connection", "keep-alive").lower() == "keep-alive"
    length = 0 if event.status_code in (204, 304) else http1.declared_length(headers)
    return None if length is None else http1.Head(event.status_code, headers, length, keeps_alive)


def _with_parser(parser: Callable[[bytes], http1.Head | None], fetch: Fetch) -> Fetch:
    def once() -> float:
        with mock.patch.object(link, "read_plain", parser):
            return fetch()

    return once


@contextlib.contextmanager
def _head_parsers(server: Server, reference: str, cache_bytes: int) -> Iterator[Three]:
    with contextlib.ExitStack() as stack:
        own, other, control = (
            timed(partial(client.get, reference))
            for client in _clients(stack, server.url, server.admin_key, [1] * 3, cache_bytes)
        )
        yield _with_parser(http1.read_plain, own), _with_parser(read_by_h11, other), _with_parser(read_by_h11, control)


@contextlib.contextmanager
def _ranges(url: str, key: str, reference: str) -> Iterator[Three]:
    with contextlib.ExitStack() as stack:
        clients = _clients(stack, url, key, [_CONNECTIONS, 1, 1], 0)
        many, other, control = (timed(partial(client.get, reference)) for client in clients)
        yield many, other, control


def _clients(
    stack: contextlib.ExitStack, url: str, key: str, connections: list[int], cache_bytes: int
) -> list[PrefixClient]:
    make = partial(PrefixClient, url, key, cache_bytes=cache_bytes)
    return [stack.enter_context(make(connections=number)) for number in connections]


@contextlib.contextmanager
def _event_loop(server: Server, reference: str, cache_bytes: int, together: int = 1) -> Iterator[Three]:
    with asyncio.Runner() as runner:
        clients = [AsyncPrefixClient(server.url, server.admin_key, cache_bytes=cache_bytes) for _ in range(3)]
        for client, is_in_thread in zip(clients, (False, True, True), strict=True):
            way = client._transport._way
            assert isinstance(way, Fetcher)
            way.blocks = lambda _request, found=is_in_thread: found  # type: ignore[method-assign,misc]

        async def fetch(client: AsyncPrefixClient) -> object:
            return await asyncio.gather(*(client.get(reference) for _ in range(together)))

        own, other, control = (timed_async(runner, partial(fetch, client)) for client in clients)
        yield own, other, control
        for client in clients:
            runner.run(client.close())


def _cases(server: Server, tokens: int) -> dict[str, Callable[[], contextlib.AbstractContextManager[Three]]]:
    """The comparisons of one size, by the name of their row; without tokens, those of a 304."""
    if not tokens:
        reference, kept = f"{_TENANT}/tokens-20", 1 << 30
        return {
            "receive path": partial(_receive_paths, server, reference, kept),
            "head parser": partial(_head_parsers, server, reference, kept),
            "event loop": partial(_event_loop, server, reference, kept),
            f"event loop, {_TOGETHER} together": partial(_event_loop, server, reference, kept, _TOGETHER),
        }
    reference = f"{_TENANT}/tokens-{tokens}@1"
    found: dict[str, Callable[[], contextlib.AbstractContextManager[Three]]] = {
        "receive path": partial(_receive_paths, server, reference, 0),
        "head parser": partial(_head_parsers, server, reference, 0),
        "event loop": partial(_event_loop, server, reference, 0),
    }
    if tokens < 2048:
        found[f"event loop, {_TOGETHER} together"] = partial(_event_loop, server, reference, 0, _TOGETHER)
    found["ranges"] = partial(_ranges, server.url, server.admin_key, reference)
    return found


def _paced(server: Server, tokens: int, rounds: int) -> tuple[Spread, Spread]:
    path = f"/v1/tenants/{_TENANT}/adapters/tokens-{tokens}@1/prefix?layout=stacked&expand=false"
    answer = server.client().get(path, headers={"Want-Repr-Digest": "crc32c=1"})
    reference = f"{_TENANT}/tokens-{tokens}@1"
    with (
        paced_server(dict(answer.headers), answer.content, _ONE_FLOW) as port,
        _ranges(f"http://127.0.0.1:{port}", server.admin_key, reference) as three,
    ):
        return against_control(*three, rounds)


def measure(*, quick: bool) -> Outcome:
    """Publish, and fetch with and without each part."""
    found: dict[str, dict[str, tuple[Spread, Spread]]] = {}
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "data", environment=QUIET) as server:
        for tokens in (20,) if quick else (20, 80, 2048):
            shape = Shape(tokens=tokens)
            with PrefixClient(server.url, server.admin_key) as publisher:
                weights = io.BytesIO(shape.weights(tokens)[0])
                publisher.publish_files(f"{_TENANT}/tokens-{tokens}", shape.config, weights)
        for tokens, rounds in [(0, 5), (20, 5)] if quick else [(0, 1500), (20, 600), (80, 300), (2048, 25)]:
            size = f"{Shape(tokens=tokens).nbytes / 1e6:.1f} MB" if tokens else "304"
            say(f"  {size}, {rounds} rounds")
            for name, case in _cases(server, tokens).items():
                with case() as three:
                    fewer = max(rounds // _TOGETHER, 5) if "together" in name else rounds
                    found.setdefault(name, {})[size] = against_control(*three, fewer)
        if not quick:
            found["ranges, 5 Gbit/s a connection"] = {size: _paced(server, 2048, 9)}
    sizes = list(dict.fromkeys(size for of_sizes in found.values() for size in of_sizes))
    rows = []
    for name, of_sizes in found.items():
        for index, title in enumerate((name, "as a control")):
            rows.append([title, *(str(of_sizes[size][index]) if size in of_sizes else "—" for size in sizes)])
    series = {
        name: [of_sizes[size][0].median if size in of_sizes else None for size in sizes]
        for name, of_sizes in found.items()
    }
    chart = Chart("bars", "Time of a fetch with a part of the client ÷ without it", "ratio", sizes, series, log_y=False)
    return Outcome([Grid("Time of a fetch with a part of the client ÷ without it", ["", *sizes], rows)], chart)
