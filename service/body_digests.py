"""Digests of whole bodies (RFC 9530), by entity tag and algorithm."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Final, TypeAlias

from service.plan import Plan
from service.prefix.digests import Algorithm, new_hasher
from service.prefix.rendering import Rendering

_REMEMBERED: Final = 10_000
_THREADS: Final = 16  # more than loads at once, each of which may hang in a read and keep one waiting

Pieces: TypeAlias = "SimpleQueue[memoryview | None]"


class BodyDigests:
    """Computes each digest once, however many callers ask for it in parallel. Used from the event loop and from threads
    that load.

    The SHA-256 of a body whose tensors are sent as they are stored is computed while the blob is read and verified, by
    another thread: with two cores both hashes take as long as one. A CRC-32C is too cheap to be worth that.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[str, Algorithm], Future[bytes]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, "body-digest")

    async def of(self, plan: Plan, rendering: Rendering, algorithm: Algorithm) -> bytes:
        """Return the digest of a plan's body: 32 bytes of SHA-256, or four of CRC-32C."""
        found = self._once((plan.etag, algorithm), lambda: self._threads.submit(_hash, plan, rendering, algorithm))
        if found.done():
            return found.result()
        # A caller that gives up must not cancel the computation for the others.
        return await asyncio.shield(asyncio.wrap_future(found))

    @contextlib.contextmanager
    def observing(self, plan: Plan, algorithm: Algorithm | None) -> Iterator[Callable[[memoryview], object] | None]:
        """Yields an observer for the stored blob's chunks, or None if no digest is needed during the read. Leave the
        block normally once the blob is verified; if it raises, the digest is discarded."""
        if algorithm != "sha-256" or not plan.is_stored or (plan.etag, algorithm) in self._digests:
            yield None
            return
        before, after = plan.message.around_values()
        tensor = _StoredTensor()
        running = self._threads.submit(_hash_stored, before, tensor.pieces, after)
        try:
            yield tensor.add
            # An MLP's result is stored in float32 whatever its weights were: no part of such a body.
            if len(before) + tensor.nbytes + len(after) == plan.message.content_length:
                self._once((plan.etag, algorithm), lambda: running)
        finally:
            tensor.pieces.put(None)

    def _once(self, key: tuple[str, Algorithm], begin: Callable[[], Future[bytes]]) -> Future[bytes]:
        """Return the computation that is under way or done, or else a new one."""
        with self._lock:
            if (found := self._digests.get(key)) is not None:
                return found
            begun = self._digests[key] = begin()
            if len(self._digests) > _REMEMBERED:
                del self._digests[next(iter(self._digests))]
        begun.add_done_callback(partial(self._forget_failure, key))
        return begun

    def _forget_failure(self, key: tuple[str, Algorithm], done: Future[bytes]) -> None:
        if done.exception() is not None:
            self._digests.pop(key, None)


def _hash(plan: Plan, rendering: Rendering, algorithm: Algorithm) -> bytes:
    body = new_hasher(algorithm)
    for chunk in plan.message.chunks(rendering):
        body.update(chunk)
    return body.digest()


def _hash_stored(before: bytes, pieces: Pieces, after: bytes) -> bytes:
    body = new_hasher("sha-256")
    body.update(before)
    while (piece := pieces.get()) is not None:
        body.update(piece)
    body.update(after)
    return body.digest()


class _StoredTensor:
    """The pieces of a safetensors file of one tensor, without its header."""

    def __init__(self) -> None:
        self.pieces: Pieces = SimpleQueue()
        self.nbytes = 0
        self._header: int | None = None  # bytes of it still to come

    def add(self, piece: memoryview) -> None:
        header = 8 + int.from_bytes(piece[:8], "little") if self._header is None else self._header
        self._header = max(header - len(piece), 0)
        self.nbytes += len(piece[header:])
        self.pieces.put(piece[header:])
