"""A file that keeps disk space free for deletions, which need some space before they free any."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from prefix_service.system.locks import locked

log = logging.getLogger("prefix_service")

RESERVED_BYTES: Final = 4 << 20


def reserve_file(catalog: Path) -> Path:
    """Returns the path of the reserve on a catalog's disk."""
    return catalog.with_name("reserve")


class Reserve:
    """Holds up to `nbytes` of disk space, for threads and processes to share.

    While one deletion uses the space, other deletions that need it wait.
    """

    def __init__(self, path: Path, nbytes: int = RESERVED_BYTES) -> None:
        self._path, self._nbytes = path, nbytes

    def fill(self) -> None:
        """Allocates the space, or as much of it as the disk has."""
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                held = _allocate(handle, self._nbytes)
            finally:
                os.close(handle)
        except OSError as error:
            log.warning("no disk space is reserved for deletions: %s", os.strerror(error.errno or 0))
            return
        if held < self._nbytes:
            log.warning("the disk is full: %d bytes are reserved for deletions instead of %d", held, self._nbytes)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Frees the space while the block runs, if the disk has less than `nbytes` left."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # the block itself reports what is wrong with the disk
                # Another deletion may use the space now, and takes it back at its end: that is not left.
                if self._left() < 2 * self._nbytes:
                    handle = stack.enter_context(locked(self._path, flags=os.O_RDWR))
                    if self._left() < self._nbytes:
                        os.ftruncate(handle, 0)
                        stack.callback(_allocate, handle, self._nbytes)
            yield

    def _left(self) -> int:
        return _free_bytes(self._path.parent)


def _allocate(handle: int, nbytes: int) -> int:
    """Allocates `nbytes`, or as much as the disk has; returns the size of the file afterwards."""
    for wanted in (nbytes, min(nbytes, _free_bytes(handle)), nbytes // 2, nbytes // 4, nbytes // 8):
        with contextlib.suppress(OSError):
            os.posix_fallocate(handle, 0, max(wanted, 1))
            break
    return os.fstat(handle).st_size


def _free_bytes(place: Path | int) -> int:
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize
