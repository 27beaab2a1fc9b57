"""Content-addressed bytes in a folder: durable before they are visible, verified whenever they are read."""

import contextlib
import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from service.disk import translated
from service.errors import CorruptBlob, NotFound

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


class StagedBlob(Protocol):
    """Bytes on their way in; not visible until `commit`."""

    size: int

    @property
    def digest(self) -> str: ...
    def write(self, data: bytes | bytearray | memoryview) -> None: ...
    def read(self) -> bytearray: ...
    def commit(self) -> str: ...
    def discard(self) -> None: ...


class BlobStore(Protocol):
    """What the library needs of a store of bytes; digests are `sha256:<64 hex>`."""

    def stage(self) -> StagedBlob: ...
    def read(self, digest: str) -> bytearray: ...
    def open(self, digest: str) -> BinaryIO: ...


class FolderBlobStore:
    """Blobs as files `<root>/<first two hex>/<64 hex>`.

    A blob is written to a temporary sibling, flushed to the disk, renamed, and its folder flushed, so after a crash
    it is whole or absent. A file is read into memory and hashed, never mapped: a mapped file that shrinks kills.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._staging = root / "staging"
        with translated("make the blob folder"):
            self._staging.mkdir(parents=True, exist_ok=True)

    def sweep(self) -> int:
        """Remove what unfinished uploads left behind; only while no other process writes here. Returns how many."""
        leftovers = list(self._staging.iterdir())
        for path in leftovers:
            path.unlink(missing_ok=True)
        return len(leftovers)

    def stage(self) -> "StagedFile":
        """Begin a blob.

        Raises:
            OutOfSpace, StorageFailed: the disk refused.
        """
        with translated("begin a blob"):
            handle, name = tempfile.mkstemp(dir=self._staging)
            return StagedFile(self, os.fdopen(handle, "w+b"), Path(name))

    def read(self, digest: str) -> bytearray:
        """All bytes of a blob, verified.

        Raises:
            NotFound: there is no such blob.
            CorruptBlob: its bytes no longer match its digest.
            StorageFailed: the disk refused.
        """
        with translated(f"read blob {digest}"), self._existing(digest).open("rb") as file:
            data = bytearray(os.fstat(file.fileno()).st_size)
            length = file.readinto(data)
        if length != len(data) or _digest(hashlib.sha256(data)) != digest:
            raise _corrupt(digest)
        return data

    def open(self, digest: str) -> BinaryIO:
        """A blob as a file, verified, for what is too large for memory; the caller closes it.

        Raises:
            NotFound, CorruptBlob, StorageFailed: as `read`.
        """
        with translated(f"read blob {digest}"), contextlib.ExitStack() as closing:
            file = closing.enter_context(self._existing(digest).open("rb"))
            if _digest(hashlib.file_digest(file, "sha256")) != digest:
                raise _corrupt(digest)
            file.seek(0)
            closing.pop_all()
            return file

    def _existing(self, digest: str) -> Path:
        if not (path := self.path(digest)).exists():
            raise NotFound(f"there is no blob {digest}")
        return path

    def path(self, digest: str) -> Path:
        """The file that holds a blob, whether or not it exists."""
        if not _DIGEST.fullmatch(digest):
            raise NotFound(f"{digest!r:.100} is not a digest")
        name = digest.removeprefix("sha256:")
        return self._root / name[:2] / name


class StagedFile:
    """A blob while it is written; `size` counts the bytes so far."""

    def __init__(self, store: FolderBlobStore, file: BinaryIO, path: Path) -> None:
        self.size = 0
        self._store, self._file, self._path = store, file, path
        self._hash = hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append.

        Raises:
            OutOfSpace, StorageFailed: the disk refused; discard the blob.
        """
        with translated("write a blob"):
            self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def digest(self) -> str:
        """The digest of the bytes so far."""
        return _digest(self._hash)

    def read(self) -> bytearray:
        """All bytes so far."""
        with translated("read a blob back"):
            self._file.seek(0)
            data = bytearray(self.size)
            self._file.readinto(data)  # type: ignore[attr-defined]  # typeshed has it on BufferedRandom alone
        return data

    def commit(self) -> str:
        """Make the blob durable and visible; its digest.

        Raises:
            OutOfSpace, StorageFailed: the disk refused; nothing is visible, and the upload must be done anew.
        """
        digest = self.digest
        target = self._store.path(digest)
        with translated(f"store blob {digest}"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if not target.parent.exists():
                target.parent.mkdir(exist_ok=True)
                _sync_folder(target.parent.parent)
            self._path.replace(target)
            _sync_folder(target.parent)
        return digest

    def discard(self) -> None:
        """Forget a blob that was not committed; harmless afterwards."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)


def _digest(sha256: "hashlib._Hash") -> str:
    return f"sha256:{sha256.hexdigest()}"


def _corrupt(digest: str) -> CorruptBlob:
    return CorruptBlob(f"the stored bytes of {digest} no longer match their digest", retry_after=60)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
