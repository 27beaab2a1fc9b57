"""`progress` counts every byte of large fetches and uploads once, up to the total, on every path."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from prefix_service.client import AsyncPrefixClient, PrefixClient
from prefix_service.errors import NotFound
from tests.client.conftest import LLAMA
from tests.client.hostile import BODY, answer, hostile_server, prefix_body, read_request, says
from tests.client.transport.test_deadlines import KINDS, called
from tests.client.transport.test_ranges import LARGE, ranged

Seen = list[tuple[int, int]]


class Recorder:
    """Records the calls of `progress`."""

    def __init__(self) -> None:
        self.seen: Seen = []

    def __call__(self, done: int, total: int) -> None:
        """Records one report."""
        self.seen.append((done, total))


@pytest.fixture
def seen() -> Recorder:
    """Returns the reports of one call."""
    return Recorder()


def is_whole(seen: Seen, total: int) -> bool:
    """Returns whether reports grow up to a total."""
    return bool(seen) and seen == sorted(seen) and seen[-1] == (total, total) and {each for _, each in seen} == {total}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"verify_digest": False}, {"connections": 2}], ids=str)
def test_a_fetch_is_followed(kind: type[Any], options: dict[str, Any], seen: Recorder) -> None:
    """A fetch is reported several times, with or without a digest; a 304 is not reported."""
    body = prefix_body(tokens=5000)
    not_modified = b'HTTP/1.1 304 Not Modified\r\nETag: "e"\r\n\r\n'

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(answer(body))
        while read_request(connection):
            connection.sendall(not_modified)

    async def twice() -> None:
        client = kind(server.url, **options)
        for _ in range(2):
            found = client.get("a/b", progress=seen)
            assert (await found if kind is AsyncPrefixClient else found).num_virtual_tokens == 5000
        closed = client.close()
        if kind is AsyncPrefixClient:
            await closed

    with hostile_server(script) as server:
        asyncio.run(twice())
        assert b"If-None-Match" in server.requests[0][-1]
    assert is_whole(seen.seen, len(body))
    assert len(seen.seen) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_are_followed_as_one_body(kind: type[Any], seen: Recorder) -> None:
    """Several connections report to one function, one call at a time."""
    with ranged() as (url, asked):
        called(kind(url, connections=4), lambda client: client.get("a/b", progress=seen))
        assert len(asked) == 2
    assert is_whole(seen.seen, len(LARGE))


@pytest.mark.parametrize("kind", KINDS)
def test_a_transport_of_the_callers_own_is_followed(kind: type[Any], seen: Recorder) -> None:
    """A body that httpx receives is reported in pieces; a body without a declared length is not reported."""
    http = httpx.HTTPTransport if kind is PrefixClient else httpx.AsyncHTTPTransport
    undeclared = answer(BODY, "Connection: close").replace(b"Content-Length: %d\r\n" % len(BODY), b"")
    with hostile_server(says(answer()), says(undeclared)) as server:
        called(kind(server.url, http=http()), lambda client: client.get("a/b", progress=seen))
        assert is_whole(seen.seen, len(BODY))
        seen.seen.clear()
        called(kind(server.url, http=http()), lambda client: client.get("a/b", progress=seen))
        assert seen.seen == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_upload_is_followed(kind: type[Any], seen: Recorder, tmp_path: Path) -> None:
    """An upload is reported up to the length of the request body, which is a little more than the weights."""
    (tmp_path / "adapter_config.json").write_bytes((LLAMA / "adapter_config.json").read_bytes())
    save_file({"prompt_embeddings": torch.zeros(20, 50_000)}, tmp_path / "adapter_model.safetensors")
    problem = answer(b'{"code": "not-found"}', "Content-Type: application/problem+json", status="404 Not Found")
    with hostile_server(says(problem)) as server, pytest.raises(NotFound):
        called(kind(server.url), lambda client: client.publish("a/b", tmp_path, progress=seen))
    total = seen.seen[-1][1]
    assert is_whole(seen.seen, total)
    assert len(seen.seen) > 2
    assert seen.seen[0][0] < total
    assert 0 < total - (tmp_path / "adapter_model.safetensors").stat().st_size < 4096


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_no_progress_and_another_try_begins_again(kind: type[Any], seen: Recorder) -> None:
    """The body of a problem is not reported, and after half an answer the next try counts from 0."""
    unavailable = answer(
        b'{"code": "unavailable", "detail": "x"}',
        "Content-Type: application/problem+json",
        "Retry-After: 0",
        status="503 Service Unavailable",
    )
    body = prefix_body(tokens=5000)
    with hostile_server(says(unavailable), says(answer(body)[:-10]), says(answer(body))) as server:
        called(kind(server.url, timeout=60), lambda client: client.get("a/b", progress=seen))
    again = [index for index, (done, _) in enumerate(seen.seen) if index and done < seen.seen[index - 1][0]]
    assert len(again) == 1
    assert {total for _, total in seen.seen} == {len(body)}
    assert is_whole(seen.seen[again[0] :], len(body))
