"""Copies a data folder while the service runs. The copy is itself a data folder, which `serve` can start on."""

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.blobs.port import BlobStore
from prefix_service.catalog.database import Database
from prefix_service.catalog.garbage import Garbage
from prefix_service.data_folder.opening import blob_folder, blob_store, catalog_file, shown_catalog
from prefix_service.errors import Conflict, CorruptBlob, NotFound
from prefix_service.settings import Settings
from prefix_service.system.disk import PRIVATE_FOLDER, make_private, translated, write_private


@dataclass(frozen=True, slots=True)
class Backup:
    """The result of a backup: the number of copied blobs, their bytes, and the `lost` digests.

    A digest is lost if the catalog names it, but its blob is missing or damaged.
    """

    blobs: int
    nbytes: int
    lost: list[str]


def back_up(settings: Settings, target: Path, progress: Callable[[int], None]) -> Backup:
    """Copies the data folder to `target`; calls `progress` with the size of each copied blob.

    It copies the blobs, then a snapshot of the catalog, then the blobs that were published in the meantime. Every blob
    that the snapshot names is thus copied, since a blob that is no longer needed stays for the grace period. Every blob
    is verified as it is read. The keys' secret is copied if it is in the folder; `bootstrap.key` is not.

    Raises:
        NotFound: the folder has no catalog.
        Conflict: `target` exists, or the catalog is on PostgreSQL.
        OutOfSpace, StorageFailed: the disk refused.
    """
    if (server := shown_catalog(settings)) is not None:
        raise Conflict(
            f"the catalog is on PostgreSQL, {server}, and this command copies "
            "data folders: run `pg_dump --format=custom` there first, then copy the blobs within PREFIX_GARBAGE_GRACE, "
            "and keep PREFIX_KEY_SECRET_FILE beside them; restore with `pg_restore` into an empty database"
        )
    source = catalog_file(settings.data_dir)
    if not source.exists():
        raise NotFound(f"{settings.data_dir} is not a data folder: it has no {source.name}")
    if target.exists():
        raise Conflict(f"{target} exists: name a new folder")
    partial = target.with_name(f"{target.name}.partial")
    with translated(f"write the backup {target}"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(PRIVATE_FOLDER, parents=True)
        copy = _Copy(blob_store(settings), blob_folder(partial), progress)
        copy.add(blob.digest for blob in copy.source.listed())
        snapshot(source, catalog_file(partial))
        named = _named(catalog_file(partial))
        copy.add(named)
        if settings.key_secret_file is None and settings.secret_file.exists():
            write_private(partial / settings.secret_file.name, settings.secret_file.read_text().strip())
        os.sync()
        partial.rename(target)
    return Backup(len(copy.done), copy.nbytes, sorted(named - copy.done))


class _Copy:
    def __init__(self, source: BlobStore, folder: Path, progress: Callable[[int], None]) -> None:
        self.source, self.target = source, FolderBlobStore(folder)
        self.done: set[str] = set()
        self.nbytes = 0
        self._progress = progress

    def add(self, digests: Iterable[str]) -> None:
        for digest in digests:
            if digest not in self.done:
                # A blob that is collected, lost or damaged is skipped here; the catalog's snapshot decides whether it
                # counts as lost.
                with contextlib.suppress(NotFound, CorruptBlob):
                    self._copy(digest)

    def _copy(self, digest: str) -> None:
        path = self.target.path(digest)
        path.parent.mkdir(PRIVATE_FOLDER, exist_ok=True)
        nbytes = self.source.copy(digest, path)
        self.done.add(digest)
        self.nbytes += nbytes
        self._progress(nbytes)


def snapshot(source: Path, target: Path) -> None:
    """Copies the catalog as it is at one moment. Writers wait during the copy, so it is not flushed until the end."""
    make_private(target)  # SQLite keeps the mode of an existing file
    with (
        contextlib.closing(sqlite3.connect(source, timeout=30)) as before,
        contextlib.closing(sqlite3.connect(target)) as after,
    ):
        for pragma in ("journal_mode=OFF", "synchronous=OFF"):
            after.execute(f"PRAGMA {pragma}")
        before.backup(after)


def _named(catalog: Path) -> set[str]:
    database = Database(catalog)
    try:
        return {digest for _, *digests in Garbage(database).named() for digest in digests}
    finally:
        database.close()
