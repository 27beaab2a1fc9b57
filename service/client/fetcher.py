"""Fetches of tensors over the lane: memory for the body, its hash as it comes, large ones in ranges, and on the same
host no body at all."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from service.client.connection import Connection, connection_failed
from service.client.http1 import Head
from service.client.lane import Interrupt, Lane
from service.client.protocol import Answer, BodyDigest, Fetch, require_success, verifiable
from service.client.ranges import Changed, Pieces
from service.client.shared_memory import ACCEPTING_FILES, in_shared_memory
from service.errors import InvalidResponse
from service.prefix.digests import Algorithm, Hasher, new_hasher

_MOST_TOLD: Final = 1 << 20  # bytes of an answer that is no tensors


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
        self._base_url, self._lane = connection.base_url, Lane(connection)
        self._allocate, self._connections = allocate, connections
        self._pinned, self._shared_memory = pinned, shared_memory

    def fetch(self, fetch: Fetch, until: float, interrupt: Interrupt) -> Any:
        """What the fetch makes of its answer, which is there before the moment `until` of `time.monotonic`.

        Raises:
            ConnectionFailed: it is not there by then, or not all of it.
            PrefixServiceError: the service reported it, or the fetch refused it.
        """
        try:
            answer = self._answer(fetch, until, interrupt)
        except OSError as error:
            raise connection_failed(error, self._base_url) from error
        return fetch.read(require_success(answer))

    def blocks(self, fetch: Fetch) -> bool:
        """Whether it needs a thread: disks and pinned memory take long, and pieces come in threads."""
        return fetch.blocks or self._pinned or self._connections > 1

    async def fetch_on_loop(self, fetch: Fetch, until: float) -> Any:
        """As `fetch`, on the running event loop, for what does not block.

        Raises:
            ConnectionFailed, PrefixServiceError: as `fetch`.
        """
        try:
            answer = await self._answer_on_loop(fetch, until)
        except OSError as error:
            raise connection_failed(error, self._base_url) from error
        return fetch.read(require_success(answer))

    async def _answer_on_loop(self, fetch: Fetch, until: float) -> Answer:
        if self._shared_memory:
            found = in_shared_memory(await self._whole_on_loop(fetch, until, ACCEPTING_FILES))
            if found is not None:
                return found
        return await self._whole_on_loop(fetch, until)

    async def _whole_on_loop(self, fetch: Fetch, until: float, headers: Mapping[str, str] | None = None) -> Answer:
        arrival = _Arrival(self._allocate, is_verified=fetch.is_verified)
        exchange = self._lane.exchange_on_loop
        head, body = await exchange(fetch, arrival.place, until, headers=headers, observe=arrival.observe)
        return Answer(head.status, head.headers, body, arrival.digest)

    def _answer(self, fetch: Fetch, until: float, interrupt: Interrupt) -> Answer:
        if self._shared_memory:
            found = in_shared_memory(self._whole(fetch, until, interrupt, ACCEPTING_FILES))
            if found is not None:
                return found
        if self._connections > 1:
            try:
                place = _Arrival(self._allocate, is_verified=False).place
                head, body = Pieces(self._lane, fetch, until, interrupt).receive(place, self._connections)
                return Answer(200 if head.status == 206 else head.status, head.headers, body)
            except Changed:
                pass  # whole, over one connection, it cannot be torn
        return self._whole(fetch, until, interrupt)

    def _whole(
        self, fetch: Fetch, until: float, interrupt: Interrupt, headers: Mapping[str, str] | None = None
    ) -> Answer:
        arrival = _Arrival(self._allocate, is_verified=fetch.is_verified)
        exchange = self._lane.exchange
        head, body = exchange(fetch, arrival.place, until, interrupt, headers=headers, observe=arrival.observe)
        return Answer(head.status, head.headers, body, arrival.digest)

    def close(self) -> None:
        """Close every connection."""
        self._lane.close()


class _Arrival:
    """One body on its way: where it goes, and its digest, in the algorithm that its head names."""

    def __init__(self, allocate: Callable[[int], memoryview], *, is_verified: bool) -> None:
        self._allocate = allocate
        self._is_verified = is_verified
        self._algorithm: Algorithm | None = None
        self._hasher: Hasher | None = None

    def place(self, head: Head) -> memoryview:
        """Return memory for the body of an answer with this head."""
        if head.status in (200, 206):
            if self._is_verified and (algorithm := verifiable(head.headers)) is not None:
                self._algorithm, self._hasher = algorithm, new_hasher(algorithm)
            return self._allocate(head.length)
        if head.length > _MOST_TOLD:
            raise InvalidResponse(f"status {head.status} with {head.length} bytes: is the URL right?")
        return memoryview(bytearray(head.length))

    def observe(self, piece: memoryview) -> None:
        """Add a piece of the body to its digest."""
        if self._hasher is not None:
            self._hasher.update(piece)

    @property
    def digest(self) -> BodyDigest | None:
        """The digest of what arrived; None where none was computed."""
        if self._algorithm is None or self._hasher is None:
            return None
        return self._algorithm, self._hasher.digest()
