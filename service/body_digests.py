"""SHA-256 of whole bodies (RFC 9530's representation digest), by entity tag."""

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Final, TypeAlias

from service.plan import Plan
from service.prefix.rendering import Rendering

_REMEMBERED: Final = 10_000
_THREADS: Final = 16  # more than loads at once, each of which may hang in a read and keep one waiting

Pieces: TypeAlias = "SimpleQueue[memoryview | None]"


class BodyDigests:
    """Each computed once, however many ask for it at once. Used from the event loop and from threads that load.

    A body whose tensors are sent as they are stored is hashed while the blob is read and verified, by another thread:
    both hashes take as long as one where there are two cores.
    """

    def __init__(self) -> None:
        self._digests: dict[str, Future[bytes]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, "body-digest")

    async def of(self, plan: Plan, rendering: Rendering) -> bytes:
        """The digest of a plan's body, which is 32 bytes."""
        found = self._once(plan.etag, lambda: self._threads.submit(_hash, plan, rendering))
        if found.done():
            return found.result()
        # One who gives up must not take it away from the others.
        return await asyncio.shield(asyncio.wrap_future(found))

    @contextlib.contextmanager
    def beside(self, plan: Plan) -> Iterator[Callable[[memoryview], object] | None]:
        """Give each piece of the stored blob to what this yields, if anything, and end the block once it is verified:
        a digest of what could not be verified is thrown away."""
        if not plan.is_stored or plan.etag in self._digests:
            yield None
            return
        before, after = plan.message.around_values()
        tensor = _StoredTensor()
        running = self._threads.submit(_hash_stored, before, tensor.pieces, after)
        try:
            yield tensor.add
            # An MLP's result is stored in float32 whatever its weights were: no part of such a body.
            if len(before) + tensor.nbytes + len(after) == plan.message.content_length:
                self._once(plan.etag, lambda: running)
        finally:
            tensor.pieces.put(None)

    def _once(self, etag: str, begin: Callable[[], Future[bytes]]) -> Future[bytes]:
        """The computation that is under way or done, or else a new one."""
        with self._lock:
            if (found := self._digests.get(etag)) is not None:
                return found
            begun = self._digests[etag] = begin()
            if len(self._digests) > _REMEMBERED:
                del self._digests[next(iter(self._digests))]
        begun.add_done_callback(partial(self._forget_failure, etag))
        return begun

    def _forget_failure(self, etag: str, done: Future[bytes]) -> None:
        if done.exception() is not None:
            self._digests.pop(etag, None)


def _hash(plan: Plan, rendering: Rendering) -> bytes:
    body = hashlib.sha256()
    for chunk in plan.message.chunks(rendering):
        body.update(chunk)
    return body.digest()


def _hash_stored(before: bytes, pieces: Pieces, after: bytes) -> bytes:
    body = hashlib.sha256(before)
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
