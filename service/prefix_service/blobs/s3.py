"""Content-addressed bytes in a bucket, verified on every read, with copies on the local disk."""

import contextlib
import hashlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Final

from prefix_service.blobs.bucket import Bucket, Found
from prefix_service.blobs.cache import BlobCache
from prefix_service.blobs.names import damaged, digest_at, hex_of, path_of
from prefix_service.blobs.port import Allocate, ChunkObserver, StoredBlob
from prefix_service.blobs.reading import PIECE, digest_of, pieces
from prefix_service.blobs.staged import StagedFile, StagingFolder
from prefix_service.errors import CorruptBlob, NotFound, PrefixServiceError, ReadOnly
from prefix_service.system.byte_locks import byte_locked
from prefix_service.system.disk import PRIVATE_FOLDER, private_opener, translated
from prefix_service.system.failures import Failures
from prefix_service.system.host_memory import host_memory

log = logging.getLogger("prefix_service")

_REMOVED_TOGETHER: Final = 50
_LOOKS: Final = 8  # objects that are looked at in parallel
_READS: Final = 2  # of an object whose bytes do not match, before it counts as damaged

Receive = Callable[[int], Callable[[memoryview], object]]
"""Begins a blob of `n` bytes, again if the first try was damaged; returns what takes its pieces in order."""


class S3BlobStore:
    """Blobs as objects `<2 hex>/<64 hex>`; damaged ones are copied to `quarantine/`.

    Names are digests, so a blob is written without conditions. A blob that is read is copied to `folder`, up to
    `cache_bytes`, and read from there until it is evicted; a copy that is damaged is read from the bucket again.
    Digests are locked in `folder`, so that processes and threads on it read a blob once, and none removes a blob that
    another commits. A damaged object stays in its place, so that it is damaged is remembered for a moment: many reads
    of it download it once.

    A store that is `read_only` changes neither the bucket nor the folder, and keeps no copies.
    """

    def __init__(self, bucket: Bucket, folder: Path, cache_bytes: int, *, read_only: bool = False) -> None:
        self._bucket, self._folder, self._read_only = bucket, folder, read_only
        self._staging = StagingFolder(folder / "staging")
        self._cache: BlobCache | None = None
        self._failures: Failures[str] = Failures()  # by digest
        if not read_only:
            with translated("make the folder of cached blobs"):
                for made in (folder, self._staging.path):
                    made.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
            self._cache = BlobCache(folder, self._staging.path, cache_bytes)

    @property
    def identity(self) -> str:
        """The bucket, the path in it, and the server."""
        return self._bucket.identity

    def check(self) -> None:
        """Checks that the bucket answers.

        Raises:
            Unavailable, StorageFailed: it does not, or refuses.
        """
        self._bucket.check()

    def sweep(self, older_than: float) -> int:
        """Removes unfinished uploads of this machine, last written at least `older_than` seconds ago; returns their
        number.

        Raises:
            OutOfSpace, Unavailable, StorageFailed: the disk refused.
        """
        return self._staging.sweep(older_than)

    def listed(self) -> Iterator[StoredBlob]:
        """Yields every blob, in no order, with its age by the server's clock.

        Raises:
            Unavailable, StorageFailed: the server does not answer, or refuses.
        """
        now = self._bucket.now()
        for found in self._bucket.listed():
            digest = digest_at(found.key.rpartition("/")[2])
            if digest is not None and found.key == path_of(digest):
                yield StoredBlob(digest, found.size, (now - found.modified).total_seconds())

    def exists(self, digest: str) -> bool:
        """Returns whether the bucket has the blob, sound or damaged.

        Raises:
            NotFound: `digest` is malformed.
            Unavailable, StorageFailed: the server does not answer, or refuses.
        """
        return self._bucket.head(path_of(digest)) is not None

    def remove(self, digests: Sequence[str], older_than: float, within: float = math.inf) -> set[str]:
        """Removes blobs that were not committed again within the last `older_than` seconds; returns the removed
        digests. After `within` seconds no request to remove is sent. A blob that is being committed, or read, on this
        machine stays.

        Raises:
            Unavailable, StorageFailed: the server does not answer, or refuses; some blobs may be removed.
        """
        until = time.monotonic() + within
        limit = self._bucket.now() - timedelta(seconds=older_than)
        gone: set[str] = set()
        for begin in range(0, len(digests), _REMOVED_TOGETHER):
            with contextlib.ExitStack() as locks, ThreadPoolExecutor(_LOOKS, "blob-look") as threads:
                batch = digests[begin : begin + _REMOVED_TOGETHER]
                free = [digest for digest in batch if locks.enter_context(self._locked(digest, waits=False))]
                found = threads.map(self._bucket.head, map(path_of, free))
                # The server's times are whole seconds.
                old = [digest for digest, it in zip(free, found, strict=True) if it and it.modified < limit]
                if time.monotonic() >= until:
                    break
                if old:
                    self._bucket.delete([path_of(digest) for digest in old])
                for digest in old:
                    self._drop(digest)
                gone.update(old)
                self._failures.forget(gone.__contains__)
        return gone

    def stage(self) -> StagedFile:
        """Begins a blob, on the local disk.

        Raises:
            OutOfSpace, StorageFailed: the disk refused.
            ReadOnly: this store only reads.
        """
        if self._read_only:
            raise ReadOnly("this service is read-only (--read-only): publish to the one that writes")
        return self._staging.stage(self._place)

    def _place(self, staged: Path, digest: str) -> None:
        """Stores a finished file in the bucket, and then keeps it as the local copy."""
        with self._locked(digest):
            self._bucket.write(path_of(digest), staged)
            self._failures.forget(digest.__eq__)
            if self._cache is not None:
                self._cache.take(digest, staged)

    def read(self, digest: str, allocate: Allocate = host_memory, observer: ChunkObserver | None = None) -> memoryview:
        """Returns all bytes of a blob, verified, in memory from `allocate`.

        `observer` sees each chunk once the blob is verified.

        Raises:
            NotFound: there is no such blob.
            CorruptBlob: the bytes in the bucket do not match the digest.
            Unavailable, StorageFailed: the server does not answer, or refuses.
        """
        data = self._from_cache(digest, allocate)
        if data is None:
            with self._locked(digest):
                data = self._from_cache(digest, allocate)  # another thread may have read it meanwhile
                if data is None:
                    data = self._from_bucket(digest, allocate)
        if observer is not None:
            for at in range(0, len(data), PIECE):
                observer(data[at : at + PIECE])
        return data

    def _from_cache(self, digest: str, allocate: Allocate) -> memoryview | None:
        if self._cache is None or (file := self._cache.open(digest)) is None:
            return None
        sha256, length = hashlib.sha256(), 0
        with file, contextlib.suppress(OSError):
            data = allocate(os.fstat(file.fileno()).st_size)
            for piece in pieces(file, data):
                sha256.update(piece)
                length += len(piece)
            if length == len(data) and digest_of(sha256) == digest:
                return data
        self._drop_damaged(digest)
        return None

    def _from_bucket(self, digest: str, allocate: Allocate) -> memoryview:
        data: memoryview | None = None

        def begin(size: int) -> Callable[[memoryview], None]:
            nonlocal data
            if data is None or len(data) != size:
                data = allocate(size)
            left = data

            def add(piece: memoryview) -> None:
                nonlocal left
                left[: len(piece)] = piece
                left = left[len(piece) :]

            return add

        self._receive(digest, begin)
        assert data is not None  # noqa: S101 - it was received
        if self._cache is not None:
            self._cache.keep(digest, data)
        return data

    def open(self, digest: str) -> BinaryIO:
        """Returns a blob as a verified file on the local disk. The caller closes it.

        Raises:
            NotFound: there is no such blob.
            CorruptBlob: the bytes in the bucket do not match the digest.
            OutOfSpace: the local disk has no room for the file.
            Unavailable, StorageFailed: the server does not answer, or it or the disk refuses.
        """
        if (file := self._open_cached(digest)) is not None:
            return file
        with self._locked(digest):
            return self._open_cached(digest) or self._opened(digest)

    def _open_cached(self, digest: str) -> BinaryIO | None:
        if self._cache is None or (file := self._cache.open(digest)) is None:
            return None
        with contextlib.ExitStack() as closing:
            closing.enter_context(file)
            with contextlib.suppress(OSError):
                found = digest_of(hashlib.file_digest(file, "sha256"))  # type: ignore[arg-type]  # it is an open file
                file.seek(0)
                if found == digest:
                    closing.pop_all()
                    return file
        self._drop_damaged(digest)
        return None

    def _opened(self, digest: str) -> BinaryIO:
        with translated(f"keep a copy of blob {digest}"), contextlib.ExitStack() as closing:
            if self._cache is None:
                file: BinaryIO = closing.enter_context(tempfile.TemporaryFile())
            else:
                handle, name = tempfile.mkstemp(dir=self._staging.path)
                closing.callback(Path(name).unlink, missing_ok=True)
                file = closing.enter_context(os.fdopen(handle, "w+b"))
            self._receive(digest, _beginning(file))
            file.flush()
            file.seek(0)
            closing.pop_all()
            if self._cache is not None:
                self._cache.take(digest, Path(name))
            return file

    def copy(self, digest: str, target: Path) -> int:
        """Copies a blob from the bucket to a file outside the store, verified; returns its size in bytes.

        The caller flushes the file to disk.

        Raises:
            NotFound: there is no such blob.
            CorruptBlob: the bytes in the bucket do not match the digest; the copy is removed.
            OutOfSpace: the target's disk is full.
            Unavailable, StorageFailed: the server does not answer, or it or the disk refuses.
        """
        with self._locked(digest), translated(f"copy blob {digest}"):
            with open(target, "wb", opener=private_opener) as copied:
                try:
                    self._receive(digest, _beginning(copied))
                except PrefixServiceError:
                    target.unlink()
                    raise
            return target.stat().st_size

    def _receive(self, digest: str, begin: Receive) -> None:
        """Reads a blob from the bucket. Bytes that do not match may have been damaged on the way, so they are read
        again before the object counts as damaged.

        Raises:
            NotFound: there is no such blob.
            CorruptBlob: the bytes do not match the digest, now or a moment ago.
            Unavailable, StorageFailed: the server does not answer, or refuses.
        """
        self._failures.check(digest)
        for attempt in range(1, _READS + 1):
            body = self._bucket.read(path_of(digest))
            if body is None:
                raise NotFound(f"there is no blob {digest}")
            sha256, add = hashlib.sha256(), begin(body.found.size)
            with contextlib.closing(body.pieces) as coming:
                for piece in coming:
                    sha256.update(piece)
                    add(piece)
            if digest_of(sha256) == digest:
                return
            if attempt == _READS:
                error = self._damaged(digest, body.found)
                self._failures.remember(digest, error)
                raise error
            log.warning("a blob arrived damaged, and is read again", extra={"digest": digest})

    def _damaged(self, digest: str, found: Found) -> CorruptBlob:
        """Copies a damaged object to the quarantine, unless the content was committed again in the meantime; returns
        the error.

        The object stays in its place, where it is never served and the next commit replaces it. Deleting it could
        delete that commit of another machine: no condition distinguishes the two, because the ETag of bytes that have
        changed on a disk is that of the sound ones.
        """
        kept = found.key
        if not self._read_only:
            with contextlib.suppress(PrefixServiceError):
                if self._bucket.head(found.key) == found:
                    self._bucket.copy(found.key, aside := f"quarantine/{hex_of(digest)}")
                    kept = aside
        log.error("blob damaged", extra={"digest": digest, "kept": kept})
        return damaged(digest)

    def _drop_damaged(self, digest: str) -> None:
        log.warning("a cached blob is damaged, and is read again", extra={"digest": digest})
        self._drop(digest)

    def _drop(self, digest: str) -> None:
        if self._cache is not None:
            self._cache.drop(digest)

    @contextlib.contextmanager
    def _locked(self, digest: str, *, waits: bool = True) -> Iterator[bool]:
        """Holds a digest's lock among the threads and processes of the folder; yields whether it is held."""
        if self._read_only:
            yield True
            return
        with contextlib.ExitStack() as held:
            with translated(f"lock blob {digest}"):
                lock = byte_locked(self._folder / "lock", int(hex_of(digest)[:15], 16), waits=waits)
                is_held = held.enter_context(lock)
            yield is_held


def _beginning(file: BinaryIO) -> Receive:
    """Returns what writes a blob to a file from its beginning, at each try."""

    def begin(_: int) -> Callable[[memoryview], object]:
        file.seek(0)
        file.truncate()
        return file.write

    return begin
