"""Locks of single bytes of one file: as many locks as there are numbers, without a file for each (Linux)."""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_WHOLE_BYTE: Final = 1


@contextlib.contextmanager
def byte_locked(path: Path, at: int, *, waits: bool = True) -> Iterator[bool]:
    """Holds the lock of byte `at` of a file, against other threads and processes, while the block runs.

    Yields whether the lock is held: False only without `waits`, if another has it. The file is created if it is
    missing, and stays empty. The system releases the locks of a dead process.

    Raises:
        OSError: the file cannot be opened.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        # struct flock: type, whence, start, length, process (0: the lock belongs to this open file).
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, at, _WHOLE_BYTE, 0)
        try:
            fcntl.fcntl(handle, fcntl.F_OFD_SETLKW if waits else fcntl.F_OFD_SETLK, lock)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            yield False
        else:
            yield True
    finally:
        os.close(handle)
