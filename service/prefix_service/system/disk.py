"""The operating system's files: what it says in this project's words, and files that only their owner may read."""

import contextlib
import errno
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from prefix_service.errors import OutOfSpace, StorageFailed, Unavailable

log = logging.getLogger("prefix_service")

PRIVATE_FOLDER: Final = 0o700
"""The mode of a folder that only its owner may enter."""
_PRIVATE_FILE: Final = 0o600
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PASSING: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH}
)
LEAST_FREE_BYTES: Final = 16 << 20
"""Disk space below which a service says that it is not ready."""


@contextlib.contextmanager
def translated(action: str) -> Iterator[None]:
    """Turn what the operating system says into this project's errors.

    Raises:
        OutOfSpace: the disk or its quota is full.
        Unavailable: no file descriptors are left, or the file server is away.
        StorageFailed: anything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise OutOfSpace(f"cannot {action}: {os.strerror(error.errno or 0)}") from error
        if error.errno in _PASSING:
            raise Unavailable(f"cannot {action}: {os.strerror(error.errno or 0)}") from error
        raise StorageFailed(f"cannot {action}: {os.strerror(error.errno or 0)}") from error


def require_writable(folder: Path, name: str) -> None:
    """Write and flush a few bytes in a file of `folder` that nobody sees; `name` stands for the folder in errors.

    Raises:
        OutOfSpace: the disk is full, or nearly.
        Unavailable, StorageFailed: the disk refused, or no file can be opened.
    """
    with translated(f"write to {name}"):
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"ready?")
            file.flush()
            os.fsync(file.fileno())
        found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < LEAST_FREE_BYTES:
        raise OutOfSpace(f"the disk of {name} has {free} bytes left, and needs {LEAST_FREE_BYTES}")


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


def private_opener(path: str, flags: int) -> int:
    """Open a file for `open(…, opener=…)`; one that is made only its owner may read, whatever the umask.

    Raises:
        OSError: the disk refused.
    """
    return os.open(path, flags, _PRIVATE_FILE)


def make_private(path: Path) -> None:
    """Make an empty file that only its owner may read, whatever the umask; one that is there stays as it is.

    Raises:
        OSError: the disk refused.
    """
    os.close(private_opener(str(path), os.O_WRONLY | os.O_CREAT))


def tighten(path: Path) -> None:
    """Take from group and others what they may do with a file or folder of this process's user. Logs a warning where
    that is impossible; a folder with the sticky bit is shared on purpose, and stays.

    Raises:
        OSError: it cannot be looked at.
    """
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if not mode & _OTHERS:
        return
    reason = "it is shared (sticky bit)" if mode & stat.S_ISVTX else "it belongs to another user"
    if found.st_uid == os.geteuid() and not mode & stat.S_ISVTX:
        try:
            path.chmod(mode & ~_OTHERS)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
        else:
            return
    log.warning("others may use a file of the service: %s", reason, extra={"path": str(path), "mode": f"{mode:04o}"})


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, durably; refuse one that exists, and leave none that is not whole.

    Raises:
        FileExistsError: it exists.
        OSError: the disk refused.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE_FILE)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except OSError:
        path.unlink()
        raise
