"""Garbage collection: blobs that no version names any more go, while everything else goes on."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from service.background import in_background
from service.blobs import BlobStore, StoredBlob
from service.catalog.garbage import Garbage
from service.errors import PrefixServiceError

log = logging.getLogger("prefix_service")

_BATCH: Final = 500
_SHORTEST_PAUSE, _LONGEST_PAUSE = 1.0, 600.0  # seconds between two collections


@dataclass(frozen=True, slots=True)
class Collected:
    """What one collection freed: blobs, their bytes, and leftovers of unfinished uploads."""

    blobs: int
    nbytes: int
    leftovers: int


@dataclass(frozen=True, slots=True)
class Lost:
    """A version whose blobs are not all there. Lost keys and values are made again when they are asked for; lost
    weights come back when the same files are published again."""

    version: str
    weights: bool
    key_values: bool


class Collector:
    """Blocking. A blob goes when no version names it, none did within the last `grace` seconds, and it was not
    committed within them either, so whatever a running upload has just stored stays."""

    def __init__(self, garbage: Garbage, blobs: BlobStore, grace: float) -> None:
        self._garbage, self._blobs, self._grace = garbage, blobs, grace

    def collect(self) -> Collected:
        """Free what nobody needs.

        Raises:
            StorageFailed: the disk or the catalog refused; what went before it is gone.
        """
        leftovers = self._blobs.sweep(older_than=self._grace)
        blobs = nbytes = 0
        old = (blob for blob in self._blobs.listed() if blob.age >= self._grace)
        for batch in _batches(old):
            wanted = self._garbage.wanted([blob.digest for blob in batch], self._grace)
            for blob in batch:
                if blob.digest not in wanted and self._blobs.remove(blob.digest, older_than=self._grace):
                    blobs, nbytes = blobs + 1, nbytes + blob.size
        self._garbage.forget(self._grace)
        if blobs or leftovers:
            log.info("garbage collected", extra={"blobs": blobs, "bytes": nbytes, "leftovers": leftovers})
        return Collected(blobs, nbytes, leftovers)

    def reconcile(self) -> list[Lost]:
        """The versions whose blobs are not there, each told in the log too.

        Raises:
            StorageFailed: the disk or the catalog refused.
        """
        found = []
        for version, weights, key_values in self._garbage.named():
            lost = Lost(version, not self._blobs.exists(weights), not self._blobs.exists(key_values))
            if lost.weights or lost.key_values:
                found.append(lost)
                what = [name for name in ("weights", "key_values") if getattr(lost, name)]
                log.error("blobs lost", extra={"version": version, "lost": what})
        return found


def _batches(blobs: Iterable[StoredBlob]) -> Iterator[list[StoredBlob]]:
    iterator = iter(blobs)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _logged(call: Callable[[], object]) -> None:
    try:
        call()
    except PrefixServiceError as error:
        log.error("garbage collection failed: %s", error)  # noqa: TRY400 - its words say it all


@contextlib.contextmanager
def collecting(collector: Collector, grace: float) -> Iterator[None]:
    """Reconcile once, then collect again and again, in a thread, while the block runs."""
    pause = min(max(grace / 4, _SHORTEST_PAUSE), _LONGEST_PAUSE)

    def work(stop: threading.Event) -> None:
        _logged(collector.reconcile)
        while not stop.wait(pause):
            _logged(collector.collect)

    with in_background("collector", work):
        yield
