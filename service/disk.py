"""The operating system's files: what it says in this project's words, and files that only their owner may read."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from service.errors import OutOfSpace, StorageFailed

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextlib.contextmanager
def translated(action: str) -> Iterator[None]:
    """Turn what the operating system says into this project's errors.

    Raises:
        OutOfSpace: the disk or its quota is full.
        StorageFailed: anything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise OutOfSpace(f"cannot {action}: {os.strerror(error.errno or 0)}") from error
        raise StorageFailed(f"cannot {action}: {os.strerror(error.errno or 0)}") from error


def sync_folder(path: Path) -> None:
    """Flush a folder to the disk, and with it the names that were made, moved or removed in it.

    Raises:
        OSError: the disk refused.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, durably; refuse one that exists, and leave none that is not whole.

    Raises:
        FileExistsError: it exists.
        OSError: the disk refused.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except OSError:
        path.unlink()
        raise
