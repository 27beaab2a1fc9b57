"""Blobs while they are written to temporary files."""

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from prefix_service.blobs.reading import digest_of, read_range
from prefix_service.system.disk import translated


class StagedFile:
    """A blob while it is written; `size` counts the bytes written so far."""

    def __init__(self, file: BinaryIO, path: Path, place: Callable[[Path, str], object]) -> None:
        """`place` moves the finished file to where the blobs are, durably, under its digest."""
        self.size = 0
        self._file, self._path, self._place = file, path, place
        self._hash = hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Appends bytes.

        Raises:
            OutOfSpace, StorageFailed: the disk refused; discard the blob.
        """
        with translated("write a blob"):
            self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def digest(self) -> str:
        """The digest of the bytes written so far."""
        return digest_of(self._hash)

    def read(self, start: int = 0, stop: int | None = None) -> memoryview:
        """Returns the bytes `start:stop` of those written so far, in new memory; later writes still append.

        Raises:
            StorageFailed: the disk refused.
        """
        with translated("read a blob back"):
            data = read_range(self._file, start, self.size if stop is None else stop)
            self._file.seek(0, os.SEEK_END)
        return data

    def commit(self) -> str:
        """Makes the blob durable and visible; returns its digest.

        Raises:
            OutOfSpace, StorageFailed: the disk refused; nothing is visible, and the upload must be repeated.
        """
        digest = self.digest
        with translated(f"store blob {digest}"):
            self._file.flush()
            os.utime(self._file.fileno())  # the blob's age counts from here
            os.fsync(self._file.fileno())
            self._place(self._path, digest)
            self._file.close()
        return digest

    def discard(self) -> None:
        """Removes a blob that was not committed; does nothing after `commit`."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):  # a sweep removes a file that stays
            self._path.unlink()


class StagingFolder:
    """A folder of blobs that are being written. A file is locked until it is closed, so that no sweep removes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage(self, place: Callable[[Path, str], object]) -> StagedFile:
        """Begins a blob, which `place` moves to where the blobs are.

        Raises:
            OutOfSpace, Unavailable, StorageFailed: the disk refused.
        """
        with translated("begin a blob"):
            handle, name = tempfile.mkstemp(dir=self.path)
            fcntl.flock(handle, fcntl.LOCK_SH)
            return StagedFile(os.fdopen(handle, "w+b"), Path(name), place)

    def sweep(self, older_than: float) -> int:
        """Removes unfinished files that were last written at least `older_than` seconds ago; returns their number.

        Raises:
            OutOfSpace, Unavailable, StorageFailed: the disk refused.
        """
        limit = self.now() - older_than
        with translated("sweep unfinished uploads"):
            return sum(_remove_unless_written(path, limit) for path in self.path.iterdir())

    def now(self) -> float:
        """Returns the file system's time, which can differ from this machine's.

        Raises:
            OutOfSpace, Unavailable, StorageFailed: the disk refused.
        """
        with translated("read the time of the blob folder"), tempfile.TemporaryFile(dir=self.path) as probe:
            return os.fstat(probe.fileno()).st_mtime


def _remove_unless_written(path: Path, limit: float) -> bool:
    """Removes a file that was last written before `limit`, unless a process is writing it.

    Returns whether it is removed.
    """
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_mtime <= limit:
            path.unlink()
            return True
    return False
