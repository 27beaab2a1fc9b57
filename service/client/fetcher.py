"""Requests over the lane. For tensors: memory for the body, its hash as it comes, large bodies in ranges, and on the
same host no body at all."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from service.client.connection import Connection, connection_failed
from service.client.http1 import Head
from service.client.lane import Interrupt, Lane
from service.client.protocol import Answer, Fetch, Request, require_success
from service.client.ranges import Changed, Pieces
from service.client.shared_memory import asking, read_shared
from service.errors import InvalidResponse

_MOST_PROBLEM: Final = 1 << 20  # bytes of an error
MOST_JSON: Final = 32 << 20
"""Bytes that an answer may have that is no tensors."""


class Fetcher:
    """Safe to share between threads. `allocate` gives memory for a body, which takes long where it is `pinned`; a body
    may come in ranges over `connections` at once, or with `shared_memory` be mapped where the service says that it
    lies."""

    def __init__(
        self,
        connection: Connection,
        allocate: Callable[[int], memoryview],
        connections: int,
        *,
        pinned: bool,
        shared_memory: bool,
    ) -> None:
        self.address, self._lane = connection.address, Lane(connection)
        self._allocate, self._connections = allocate, connections
        self._pinned, self._shared_memory = pinned, shared_memory

    def carry_out(self, request: Request, until: float, interrupt: Interrupt) -> Any:
        """Returns the answer to a request, or what a fetch makes of it, before the moment `until` of
        `time.monotonic`.

        Raises:
            ConnectionFailed: it is not there by then, or not all of it.
            PrefixServiceError: the service reported it, or the fetch refused it.
        """
        try:
            if isinstance(request, Fetch):
                return self._fetch(request, until, interrupt)
            received = self._lane.exchange(request, place_json, until, interrupt, most=MOST_JSON)
        except OSError as error:
            raise connection_failed(error, self.address) from error
        return require_success(_answer(received))

    def blocks(self, request: Request) -> bool:
        """Whether a request needs a thread: hashing and pinned memory take long, ranges come in threads, and what a
        change sends may be read from a disk."""
        if isinstance(request, Fetch):
            return request.is_hashed or self._pinned or self._connections > 1
        return request.method != "GET"

    async def carry_out_on_loop(self, request: Request, until: float) -> Any:
        """Returns what `carry_out` does, on the running event loop, for a request that does not block.

        Raises:
            ConnectionFailed, PrefixServiceError: as `carry_out`.
        """
        try:
            if isinstance(request, Fetch):
                return await self._fetch_on_loop(request, until)
            received = await self._lane.exchange_on_loop(request, place_json, until, most=MOST_JSON)
        except OSError as error:
            raise connection_failed(error, self.address) from error
        return require_success(_answer(received))

    def _fetch(self, fetch: Fetch, until: float, interrupt: Interrupt) -> Any:
        if self._shared_memory:
            named = self._whole(fetch, until, interrupt, asking(fetch))
            if (found := read_shared(fetch, named)) is not None:
                return found
        return fetch.read(require_success(self._answer(fetch, until, interrupt)))

    async def _fetch_on_loop(self, fetch: Fetch, until: float) -> Any:
        if self._shared_memory:
            named = await self._lane.exchange_on_loop(fetch, self._place, until, headers=asking(fetch))
            if (found := read_shared(fetch, _answer(named))) is not None:
                return found
        answer = _answer(await self._lane.exchange_on_loop(fetch, self._place, until))
        return fetch.read(require_success(answer))

    def _answer(self, fetch: Fetch, until: float, interrupt: Interrupt) -> Answer:
        if self._connections > 1:
            try:
                head, body = Pieces(self._lane, fetch, until, interrupt).receive(self._place, self._connections)
                return Answer(200 if head.status == 206 else head.status, head.headers, body)
            except Changed:
                pass  # whole, over one connection, it cannot be torn
        return self._whole(fetch, until, interrupt)

    def _whole(
        self, fetch: Fetch, until: float, interrupt: Interrupt, headers: Mapping[str, str] | None = None
    ) -> Answer:
        hasher = hashlib.sha256() if fetch.is_hashed else None
        received = self._lane.exchange(fetch, self._place, until, interrupt, headers=headers, hasher=hasher)
        return _answer(received, None if hasher is None else hasher.digest())

    def _place(self, head: Head) -> memoryview:
        if head.status in (200, 206):
            return self._allocate(head.length)
        return place_json(head)

    def close(self) -> None:
        """Close every connection."""
        self._lane.close()


def place_json(head: Head) -> memoryview:
    """Returns memory for an answer that is no tensors.

    Raises:
        InvalidResponse: it is too long to be one of the service.
    """
    most = MOST_JSON if head.status < 300 else _MOST_PROBLEM
    if head.length > most:
        raise InvalidResponse(f"status {head.status} with {head.length} bytes, more than {most}: is the URL right?")
    return memoryview(bytearray(head.length))


def _answer(received: tuple[Head, memoryview], sha256: bytes | None = None) -> Answer:
    head, body = received
    return Answer(head.status, head.headers, body, sha256)
