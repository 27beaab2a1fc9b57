"""Garbage collection: removes blobs that no version names any more, while the service runs."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from prefix_service.blobs.port import BlobStore, StoredBlob
from prefix_service.catalog.database import Database
from prefix_service.catalog.deletions import Deletions
from prefix_service.catalog.garbage import REMOVING, Garbage
from prefix_service.catalog.retention import (
    Retention,
    expire_audit,
    expire_changes,
    expire_sessions,
    expire_usage,
)
from prefix_service.errors import PrefixServiceError
from prefix_service.system.background import in_background

log = logging.getLogger("prefix_service")

_BATCH: Final = 500
_SHORTEST_PAUSE, _LONGEST_PAUSE = 1.0, 600.0  # seconds between two collections
_LOOK: Final = 0.5  # seconds between two checks for deletions
_REST: Final = 0.05  # seconds, at least, in which others can write between two slices
_LOCK: Final = 0x636F_6C6C_6563_7400  # "collect": any number that all replicas agree on


@dataclass(frozen=True, slots=True)
class Collected:
    """The result of a collection: the removed blobs, their bytes, and the removed leftovers of unfinished uploads."""

    blobs: int
    nbytes: int
    leftovers: int


@dataclass(frozen=True, slots=True)
class Lost:
    """A version with missing blobs.

    Missing keys and values are computed again when they are asked for; missing weights are restored by publishing the
    same files again.
    """

    version: str
    weights: bool
    key_values: bool


class Collector:
    """Removes blobs that no version names. Its methods block.

    A blob is removed if no version has named it within the last `grace` seconds, and it was not committed within them
    either, so the blobs of a running upload stay.
    """

    def __init__(self, garbage: Garbage, blobs: BlobStore, grace: float) -> None:
        self._garbage, self._blobs, self._grace = garbage, blobs, grace

    def collect(self) -> Collected:
        """Removes leftovers of uploads, and blobs that no version names; returns how many.

        Raises:
            OutOfSpace, Unavailable, StorageFailed: the disk or the catalog refused; some blobs may be removed.
        """
        leftovers = self._blobs.sweep(older_than=self._grace)
        blobs = nbytes = 0
        old = (blob for blob in self._blobs.listed() if blob.age >= self._grace)
        for batch in _batches(old):
            wanted = self._garbage.wanted([blob.digest for blob in batch], self._grace)
            unwanted = [blob.digest for blob in batch if blob.digest not in wanted]
            gone = self._remove(unwanted) if unwanted else set()
            blobs, nbytes = blobs + len(gone), nbytes + sum(blob.size for blob in batch if blob.digest in gone)
        if blobs or leftovers:
            log.info("garbage collected", extra={"blobs": blobs, "bytes": nbytes, "leftovers": leftovers})
        return Collected(blobs, nbytes, leftovers)

    def _remove(self, unwanted: list[str]) -> set[str]:
        """Removes blobs while no replica may store or name them; returns the digests of the removed ones.

        If the blob store fails, it may carry a removal out later: the digests stay condemned for a while.
        """
        began = time.monotonic()
        condemned = self._garbage.condemn(unwanted, self._grace)
        left = began + REMOVING - time.monotonic()
        gone = self._blobs.remove(sorted(condemned.digests), older_than=self._grace, within=left)
        self._garbage.acquit(condemned)
        return gone

    def reconcile(self) -> list[Lost]:
        """Returns the versions with missing blobs, and logs each of them.

        Raises:
            StorageFailed: the disk or the catalog refused.
        """
        found = []
        listed = {blob.digest for blob in self._blobs.listed()}  # one request to a bucket for a thousand blobs

        def is_lost(digest: str) -> bool:
            return digest not in listed and not self._blobs.exists(digest)

        for version, weights, key_values in self._garbage.named():
            lost = Lost(version, is_lost(weights), is_lost(key_values))
            if lost.weights or lost.key_values:
                found.append(lost)
                what = [name for name in ("weights", "key_values") if getattr(lost, name)]
                log.error("blobs lost", extra={"version": version, "lost": what})
        return found


def _batches(blobs: Iterable[StoredBlob]) -> Iterator[list[StoredBlob]]:
    iterator = iter(blobs)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


class Housekeeping:
    """The work of the collector's thread: removes deleted rows, frees blobs, and removes ended sessions, and entries
    that are older than `retention` allows."""

    def __init__(self, database: Database, blobs: BlobStore, grace: float, retention: Retention) -> None:
        self._database, self._grace, self._retention = database, grace, retention
        self._garbage, self._deletions = Garbage(database), Deletions(database)
        self._collector = Collector(self._garbage, blobs, grace)

    def work(self, stop: threading.Event) -> None:
        """Works until `stop` is set."""
        pause = min(max(self._grace / 4, _SHORTEST_PAUSE), _LONGEST_PAUSE)
        _logged(lambda: self._alone(self._collector.reconcile))
        collected = time.monotonic()
        while not stop.wait(min(_LOOK, pause)):
            _logged(lambda: in_slices(self._deletions.remove_slice, stop))
            if time.monotonic() - collected >= pause:
                _logged(lambda: self._alone(lambda: self._collect(stop)))
                collected = time.monotonic()

    def _alone(self, call: Callable[[], object]) -> None:
        """Calls it, unless another replica is at it: two would do the same work, without harm."""
        with self._database.alone(_LOCK) as is_alone:
            if is_alone:
                call()

    def _collect(self, stop: threading.Event) -> None:
        before = self._garbage.expired(self._grace)
        self._collector.collect()
        in_slices(lambda: self._garbage.forget(before), stop)
        in_slices(lambda: expire_audit(self._database, self._retention.audit), stop)
        in_slices(lambda: expire_changes(self._database, self._retention.changes), stop)
        in_slices(lambda: expire_usage(self._database, self._retention.usage), stop)
        in_slices(lambda: expire_sessions(self._database), stop)


def in_slices(remove: Callable[[], bool], stop: threading.Event) -> None:
    """Calls `remove` until it returns False, or `stop` is set.

    Between two calls, it pauses for as long as the call took, so that others can write.
    """
    more = True
    while more:
        began = time.monotonic()
        more = remove()
        if stop.wait(max(_REST, time.monotonic() - began) if more else 0):
            return


def _logged(call: Callable[[], object]) -> None:
    try:
        call()
    except PrefixServiceError as error:
        log.error("garbage collection failed: %s", error)  # noqa: TRY400 - its message says everything
    except Exception:  # the other tasks of the thread continue
        log.exception("garbage collection failed")


@contextlib.contextmanager
def collecting(database: Database, blobs: BlobStore, grace: float, retention: Retention) -> Iterator[None]:
    """Looks for lost blobs once, then removes again and again what nobody needs, in a thread, while the block runs."""
    with in_background("collector", Housekeeping(database, blobs, grace, retention).work):
        yield
