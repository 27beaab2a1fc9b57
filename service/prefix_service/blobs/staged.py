"""A blob while it is written to a temporary file."""

import contextlib
import hashlib
import os
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
