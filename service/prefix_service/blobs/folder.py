"""Content-addressed bytes in a folder: durable before they are visible, verified on every read."""

import contextlib
import fcntl
import hashlib
import logging
import math
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from prefix_service.blobs.names import damaged, digest_at, path_of
from prefix_service.blobs.port import Allocate, ChunkObserver, StoredBlob
from prefix_service.blobs.reading import PIECE, digest_of, pieces
from prefix_service.blobs.staged import StagedFile, StagingFolder
from prefix_service.errors import CorruptBlob, NotFound, ReadOnly, StorageFailed, Unavailable
from prefix_service.system.disk import (
    PRIVATE_FOLDER,
    private_opener,
    require_writable,
    sync_folder,
    translated,
    write_private,
)
from prefix_service.system.host_memory import host_memory
from prefix_service.system.locks import locked

log = logging.getLogger("prefix_service")

_REMOVED_TOGETHER: Final = 50


class FolderBlobStore:
    """Blobs as files `<root>/<first two hex>/<64 hex>`; damaged files are kept in `<root>/quarantine`.

    A blob is written to a temporary sibling, flushed to disk and renamed, and its folder is flushed, so after a crash
    it is whole or absent. A file is read into memory and hashed, never mapped: a process dies if a file that it maps
    shrinks. Renames hold the file `<root>/lock` shared, removals exclusively, each for microseconds, so that a removal
    never takes a blob that was committed a moment ago.

    A store that is `read_only` creates, moves and removes nothing, not even damaged files.
    """

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self._root, self._read_only = root, read_only
        self._staging, self._quarantine = StagingFolder(root / "staging"), root / "quarantine"
        self._flushed: set[Path] = set()  # folders whose own entry is certainly on disk
        if read_only:
            return
        with translated("make the blob folder"):
            for folder in (root, self._staging.path, self._quarantine):
                folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
            sync_folder(root.parent)

    @property
    def identity(self) -> str:
        """The random id that the folder keeps, and that all who share the folder find.

        Raises:
            StorageFailed, OutOfSpace: the disk refused.
        """
        path = self._root / "id"
        with translated(f"read {path}"):
            if not path.exists() and not self._read_only:
                with contextlib.suppress(FileExistsError):  # another replica was faster
                    write_private(path, f"folder {secrets.token_hex(8)}")
            return path.read_text().strip()

    def check(self) -> None:
        """Checks that blobs can be read and written now.

        Raises:
            OutOfSpace: the disk is full, or nearly.
            Unavailable, StorageFailed: the folder is gone, or the disk refused.
        """
        self._require_reachable()
        if not self._read_only:
            require_writable(self._staging.path, "the blob folder")

    def sweep(self, older_than: float) -> int:
        """Removes unfinished uploads that were last written at least `older_than` seconds ago; returns their number.

        Raises:
            OutOfSpace, Unavailable, StorageFailed: the disk refused.
        """
        return self._staging.sweep(older_than)

    def listed(self) -> Iterator[StoredBlob]:
        """Yields every blob, in no order; ignores other files in the folder.

        Raises:
            StorageFailed: the disk refused.
        """
        now = self._staging.now()
        for folder in sorted(self._root.glob("[0-9a-f][0-9a-f]")):
            with translated(f"list the blobs in {folder.name}"):
                found = list(_stored(folder, now))
            yield from found

    def exists(self, digest: str) -> bool:
        """Returns whether the blob exists, sound or damaged.

        Raises:
            NotFound: `digest` is malformed.
            Unavailable: the whole folder is gone.
            StorageFailed: the disk refused.
        """
        with translated(f"look for blob {digest}"):
            found = self.path(digest).exists()
        if not found:
            self._require_reachable()
        return found

    def _require_reachable(self) -> None:
        """Raises Unavailable if the folder is empty: it is then a mount point without its disk, and no blob is lost."""
        with (
            translated("look into the blob folder"),
            contextlib.suppress(FileNotFoundError),
            os.scandir(self._root) as entries,
        ):
            if next(entries, None) is not None:
                return
        raise Unavailable(f"the blob folder {self._root.name} is gone: mount it again, or bring it back")

    def remove(self, digests: Sequence[str], older_than: float, within: float = math.inf) -> set[str]:
        """Removes blobs that were not committed again within the last `older_than` seconds; returns the removed
        digests. After `within` seconds no removal begins.

        A commit waits for at most `_REMOVED_TOGETHER` removals.

        Raises:
            StorageFailed: the disk refused; some blobs may be removed.
        """
        until = time.monotonic() + within
        limit = self._staging.now() - older_than
        gone = set()
        for begin in range(0, len(digests), _REMOVED_TOGETHER):
            with translated("remove blobs"), self._locked(fcntl.LOCK_EX):
                for digest in digests[begin : begin + _REMOVED_TOGETHER]:
                    path = self.path(digest)
                    with contextlib.suppress(FileNotFoundError):
                        if path.stat().st_mtime <= limit and time.monotonic() < until:
                            path.unlink()
                            gone.add(digest)
        return gone

    def _locked(self, how: int) -> contextlib.AbstractContextManager[int]:
        """Holds the store's lock: `fcntl.LOCK_SH` excludes removals, `fcntl.LOCK_EX` excludes commits too."""
        return locked(self._root / "lock", how)

    def _place(self, staged: Path, digest: str) -> None:
        """Moves a finished file to its blob's path, durably."""
        target = self.path(digest)
        self._prepare(target.parent)
        with self._locked(fcntl.LOCK_SH):
            staged.replace(target)
        sync_folder(target.parent)

    def _prepare(self, folder: Path) -> None:
        """Creates a folder of blobs durably; a folder that exists could still be lost in a power failure."""
        if folder not in self._flushed:
            folder.mkdir(PRIVATE_FOLDER, exist_ok=True)
            sync_folder(self._root)
            self._flushed.add(folder)

    def stage(self) -> StagedFile:
        """Begins a blob.

        Raises:
            Unavailable: the whole folder is gone, or no file can be opened now.
            OutOfSpace, StorageFailed: the disk refused.
            ReadOnly: this store only reads.
        """
        if self._read_only:
            raise ReadOnly("this service is read-only (--read-only): publish to the one that writes")
        try:
            return self._staging.stage(self._place)
        except StorageFailed:
            self._require_reachable()
            raise

    def read(self, digest: str, allocate: Allocate = host_memory, observer: ChunkObserver | None = None) -> memoryview:
        """Returns all bytes of a blob, verified, in memory from `allocate`.

        `observer` sees each chunk before the digest is compared, and must not publish it before `read` returns.

        Raises:
            NotFound: there is no such blob.
            CorruptBlob: the bytes do not match the digest.
            Unavailable: the whole folder is gone, or no file can be opened now.
            StorageFailed: the disk refused.
        """
        found, length = hashlib.sha256(), 0
        with self._existing(digest) as file:
            with translated(f"read blob {digest}"):
                data = allocate(os.fstat(file.fileno()).st_size)
                for piece in pieces(file, data):
                    if observer is not None:
                        observer(piece)
                    found.update(piece)
                    length += len(piece)
            if length != len(data) or digest_of(found) != digest:
                raise self._damaged(digest, file)
            return data

    def open(self, digest: str) -> BinaryIO:
        """Returns a blob as a verified file, for blobs that are too large for memory. The caller closes it.

        Raises:
            NotFound: there is no such blob.
            CorruptBlob: the bytes do not match the digest.
            Unavailable: the whole folder is gone, or no file can be opened now.
            StorageFailed: the disk refused.
        """
        with contextlib.ExitStack() as closing:
            file = closing.enter_context(self._existing(digest))
            with translated(f"read blob {digest}"):
                found = digest_of(hashlib.file_digest(file, "sha256"))  # type: ignore[arg-type]  # it is an open file
                file.seek(0)
            if found != digest:
                raise self._damaged(digest, file)
            closing.pop_all()
            return file

    def copy(self, digest: str, target: Path) -> int:
        """Copies a blob to a file outside the store, verified while it is read; returns its size in bytes.

        The caller flushes the file to disk.

        Raises:
            NotFound: there is no such blob.
            CorruptBlob: the bytes do not match the digest; the copy is removed.
            StorageFailed: the disk refused.
            OutOfSpace: the target's disk is full.
        """
        found, length = hashlib.sha256(), 0
        with self._existing(digest) as file:
            with translated(f"copy blob {digest}"), open(target, "wb", opener=private_opener) as copied:
                while piece := file.read(PIECE):
                    found.update(piece)
                    length += copied.write(piece)
            if digest_of(found) != digest:
                target.unlink()
                raise self._damaged(digest, file)
        return length

    def _existing(self, digest: str) -> BinaryIO:
        with translated(f"read blob {digest}"):
            try:
                return self.path(digest).open("rb")
            except FileNotFoundError as error:
                self._require_reachable()
                raise NotFound(f"there is no blob {digest}") from error

    def _damaged(self, digest: str, file: BinaryIO) -> CorruptBlob:
        """Moves a damaged file to the quarantine, unless the content was committed again in the meantime.

        Returns the error.
        """
        kept = self._quarantined(self.path(digest), file)
        log.error("blob damaged", extra={"digest": digest, "kept": kept})
        return damaged(digest)

    def _quarantined(self, path: Path, file: BinaryIO) -> str:
        """Moves a damaged file to the quarantine, unless the disk is read-only; returns its path."""
        aside = self._quarantine / path.name
        if not self._read_only:
            with contextlib.suppress(OSError), self._locked(fcntl.LOCK_EX):
                if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    path.replace(aside)
                return str(aside.relative_to(self._root))
        return str(path.relative_to(self._root))

    def path(self, digest: str) -> Path:
        """Returns the path of a blob's file, whether or not the file exists.

        Raises:
            NotFound: `digest` is malformed.
        """
        return self._root / path_of(digest)


def _stored(folder: Path, now: float) -> Iterator[StoredBlob]:
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            if digest := digest_at(entry.name):
                yield StoredBlob(digest, entry.stat().st_size, now - entry.stat().st_mtime)
