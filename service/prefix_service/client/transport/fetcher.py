"""Receives tensors over pooled connections: memory for the body, its digest on arrival, large bodies in ranges, and a
mapping instead of a body on the same host.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from prefix_service.client.protocol import Answer, BodyDigest, Fetch, Progress, Request, require_success, verifiable
from prefix_service.client.transport.connection import Connection, connection_failed
from prefix_service.client.transport.http1 import Head
from prefix_service.client.transport.link import MOST_JSON, Observer, allocate_json
from prefix_service.client.transport.pool import Exchanges, Interrupt
from prefix_service.client.transport.ranges import Changed, Pieces
from prefix_service.client.transport.shared_memory import ACCEPTING_FILES, read_shared
from prefix_service.prefix.variant import SHARED_FILE_TYPE
from prefix_service.prefix.wire.digests import Algorithm, Hasher, new_hasher


class Fetcher:
    """Carries out requests; safe to share between threads.

    `address` is the service's, or all of them, for error messages. `allocate` returns memory for a body, and is slow if
    `pinned`. A body can be received in ranges over `connections` connections. With `shared_memory`, the file that the
    service names is mapped instead of received.
    """

    def __init__(
        self,
        connection: Connection,
        pool: Exchanges,
        allocate: Callable[[int], memoryview],
        connections: int,
        *,
        address: str,
        pinned: bool,
        shared_memory: bool,
    ) -> None:
        self.address, self._pool, self._connection = address, pool, connection
        self._allocate, self._connections = allocate, connections
        self._pinned, self._shared_memory = pinned, shared_memory

    def carry_out(self, request: Request, until: float, interrupt: Interrupt) -> Any:
        """Returns the answer to a request, or the result of a fetch, before the time `until` of `time.monotonic`.

        Raises:
            ConnectionFailed: the answer is missing or incomplete at that time.
            PrefixServiceError: the service reported the error, or the fetch refused the answer.
        """
        try:
            if isinstance(request, Fetch):
                return self._fetch(request, until, interrupt)
            received = self._pool.exchange(request, allocate_json, until, interrupt, most=MOST_JSON)
        except OSError as error:
            raise connection_failed(error, self.address) from error
        head, body = received
        return require_success(Answer(head.status, head.headers, body))

    def blocks(self, request: Request) -> bool:
        """Returns whether a request needs a thread.

        Disks and pinned memory are slow, ranges use threads, and the body of a change may be read from a disk.
        """
        if isinstance(request, Fetch):
            return request.blocks or self._pinned or self._connections > 1
        return request.method != "GET"

    async def carry_out_on_loop(self, request: Request, until: float) -> Any:
        """Carries out a request that does not block on the running event loop; returns its answer, or the result of a
        fetch.

        Raises:
            ConnectionFailed: the answer is missing or incomplete at the time `until`.
            PrefixServiceError: the service reported the error, or the fetch refused the answer.
        """
        try:
            if isinstance(request, Fetch):
                return await self._fetch_on_loop(request, until)
            received = await self._pool.exchange_on_loop(request, allocate_json, until, most=MOST_JSON)
        except OSError as error:
            raise connection_failed(error, self.address) from error
        head, body = received
        return require_success(Answer(head.status, head.headers, body))

    def _fetch(self, fetch: Fetch, until: float, interrupt: Interrupt) -> Any:
        if self._shared_memory:
            named = self._whole(fetch, until, interrupt, ACCEPTING_FILES)
            if (found := read_shared(fetch, named, self._connection.peer_uid)) is not None:
                return found
        return fetch.read(require_success(self._answer(fetch, until, interrupt)))

    async def _fetch_on_loop(self, fetch: Fetch, until: float) -> Any:
        if self._shared_memory:
            named = await self._whole_on_loop(fetch, until, ACCEPTING_FILES)
            if (found := read_shared(fetch, named, self._connection.peer_uid)) is not None:
                return found
        return fetch.read(require_success(await self._whole_on_loop(fetch, until)))

    def _answer(self, fetch: Fetch, until: float, interrupt: Interrupt) -> Answer:
        if self._connections > 1:
            try:
                received = _ReceivedBody(self._allocate, fetch.progress, is_verified=False)
                pieces = Pieces(self._pool, fetch, until, interrupt, received.observer)
                head, body = pieces.receive(received.allocate, self._connections)
                return Answer(200 if head.status == 206 else head.status, head.headers, body)
            except Changed:
                pass  # received whole, over one connection, it cannot be torn
        return self._whole(fetch, until, interrupt)

    def _whole(
        self, fetch: Fetch, until: float, interrupt: Interrupt, headers: Mapping[str, str] | None = None
    ) -> Answer:
        received = _ReceivedBody(self._allocate, fetch.progress, is_verified=fetch.is_verified)
        exchange = self._pool.exchange
        head, body = exchange(fetch, received.allocate, until, interrupt, headers=headers, observe=received.observe)
        return Answer(head.status, head.headers, body, received.digest)

    async def _whole_on_loop(self, fetch: Fetch, until: float, headers: Mapping[str, str] | None = None) -> Answer:
        received = _ReceivedBody(self._allocate, fetch.progress, is_verified=fetch.is_verified)
        exchange = self._pool.exchange_on_loop
        head, body = await exchange(fetch, received.allocate, until, headers=headers, observe=received.observe)
        return Answer(head.status, head.headers, body, received.digest)

    def close(self) -> None:
        """Closes every connection."""
        self._pool.close()


class _ReceivedBody:
    """One body while it is received: its memory, its digest in the algorithm that the head names, and its progress.

    Several threads may observe a body without a digest.
    """

    def __init__(self, allocate: Callable[[int], memoryview], progress: Progress | None, *, is_verified: bool) -> None:
        self._allocate, self._progress = allocate, progress
        self._is_verified = is_verified
        self._algorithm: Algorithm | None = None
        self._hasher: Hasher | None = None
        self._lock = threading.Lock()
        self._arrived = self._total = 0

    def allocate(self, head: Head) -> memoryview:
        """Returns memory for the body of an answer with this head."""
        if head.status not in (200, 206):
            return allocate_json(head)
        if self._is_verified and (algorithm := verifiable(head.headers)) is not None:
            self._algorithm, self._hasher = algorithm, new_hasher(algorithm)
        if head.headers.get("content-type") != SHARED_FILE_TYPE:  # a file's name is not tensors
            self._total = head.length
        return self._allocate(head.length)

    @property
    def observer(self) -> Observer | None:
        """The observer of a body that has no digest; None if there is no progress to report."""
        return None if self._progress is None else self.observe

    def observe(self, piece: memoryview) -> None:
        """Adds a piece of the body to its digest, and reports progress."""
        if self._hasher is not None:
            self._hasher.update(piece)
        if self._progress is not None and self._total:
            with self._lock:
                self._arrived += len(piece)
                self._progress(self._arrived, self._total)

    @property
    def digest(self) -> BodyDigest | None:
        """The digest of the received bytes; None if it was not computed."""
        if self._algorithm is None or self._hasher is None:
            return None
        return self._algorithm, self._hasher.digest()
