"""Digests of whole bodies (RFC 9530), by entity tag and algorithm."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice, repeat
from queue import SimpleQueue
from typing import Final, TypeAlias

from prefix_service.library.in_parallel import InParallel
from prefix_service.library.plan import Plan
from prefix_service.prefix.wire.digests import Algorithm, Crc32c, Hasher, new_hasher
from prefix_service.prefix.wire.masks import Piece
from prefix_service.prefix.wire.prefix_file import chunks_of
from prefix_service.prefix.wire.rendering import Rendering
from prefix_service.registry.admission import Admission
from prefix_service.system.shares import Shares

MOST_REPEATED: Final = 256 << 20
"""The most bytes of a body with repeated rows for which a SHA-256 is computed."""

_REMEMBERED: Final = 10_000
_MEGABYTE: Final = 1 << 20
_STEP: Final = 16  # megabytes hashed per turn
_AROUND: Final = 16 << 20  # the most bytes around stored keys and values that are made while these are read

Pieces: TypeAlias = "SimpleQueue[memoryview | None]"


class BodyDigests:
    """Computes each digest once, however many callers ask for it in parallel, and stops if no caller waits for it any
    more.

    Computations run in the turns of the tenant that owns the prefix. Methods are called from the event loop and from
    threads that load.

    The SHA-256 of a body whose tensors are sent as they are stored is computed by a second thread while the blob is
    read and verified: on two cores, both hashes take as long as one. A CRC-32C is too cheap to be worth that.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._lock = threading.Lock()
        self._known: Shares[tuple[str, Algorithm], bytes] = Shares(_REMEMBERED)
        self._computing: InParallel[tuple[str, Algorithm], bytes] = InParallel()

    def known(self, plan: Plan, algorithm: Algorithm) -> bytes | None:
        """Returns a digest that was computed before, or None."""
        with self._lock:
            return self._known.get((plan.etag, algorithm))

    async def of(self, plan: Plan, rendering: Rendering, algorithm: Algorithm) -> bytes | None:
        """Returns the digest of a plan's body: 32 bytes of SHA-256 or 4 of CRC-32C, or None if it costs too much."""
        if (found := self.known(plan, algorithm)) is not None:
            return found
        if algorithm == "sha-256" and not plan.is_one_rendering and plan.file.content_length > MOST_REPEATED:
            return None
        return await self._computing.result((plan.etag, algorithm), partial(self._compute, plan, rendering, algorithm))

    async def _compute(self, plan: Plan, rendering: Rendering, algorithm: Algorithm) -> bytes:
        tenant = plan.version.tenant
        hasher = new_hasher(algorithm)
        pieces = plan.file.pieces(rendering)
        steps = _crc_steps(hasher, pieces) if isinstance(hasher, Crc32c) else _sha_steps(hasher, pieces)
        while await self._admission.run(tenant, partial(_step, steps)):
            pass
        self._remember(plan, algorithm, hasher.digest())
        return hasher.digest()

    def _remember(self, plan: Plan, algorithm: Algorithm, digest: bytes) -> None:
        with self._lock:
            self._known.put(plan.version.tenant, (plan.etag, algorithm), digest)

    @contextlib.contextmanager
    def observing(self, plan: Plan, algorithm: Algorithm | None) -> Iterator[Callable[[memoryview], object] | None]:
        """Yields an observer for the stored blob's chunks, or None if no digest is needed during the read.

        Leave the block normally once the blob is verified; if the block raises, the digest is discarded.
        """
        if algorithm != "sha-256" or not self._is_stored(plan) or self.known(plan, algorithm) is not None:
            yield None
            return
        before, after = plan.file.around_values()
        tensor = _StoredTensor()
        with ThreadPoolExecutor(1, "body-digest") as thread:
            running: Future[bytes] = thread.submit(_hash_stored, before, tensor.pieces, after)
            try:
                yield tensor.add
            finally:
                tensor.pieces.put(None)
        # An MLP's result is stored in float32 whatever the weights' dtype, so it is not part of such a body.
        if len(before) + tensor.nbytes + len(after) == plan.file.content_length:
            self._remember(plan, algorithm, running.result())

    def _is_stored(self, plan: Plan) -> bool:
        return plan.is_stored and plan.file.content_length - plan.file.rendering_nbytes <= _AROUND


def _step(steps: Iterator[object]) -> bool:
    """Takes the next steps; returns whether there may be more."""
    return sum(1 for _ in islice(steps, _STEP)) == _STEP


def _sha_steps(hasher: Hasher, pieces: Iterable[Piece]) -> Iterator[None]:
    """Hashes pieces, one megabyte per step."""
    for chunk in chunks_of(pieces):
        for at in range(0, len(chunk), _MEGABYTE):
            hasher.update(chunk[at : at + _MEGABYTE])
            yield


def _crc_steps(hasher: Crc32c, pieces: Iterable[Piece]) -> Iterator[None]:
    """Hashes pieces, reading each row once however often it is repeated.

    A row takes one step, and one more per megabyte.
    """
    for row, times in pieces:
        hasher.repeat(row, times)
        yield from repeat(None, 1 + len(row) // _MEGABYTE)


def _hash_stored(before: bytes, pieces: Pieces, after: bytes) -> bytes:
    body = new_hasher("sha-256")
    body.update(before)
    while (piece := pieces.get()) is not None:
        body.update(piece)
    body.update(after)
    return body.digest()


class _StoredTensor:
    """Splits the header off the chunks of a safetensors file with one tensor."""

    def __init__(self) -> None:
        self.pieces: Pieces = SimpleQueue()
        self.nbytes = 0
        self._header: int | None = None  # bytes of the header that are still to come

    def add(self, piece: memoryview) -> None:
        header = 8 + int.from_bytes(piece[:8], "little") if self._header is None else self._header
        self._header = max(header - len(piece), 0)
        self.nbytes += len(piece[header:])
        self.pieces.put(piece[header:])
