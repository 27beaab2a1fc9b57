"""Copies of blobs on the local disk, bounded in bytes, shared by the processes of a service."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from prefix_service.blobs.names import digest_at, path_of
from prefix_service.system.disk import PRIVATE_FOLDER
from prefix_service.system.locks import locked

log = logging.getLogger("prefix_service")

_LEAST_FREE: Final = 1 << 30  # bytes of the disk that are left to the catalog and to uploads
_LEFT_AFTER_EVICTION: Final = 0.9  # of the limit, so that not every new copy looks through the folder


class BlobCache:
    """Copies of blobs as files `<folder>/<first two hex>/<64 hex>`, of at most `limit` bytes together.

    Room is made by removing the copies that were opened the longest ago. A copy may be damaged: whoever reads one
    verifies it. If the disk is full or fails, nothing is kept, and nothing is raised. New copies are written in the
    folder `staging`, on the same disk. `<folder>/used` is the cache's lock, and holds the number of its bytes; the
    copies that an earlier process left are counted by looking through the folder.
    """

    def __init__(self, folder: Path, staging: Path, limit: int, least_free: int = _LEAST_FREE) -> None:
        self._folder, self._staging, self._limit, self._least_free = folder, staging, limit, least_free
        with self._failing(""), locked(self._used) as handle:
            os.ftruncate(handle, 0)

    @property
    def _used(self) -> Path:
        return self._folder / "used"

    def open(self, digest: str) -> BinaryIO | None:
        """Returns the copy of a blob, which the caller verifies and closes; None if there is none.

        Raises:
            NotFound: `digest` is malformed.
        """
        path = self._folder / path_of(digest)
        try:
            file = path.open("rb")
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(file.fileno())
        return file

    def keep(self, digest: str, data: memoryview) -> None:
        """Keeps a copy of a blob, unless it is too large."""
        if self._has_room(len(data)):
            with self._failing(digest):
                handle, name = tempfile.mkstemp(dir=self._staging)
                with _removed_on_failure(Path(name)), os.fdopen(handle, "wb") as file:
                    file.write(data)
                self.take(digest, Path(name))

    def take(self, digest: str, file: Path) -> None:
        """Moves a finished file of the staging folder into the cache, or removes it if it is too large."""
        with self._failing(digest), _removed_on_failure(file):
            size = file.stat().st_size
            if not self._has_room(size, is_written=True):
                file.unlink()
                return
            target = self._folder / path_of(digest)
            target.parent.mkdir(PRIVATE_FOLDER, exist_ok=True)
            with locked(self._used) as handle:
                used = int(os.pread(handle, 32, 0) or self._evicted(self._limit))
                used -= target.stat().st_size if target.exists() else 0
                if used + size > self._limit:
                    used = self._evicted(int(_LEFT_AFTER_EVICTION * self._limit) - size)
                file.replace(target)
                _count(handle, used + size)

    def drop(self, digest: str) -> None:
        """Removes the copy of a blob, if there is one."""
        path = self._folder / path_of(digest)
        with self._failing(digest), contextlib.suppress(FileNotFoundError), locked(self._used) as handle:
            size = path.stat().st_size
            path.unlink()
            if used := os.pread(handle, 32, 0):
                _count(handle, int(used) - size)

    def _has_room(self, size: int, *, is_written: bool = False) -> bool:
        if size > self._limit:
            return False
        try:
            disk = os.statvfs(self._staging)
        except OSError:
            return False
        return disk.f_bavail * disk.f_frsize - (0 if is_written else size) >= self._least_free

    def _evicted(self, most: int) -> int:
        """Removes the copies that were opened the longest ago, until those that stay have at most `most` bytes; returns
        the bytes of these."""
        copies = sorted(self._copies())
        used = sum(size for _, size, _ in copies)
        for _, size, path in copies:
            if used <= most:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _copies(self) -> Iterator[tuple[float, int, Path]]:
        for folder in self._folder.glob("[0-9a-f][0-9a-f]"):
            for path in folder.iterdir():
                if digest_at(path.name) is not None:
                    found = path.stat()
                    yield found.st_mtime, found.st_size, path

    @contextlib.contextmanager
    def _failing(self, digest: str) -> Iterator[None]:
        """Logs errors of the disk: a blob that is not kept is read from the store again."""
        try:
            yield
        except OSError as error:
            log.warning("a blob is not cached: %s", os.strerror(error.errno or 0), extra={"digest": digest})


@contextlib.contextmanager
def _removed_on_failure(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        file.unlink(missing_ok=True)
        raise


def _count(handle: int, nbytes: int) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(max(nbytes, 0)).encode(), 0)
