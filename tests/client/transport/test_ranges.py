"""`transport.ranges`: a large body in several parallel ranges is whole, of one version, and verified."""

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
import torch

from prefix_service.client import AsyncPrefixClient, PrefixClient
from prefix_service.client.transport.ranges import PIECE
from prefix_service.errors import ConnectionFailed, InvalidResponse
from prefix_service.prefix.wire.digests import digest_of, format_digest
from tests.benchmarks.fleet import Shape
from tests.client.conftest import LLAMA
from tests.client.hostile import prefix_body
from tests.client.test_client import published
from tests.conftest import Server

LARGE = prefix_body(tokens=110_000)  # 42 MB
OTHER = LARGE[: PIECE - 4] + bytes(4) + LARGE[PIECE:-4] + bytes(4)  # differs in both pieces


class Ranged(BaseHTTPRequestHandler):
    """Serves `body` under `etag` in the ranges that are asked for, or what `answers` makes of a request."""

    protocol_version = "HTTP/1.1"
    body, etag = LARGE, '"one"'
    asked: list[dict[str, str]]
    answers: ClassVar["Callable[[Ranged], bool]"]

    def do_GET(self) -> None:
        """Answers a request."""
        self.asked.append({name.lower(): value for name, value in self.headers.items()})
        if not self.answers():
            self.give()

    def give(self, body: bytes | None = None, etag: str | None = None, described: bytes | None = None) -> None:
        """Returns the requested range, or the whole, with the digest of the body that is `described`."""
        body, etag = body or self.body, etag or self.etag
        start, stop, status = 0, len(body), 200
        if "Range" in self.headers and self.headers.get("If-Range", etag) == etag:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(int(last) + 1, len(body)), 206
        self.send_response(status)
        self.send_header("ETag", etag)
        self.send_header("Repr-Digest", format_digest("crc32c", digest_of("crc32c", described or body)))
        self.send_header("Content-Length", str(stop - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(memoryview(body)[start:stop])

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""


@contextmanager
def ranged(answers: Callable[[Ranged], bool] = lambda _: False) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yields the URL of such a server, and the headers of the requests to it."""
    asked: list[dict[str, str]] = []
    handler = type("Handler", (Ranged,), {"asked": asked, "answers": answers})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def is_body(prefix: Any, body: bytes) -> bool:
    """Returns whether a tensor is that of the body."""
    tensor = prefix.kv.tensor
    return torch.equal(tensor.flatten(), torch.frombuffer(bytearray(body[-tensor.nbytes :]), dtype=tensor.dtype))


def test_a_large_prefix_comes_in_ranges_from_the_service(server: Server) -> None:
    """Both clients get by ranges the tensors that one connection brings, verified by the digest of the whole."""
    shape = Shape(tokens=600)  # 79 MB
    weights, _ = shape.weights(seed=0)
    with PrefixClient(server.url, server.admin_key) as client:
        client.publish_files("ranges/large", shape.config, io.BytesIO(weights))
        published(client, "ranges/small", LLAMA)
        whole, small = (client.get(f"ranges/{name}").kv.tensor for name in ("large", "small"))
    with PrefixClient(server.url, server.admin_key, connections=3, verify_digest=True) as client:
        assert torch.equal(client.get("ranges/large").kv.tensor, whole)
        assert torch.equal(client.get("ranges/small").kv.tensor, small)
        assert client.get("ranges/large").version == 1

    async def fetch() -> torch.Tensor:
        async with AsyncPrefixClient(server.url, server.admin_key, connections=2) as later:
            found = await asyncio.gather(later.get("ranges/large"), later.get("ranges/small"))
            return found[0].kv.tensor

    assert torch.equal(asyncio.run(fetch()), whole)


def test_ranges_are_asked_for_once_each_and_held_together() -> None:
    """Each range is asked for once, all but the first with the first one's entity tag; later calls revalidate."""
    with ranged() as (url, asked), PrefixClient(url, connections=4) as client:
        assert is_body(client.get("a/b"), LARGE)
    told = sorted((headers["range"], headers.get("if-range")) for headers in asked)
    assert told == [(f"bytes=0-{PIECE - 1}", None), (f"bytes={PIECE}-{len(LARGE) - 1}", '"one"')]


def test_one_connection_asks_for_no_range() -> None:
    """By default a fetch is one request without a range."""
    with ranged() as (url, asked), PrefixClient(url) as client:
        assert is_body(client.get("a/b"), LARGE)
    assert ["range" in headers for headers in asked] == [False]


def changes(handler: Ranged) -> bool:
    """A server that has another body since the first request."""
    if len(handler.asked) > 1:
        handler.give(OTHER, '"two"')
    return len(handler.asked) > 1


def changes_without_if_range(handler: Ranged) -> bool:
    """A server that has another body since the first request, behind a proxy that ignores If-Range."""
    if len(handler.asked) > 1:
        del handler.headers["If-Range"]
        handler.give(OTHER, '"two"')
    return len(handler.asked) > 1


def weak(handler: Ranged) -> bool:
    """A server behind a proxy that weakens the entity tag."""
    handler.give(OTHER, 'W/"one"')
    return True


def elsewhere(handler: Ranged) -> bool:
    """A server that sends another range than the one that was asked for, the second time."""
    if len(handler.asked) == 2:
        handler.headers.replace_header("Range", f"bytes={PIECE - 1}-{len(LARGE) - 2}")
    handler.give(OTHER)
    return True


def whole(handler: Ranged) -> bool:
    """A server without ranges."""
    del handler.headers["Range"]
    handler.give(OTHER)
    return True


def unsaid(handler: Ranged) -> bool:
    """A server that answers 206 without Content-Range."""
    if "Range" not in handler.headers:
        handler.give(OTHER)
        return True
    handler.send_response(206)
    handler.send_header("Content-Length", "5")
    handler.end_headers()
    handler.wfile.write(b"12345")
    return True


@pytest.mark.parametrize("answers", [changes, changes_without_if_range, weak, elsewhere, whole, unsaid])
def test_no_two_bodies_are_ever_mixed(answers: Callable[[Ranged], bool]) -> None:
    """If ranges do not certainly belong to one body, it is fetched again, whole, over one connection."""
    with ranged(answers) as (url, asked), PrefixClient(url, connections=3) as client:
        assert is_body(client.get("a/b"), OTHER)
    assert not [headers for headers in asked if headers.get("if-range", "").startswith("W/")]


def test_a_range_that_fails_fails_the_call(two_attempts: None) -> None:
    """A range that fails is a failure of the fetch, which is repeated whole."""

    def hangs_up(handler: Ranged) -> bool:
        if "If-Range" in handler.headers:
            handler.close_connection = True
            return True
        return False

    with ranged(hangs_up) as (url, asked), PrefixClient(url, connections=2, timeout=60) as client:
        with pytest.raises(ConnectionFailed):
            client.get("a/b")
        assert len(asked) > 2


def test_a_digest_is_that_of_the_whole() -> None:
    """A body in ranges is verified as a whole: a flipped bit in the last range is an error."""
    flipped = LARGE[:-1] + bytes([LARGE[-1] ^ 1])

    def damaged(handler: Ranged) -> bool:
        handler.give(flipped, described=LARGE)
        return True

    with (
        ranged(damaged) as (url, _),
        PrefixClient(url, connections=2) as client,
        pytest.raises(InvalidResponse, match="damaged"),
    ):
        client.get("a/b")
