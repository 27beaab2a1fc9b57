"""Content-addressed bytes in a folder: durable before they are visible, verified whenever they are read."""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from prefix_service.errors import CorruptBlob, NotFound, ReadOnly, Unavailable
from prefix_service.system.disk import PRIVATE_FOLDER, private_opener, require_writable, sync_folder, translated
from prefix_service.system.host_memory import host_memory

log = logging.getLogger("prefix_service")

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_REMOVED_TOGETHER: Final = 50
_PIECE: Final = 1 << 20  # read, and hashed while it is in the processor's cache

Allocate = Callable[[int], memoryview]
"""Where a blob is read into: so many writable bytes."""

ChunkObserver = Callable[[memoryview], object]
"""Called with each piece of a blob in order, before any of it is verified."""


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A blob in a listing: its bytes, and seconds since it was last committed, by the store's own clock."""

    digest: str
    size: int
    age: float


class StagedBlob(Protocol):
    """Bytes on their way in; not visible until `commit`."""

    size: int

    @property
    def digest(self) -> str: ...
    def write(self, data: bytes | bytearray | memoryview) -> None: ...
    def read(self, start: int = ..., stop: int | None = ...) -> memoryview: ...
    def commit(self) -> str: ...
    def discard(self) -> None: ...


class BlobStore(Protocol):
    """What the library needs of a store of bytes; digests are `sha256:<64 hex>`."""

    def stage(self) -> StagedBlob: ...
    def read(self, digest: str, allocate: Allocate = ..., observer: ChunkObserver | None = None) -> memoryview: ...
    def open(self, digest: str) -> BinaryIO: ...
    def exists(self, digest: str) -> bool: ...
    def check(self) -> None: ...
    def listed(self) -> Iterator[StoredBlob]: ...
    def remove(self, digests: Sequence[str], older_than: float) -> set[str]: ...
    def sweep(self, older_than: float) -> int: ...


class FolderBlobStore:
    """Blobs as files `<root>/<first two hex>/<64 hex>`; what damage took is kept aside in `<root>/quarantine`.

    A blob is written to a temporary sibling, flushed to the disk, renamed, and its folder flushed, so after a crash
    it is whole or absent. A file is read into memory and hashed, never mapped: a mapped file that shrinks kills.
    Renames hold the file `<root>/lock` shared, removals exclusively, each for microseconds: nothing that was
    committed a moment ago is removed for what it was before.

    A store that is `read_only` makes, moves and removes nothing, not even what is damaged.
    """

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self._root, self._read_only = root, read_only
        self._staging, self._quarantine = root / "staging", root / "quarantine"
        self._flushed: set[Path] = set()  # folders whose own entry is on the disk for certain
        if read_only:
            return
        with translated("make the blob folder"):
            for folder in (root, self._staging, self._quarantine):
                folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
            sync_folder(root.parent)

    def check(self) -> None:
        """Look whether blobs could be read and written now.

        Raises:
            OutOfSpace: the disk is full, or nearly.
            Unavailable, StorageFailed: the folder is gone, or the disk refused.
        """
        self._require_reachable()
        if not self._read_only:
            require_writable(self._staging, "the blob folder")

    def sweep(self, older_than: float) -> int:
        """Remove what unfinished uploads left behind at least so many seconds ago. Returns how many."""
        limit = self._now() - older_than
        with translated("sweep unfinished uploads"):
            return sum(_remove_unless_written(path, limit) for path in self._staging.iterdir())

    def listed(self) -> Iterator[StoredBlob]:
        """Every blob, in no order; what else lies there is not this store's.

        Raises:
            StorageFailed: the disk refused.
        """
        now = self._now()
        for folder in sorted(self._root.glob("[0-9a-f][0-9a-f]")):
            with translated(f"list the blobs in {folder.name}"):
                found = list(_stored(folder, now))
            yield from found

    def exists(self, digest: str) -> bool:
        """Whether there is such a blob, sound or not.

        Raises:
            Unavailable: the whole folder is gone.
            StorageFailed: the disk refused.
        """
        with translated(f"look for blob {digest}"):
            found = self.path(digest).exists()
        if not found:
            self._require_reachable()
        return found

    def _require_reachable(self) -> None:
        """A folder without an entry is a mount point without its disk: no blob was lost, all are elsewhere."""
        with (
            translated("look into the blob folder"),
            contextlib.suppress(FileNotFoundError),
            os.scandir(self._root) as entries,
        ):
            if next(entries, None) is not None:
                return
        raise Unavailable(f"the blob folder {self._root.name} is gone: mount it again, or bring it back")

    def remove(self, digests: Sequence[str], older_than: float) -> set[str]:
        """Removes blobs that were not committed again within the last `older_than` seconds; returns those that are
        gone. Commits wait for `_REMOVED_TOGETHER` removals at most.

        Raises:
            StorageFailed: the disk refused; some may be gone.
        """
        limit = self._now() - older_than
        gone = set()
        for begin in range(0, len(digests), _REMOVED_TOGETHER):
            with translated("remove blobs"), self.locked(fcntl.LOCK_EX):
                for digest in digests[begin : begin + _REMOVED_TOGETHER]:
                    path = self.path(digest)
                    with contextlib.suppress(FileNotFoundError):
                        if path.stat().st_mtime <= limit:
                            path.unlink()
                            gone.add(digest)
        return gone

    def _now(self) -> float:
        """The file system's time, which may not be this machine's."""
        with translated("read the time of the blob folder"), tempfile.TemporaryFile(dir=self._staging) as probe:
            return os.fstat(probe.fileno()).st_mtime

    @contextlib.contextmanager
    def locked(self, how: int) -> Iterator[None]:
        """Keep removals away (`fcntl.LOCK_SH`), or every change of what blobs there are (`fcntl.LOCK_EX`)."""
        handle = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, how)
            yield
        finally:
            os.close(handle)

    def prepare(self, folder: Path) -> None:
        """Have a folder of blobs; that it exists does not say that it would outlive a power loss."""
        if folder not in self._flushed:
            folder.mkdir(PRIVATE_FOLDER, exist_ok=True)
            sync_folder(self._root)
            self._flushed.add(folder)

    def stage(self) -> "StagedFile":
        """Begin a blob.

        Raises:
            OutOfSpace, StorageFailed: the disk refused.
            ReadOnly: this store only reads.
        """
        if self._read_only:
            raise ReadOnly("this service is read-only (--read-only): publish to the one that writes")
        with translated("begin a blob"):
            handle, name = tempfile.mkstemp(dir=self._staging)
            fcntl.flock(handle, fcntl.LOCK_SH)  # until it is closed: no sweep takes it away
            return StagedFile(self, os.fdopen(handle, "w+b"), Path(name))

    def read(self, digest: str, allocate: Allocate = host_memory, observer: ChunkObserver | None = None) -> memoryview:
        """All bytes of a blob, verified, in new `memory`; `beside` is for who may work on them meanwhile in private.

        Raises:
            NotFound: there is no such blob.
            CorruptBlob: its bytes no longer match its digest.
            Unavailable: the whole folder is gone, or no file can be opened now.
            StorageFailed: the disk refused.
        """
        found, length = hashlib.sha256(), 0
        with self._existing(digest) as file:
            with translated(f"read blob {digest}"):
                data = allocate(os.fstat(file.fileno()).st_size)
                for piece in _pieces(file, data):
                    if observer is not None:
                        observer(piece)
                    found.update(piece)
                    length += len(piece)
            if length != len(data) or _digest(found) != digest:
                raise self._damaged(digest, file)
            return data

    def open(self, digest: str) -> BinaryIO:
        """A blob as a file, verified, for what is too large for memory; the caller closes it.

        Raises:
            NotFound, CorruptBlob, Unavailable, StorageFailed: as `read`.
        """
        with contextlib.ExitStack() as closing:
            file = closing.enter_context(self._existing(digest))
            with translated(f"read blob {digest}"):
                found = _digest(hashlib.file_digest(file, "sha256"))  # type: ignore[arg-type]  # it is an open file
                file.seek(0)
            if found != digest:
                raise self._damaged(digest, file)
            closing.pop_all()
            return file

    def copy(self, digest: str, target: Path) -> int:
        """Copies a blob to a file outside the store, verified while it is read; returns its bytes. The caller flushes
        it to the disk.

        Raises:
            NotFound, CorruptBlob, StorageFailed: as `read`; there is no file then.
            OutOfSpace: the target's disk is full.
        """
        found, length = hashlib.sha256(), 0
        with self._existing(digest) as file:
            with translated(f"copy blob {digest}"), open(target, "wb", opener=private_opener) as copied:
                while piece := file.read(_PIECE):
                    found.update(piece)
                    length += copied.write(piece)
            if _digest(found) != digest:
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
        """Move a damaged file out of the way, unless the same content was committed again meanwhile."""
        kept = self._quarantined(self.path(digest), file)
        log.error("blob damaged", extra={"digest": digest, "kept": kept})
        return CorruptBlob(
            f"the stored bytes of {digest} no longer match their digest; publish the same files again to mend the "
            "version",
            retry_after=60,
        )

    def _quarantined(self, path: Path, file: BinaryIO) -> str:
        """Return where the damaged file is now; a disk that takes no change keeps it where it is."""
        aside = self._quarantine / path.name
        if not self._read_only:
            with contextlib.suppress(OSError), self.locked(fcntl.LOCK_EX):
                if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    path.replace(aside)
                return str(aside.relative_to(self._root))
        return str(path.relative_to(self._root))

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

    def read(self, start: int = 0, stop: int | None = None) -> memoryview:
        """Returns the bytes `start:stop` of those so far, in new memory; writes go on at the end.

        Raises:
            StorageFailed: the disk refused.
        """
        with translated("read a blob back"):
            data = read_range(self._file, start, self.size if stop is None else stop)
            self._file.seek(0, os.SEEK_END)
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
            os.utime(self._file.fileno())  # its age counts from here
            os.fsync(self._file.fileno())
            self._store.prepare(target.parent)
            with self._store.locked(fcntl.LOCK_SH):
                self._path.replace(target)
            self._file.close()
            sync_folder(target.parent)
        return digest

    def discard(self) -> None:
        """Forget a blob that was not committed; harmless afterwards."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):  # a sweep takes what stays
            self._path.unlink()


def read_range(file: BinaryIO, start: int, stop: int) -> memoryview:
    """Returns the bytes `start:stop` of an open blob, in new memory.

    Raises:
        StorageFailed: the disk refused, or the file has become shorter.
    """
    with translated("read a blob"):
        data = host_memory(stop - start)
        file.seek(start)
        if sum(map(len, _pieces(file, data))) != len(data):
            raise OSError(errno.EIO, "the file has become shorter")
    return data


def _digest(sha256: "hashlib._Hash") -> str:
    return f"sha256:{sha256.hexdigest()}"


def _pieces(file: BinaryIO, data: memoryview) -> Iterator[memoryview]:
    """Fill memory from a file, one piece after another; fewer if the file has become shorter."""
    at = 0
    while count := file.readinto(data[at : at + _PIECE]):  # type: ignore[attr-defined]  # BufferedReader alone has it
        yield data[at : at + count]
        at += count


def _stored(folder: Path, now: float) -> Iterator[StoredBlob]:
    for entry in os.scandir(folder):
        digest = f"sha256:{entry.name}"
        with contextlib.suppress(FileNotFoundError):
            if _DIGEST.fullmatch(digest):
                yield StoredBlob(digest, entry.stat().st_size, now - entry.stat().st_mtime)


def _remove_unless_written(path: Path, limit: float) -> bool:
    """Remove a file that was last written before `limit`, and that nobody has open for writing; whether it is gone."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_mtime <= limit:
            path.unlink()
            return True
    return False
