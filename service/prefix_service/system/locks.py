"""Locks of files and folders, which other processes respect (flock(2)); the system releases those of a dead process."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    """Holds the lock of a file or folder while the block runs, and yields its file descriptor.

    Args:
        path: the file, which only its owner can read if it is created, or the folder.
        how: `fcntl.LOCK_EX` or `fcntl.LOCK_SH`, with `fcntl.LOCK_NB` if this must not wait.
        flags: those of open(2); a folder needs `os.O_DIRECTORY`.

    Raises:
        BlockingIOError: with `fcntl.LOCK_NB`, another descriptor has the lock.
        OSError: the path cannot be opened.
    """
    handle = os.open(path, flags, 0o600)
    try:
        fcntl.flock(handle, how)
        yield handle
    finally:
        os.close(handle)
