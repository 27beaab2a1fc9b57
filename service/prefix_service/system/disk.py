"""Files of the operating system: its errors as this project's errors, and files that only their owner can read."""

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
"""The mode of a folder that only its owner can enter."""
_PRIVATE_FILE: Final = 0o600
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PASSING: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH}
)
LEAST_FREE_BYTES: Final = 16 << 20
"""The free disk space in bytes below which a service reports that it is not ready."""


@contextlib.contextmanager
def translated(action: str) -> Iterator[None]:
    """Turns the operating system's errors into this project's; `action` completes "cannot …" in their messages.

    Raises:
        OutOfSpace: the disk or its quota is full.
        Unavailable: no file descriptors are left, or the file server does not answer.
        StorageFailed: any other error of the operating system.
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
    """Writes and flushes a few bytes in an unnamed file of `folder`; error messages call the folder `name`.

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
    """Flushes a folder to disk, and with it the names that were created, moved or removed in it.

    Raises:
        OSError: the disk refused.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def private_opener(path: str, flags: int) -> int:
    """Opens a file for `open(…, opener=…)`; a new file is readable by its owner alone, whatever the umask.

    Raises:
        OSError: the disk refused.
    """
    return os.open(path, flags, _PRIVATE_FILE)


def make_private(path: Path) -> None:
    """Creates an empty file that only its owner can read, whatever the umask; does not change a file that exists.

    Raises:
        OSError: the disk refused.
    """
    os.close(private_opener(str(path), os.O_WRONLY | os.O_CREAT))


def tighten(path: Path) -> None:
    """Takes a file or folder of this process's user away from group and others.

    Logs a warning if that is impossible. A folder with the sticky bit is shared on purpose, and is not changed.

    Raises:
        OSError: the path cannot be examined.
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
    """Writes a new file that only its owner can read, durably; leaves no incomplete file behind.

    Raises:
        FileExistsError: the file exists already.
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
