"""Bodies are compared with their digests, also on loopback, where sidecars and forwarded ports are."""

import asyncio

import pytest

from prefix_service.client import AsyncPrefixClient, PrefixClient
from prefix_service.errors import InvalidResponse
from prefix_service.prefix.wire.digests import Algorithm, digest_of, format_digest
from tests.client.hostile import BODY, answer, hostile_server, says
from tests.client.transport.test_pool import is_right

FLIPPED = BODY[:-1] + bytes([BODY[-1] ^ 1])


def with_digests(body: bytes, *algorithms: Algorithm) -> bytes:
    """Returns an answer with `body` and the digests of `BODY`."""
    field = ", ".join(format_digest(algorithm, digest_of(algorithm, BODY)) for algorithm in algorithms)
    head = f'HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nETag: "e"\r\nRepr-Digest: {field}\r\n\r\n'
    return head.encode() + body


@pytest.mark.parametrize("algorithms", [("crc32c",), ("sha-256",), ("sha-256", "crc32c")], ids=str)
@pytest.mark.parametrize("is_async", [False, True], ids=["blocking", "asyncio"])
def test_a_flipped_bit_is_an_error_and_is_not_cached(algorithms: tuple[Algorithm, ...], is_async: bool) -> None:
    """By default a flipped bit is an error and is not cached, over TCP on loopback, and from an older service, which
    has SHA-256 alone."""
    script = says(with_digests(FLIPPED, *algorithms), with_digests(BODY, *algorithms))

    async def fetch(url: str) -> None:
        async with AsyncPrefixClient(url) as client:
            with pytest.raises(InvalidResponse, match="damaged"):
                await client.get("a/b@1")
            assert is_right(await client.get("a/b@1"))

    with hostile_server(script) as server:
        if is_async:
            asyncio.run(fetch(server.url))
            return
        with PrefixClient(server.url) as client:
            with pytest.raises(InvalidResponse, match="damaged"):
                client.get("a/b@1")
            assert is_right(client.get("a/b@1"))


def test_an_answer_without_a_digest_is_an_error() -> None:
    """A client that verifies refuses an answer without a digest: whatever removed it may have changed more."""
    bare = f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY
    with hostile_server(says(bare, bare)) as server:
        with PrefixClient(server.url) as client, pytest.raises(InvalidResponse, match="no Repr-Digest"):
            client.get("a/b@1")
        with PrefixClient(server.url, verify_digest=False) as client:
            assert is_right(client.get("a/b@1"))


def test_the_cheap_digest_is_asked_for() -> None:
    """A client that verifies prefers CRC-32C, and one that does not asks for no digest."""
    for verify_digest, asked in ((None, True), (False, False)):
        with (
            hostile_server(says(answer())) as hostile,
            PrefixClient(hostile.url, verify_digest=verify_digest) as client,
        ):
            client.get("a/b@1")
        assert (b"Want-Repr-Digest: crc32c=2, sha-256=1\r\n" in hostile.requests[0][0]) is asked
