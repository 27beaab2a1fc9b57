"""Renderings as files in memory, which workers on this host map instead of receiving them.

Each process has a folder of its own, locked as long as the process lives. A file is a complete safetensors file, and is
never changed. Nobody else can list the folder or guess a name: a worker that received a name can open the file if it
runs as the file's owner or in its group. A file is unlinked with its rendering; a worker that has mapped it keeps the
contents.
"""

import contextlib
import fcntl
import logging
import mmap
import os
import secrets
import shutil
import stat
import tempfile
import weakref
from pathlib import Path
from typing import Final

from prefix_service.errors import InvalidInput
from prefix_service.prefix.wire.prefix_file import PrefixFile
from prefix_service.prefix.wire.rendering import Rendering
from prefix_service.system.disk import translated
from prefix_service.system.locks import locked

_NAME: Final = "process-"
_MOST: Final = 32_768  # each file is a mapping, and Linux gives a process 65,530

log = logging.getLogger("prefix_service")


class SharedFiles:
    """The shared files of this process, at most `most`, in a folder below `parent`, which is created if it is missing.

    Raises:
        InvalidInput: others can replace `parent` or its contents.
        StorageFailed, OutOfSpace: the system refused.
    """

    def __init__(self, parent: Path, most: int = _MOST) -> None:
        self._most = most
        self._files: set[Path] = set()
        sweep(parent)
        with translated(f"share files in {parent}"):
            self._folder, self._lock = _own_folder(parent.absolute())

    def share(self, file: PrefixFile, rendering: Rendering) -> Rendering:
        """Writes a rendering to a shared file, and returns it with the file's mapping as memory.

        Returns the rendering unchanged if there is no room for a file.
        """
        if len(self._files) >= self._most:
            return rendering
        path = self._folder / f"{secrets.token_hex(16)}.safetensors"
        try:
            mapped = _written(path, file.canonical, rendering)
        except OSError as error:
            log.warning(
                "a rendering is not shared: %s", os.strerror(error.errno or 0), extra={"folder": str(path.parent)}
            )
            _remove(path)
            return rendering
        shared = Rendering(file.canonical.mapped(rendering, memoryview(mapped)), str(path))
        self._files.add(path)
        weakref.finalize(shared, self._forget, path)
        return shared

    def _forget(self, path: Path) -> None:
        self._files.discard(path)
        _remove(path)

    def close(self) -> None:
        """Removes the folder; a worker that has mapped a file keeps the contents."""
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)


def sweep(parent: Path) -> None:
    """Creates the folder below which files are shared, and removes folders of processes that have ended.

    Raises:
        InvalidInput: others can replace `parent` or its contents.
        StorageFailed, OutOfSpace: the system refused.
    """
    with translated(f"share files in {parent}"):
        with contextlib.suppress(FileExistsError):
            parent.mkdir(parents=True)
            parent.chmod(0o711)  # whatever the umask: others can enter, but not list
        mode = parent.stat().st_mode
        if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
            raise InvalidInput(
                f"other users can replace the contents of {parent}: choose a folder of the service's own"
            )
        _require_own(parent.absolute())
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        for folder in parent.glob(f"{_NAME}*"):
            # It fails for another service's folder, or if another process is removing it.
            with contextlib.suppress(OSError), locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB, flags):
                shutil.rmtree(folder)


def _require_own(folder: Path) -> None:
    """Checks that a folder and all those above it belong to this process's user or to root, since the owner of any of
    them could replace it.

    Raises:
        InvalidInput: one of them belongs to another user.
        OSError: one of them cannot be examined.
    """
    for each in (folder, *folder.parents):
        if (owner := each.stat().st_uid) not in (0, os.geteuid()):
            raise InvalidInput(
                f"{each} belongs to user {owner}, who could replace what the service shares in {folder}: choose a "
                "folder that, with those above it, is the service's own or root's"
            )


def _own_folder(parent: Path) -> tuple[Path, int]:
    """Creates a folder and locks it; returns it and the handle that holds the lock.

    Another process can sweep the folder until it is locked, so this retries.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_NAME, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            # The group can enter, but not list; the parent's set-group-id bit may have chosen the group.
            os.fchmod(handle, 0o710 | (os.fstat(handle).st_mode & stat.S_ISGID))
            if folder.exists():
                return folder, handle
            os.close(handle)


def _written(path: Path, file: PrefixFile, rendering: Rendering) -> mmap.mmap:
    """Writes the file, and returns a private mapping of it: writes to the mapping do not reach the file.

    The file is filled by `write`, which reports a full disk; filling it through a mapping would kill the process
    (SIGBUS).
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o400)
    try:
        for chunk in file.chunks(rendering):
            written = 0
            while written < len(chunk):
                written += os.write(handle, chunk[written:])
        os.fchmod(handle, 0o440)
        return mmap.mmap(handle, file.content_length, access=mmap.ACCESS_COPY)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
