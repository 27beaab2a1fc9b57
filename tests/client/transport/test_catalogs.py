"""A client follows one catalog: it refuses answers of another one."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest

from prefix_service.client import AsyncPrefixClient, PrefixClient
from prefix_service.errors import InvalidResponse, NotFound
from tests.client.hostile import BODY, answer, hostile_server, read_request

Told = tuple[str | None, int]
"""The catalog that an answer names, if any, and its status."""


def told(catalog: str | None, status: int) -> tuple[int, dict[str, str], bytes]:
    """Returns an answer with adapters, or with a problem."""
    headers = {} if catalog is None else {"Prefix-Catalog": catalog}
    if status == 200:
        return status, headers | {"Content-Type": "application/json"}, b'{"items": [], "next": null}'
    problem = json.dumps({"code": "not-found", "detail": "none"}).encode()
    return status, headers | {"Content-Type": "application/problem+json"}, problem


@contextlib.contextmanager
def serving(answers: list[Told]) -> Iterator[str]:
    """Yields the URL of a server with these answers, over any number of connections."""
    waiting = iter(answers)

    def script(connection: socket.socket) -> None:
        while read_request(connection):
            status, headers, body = told(*next(waiting))
            lines = [f"{name}: {value}" for name, value in headers.items()]
            connection.sendall(answer(body, *lines, status=f"{status} X"))

    with hostile_server(script) as server:
        yield server.url


def mocked(answers: list[Told]) -> httpx.MockTransport:
    """Returns a transport of the caller's own with these answers."""
    waiting = iter(answers)

    def handle(_request: httpx.Request) -> httpx.Response:
        status, headers, body = told(*next(waiting))
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))

    return httpx.MockTransport(handle)


def listed(url: str, options: Mapping[str, Any], kind: str, calls: int) -> list[type[Exception] | None]:
    """Returns how each of several calls of one client ends."""

    def of(error: Exception | None) -> type[Exception] | None:
        if isinstance(error, InvalidResponse):
            assert "answers from catalog" in str(error)
        return None if error is None else type(error)

    if kind == "blocking":
        found: list[type[Exception] | None] = []
        with PrefixClient(url, "k", **options) as client:
            for _ in range(calls):
                try:
                    client.list("acme")
                    found.append(None)
                except (InvalidResponse, NotFound) as error:
                    found.append(of(error))
        return found

    async def run() -> list[type[Exception] | None]:
        found: list[type[Exception] | None] = []
        async with AsyncPrefixClient(url, "k", **options) as client:
            for _ in range(calls):
                try:
                    await client.list("acme")
                    found.append(None)
                except (InvalidResponse, NotFound) as error:
                    found.append(of(error))
        return found

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["blocking", "async"])
@pytest.mark.parametrize("way", ["own", "foreign"])
def test_another_catalog_is_refused(way: str, kind: str) -> None:
    """An answer of another catalog is refused, also if it is an error. Answers that name none are accepted before and
    after one that does."""
    answers: list[Told] = [(None, 200), ("a", 200), (None, 200), ("b", 200), ("b", 404), ("a", 404), ("a", 200)]
    expected = [None, None, None, InvalidResponse, InvalidResponse, NotFound, None]
    if way == "foreign":
        assert listed("http://service", {"http": mocked(answers)}, kind, len(answers)) == expected
    else:
        with serving(answers) as url:
            assert listed(url, {}, kind, len(answers)) == expected


def test_tensors_of_another_catalog_are_refused() -> None:
    """Tensors of another catalog are refused, and the cache keeps what it has."""
    catalogs = iter("ab")

    def script(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(
                answer(BODY, "Content-Type: application/vnd.safetensors", f"Prefix-Catalog: {next(catalogs)}")
            )

    with hostile_server(script) as server, PrefixClient(server.url, "k") as client:
        assert client.get("a/b").version == 1
        with pytest.raises(InvalidResponse, match="answers from catalog 'b', and before from 'a'"):
            client.get("a/b")
