"""Opens the data folder of an embedded service: locks it, and creates its contents at the first start."""

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.blobs.port import BlobStore
from prefix_service.catalog.database import Database
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import COMMAND_LINE
from prefix_service.catalog.retention import Retention
from prefix_service.catalog.tenants import Tenants
from prefix_service.data_folder.collector import collecting
from prefix_service.errors import Conflict, InvalidInput, NotFound, StorageFailed, Unavailable
from prefix_service.settings import Settings
from prefix_service.system.disk import PRIVATE_FOLDER, require_writable, sync_folder, tighten, translated, write_private
from prefix_service.system.reserve import Reserve, reserve_file

log = logging.getLogger("prefix_service")


def catalog_file(data_dir: Path) -> Path:
    """Returns the path of the catalog's SQLite file."""
    return data_dir / "catalog.sqlite"


def blob_folder(data_dir: Path) -> Path:
    """Returns the path of the blob folder."""
    return data_dir / "blobs"


def cache_folder(data_dir: Path) -> Path:
    """Returns the path of the folder with copies of blobs that are in a bucket."""
    return data_dir / "blob-cache"


def blob_store(settings: Settings) -> BlobStore:
    """Returns the blob store of a service: the bucket that is set, or a folder in the data folder.

    Raises:
        InvalidInput: a bucket is set, and obstore is missing, or an `AWS_…` variable is malformed.
        StorageFailed, OutOfSpace: the disk refused.
    """
    if settings.blobs_url is None:
        return FolderBlobStore(blob_folder(settings.data_dir), read_only=settings.read_only)
    try:
        from prefix_service.blobs.bucket import Bucket
        from prefix_service.blobs.s3 import S3BlobStore
    except ImportError as error:
        raise InvalidInput("PREFIX_BLOBS_URL needs obstore: pip install 'prefix-service[fleet]'") from error
    return S3BlobStore(
        Bucket(settings.blobs_url),
        cache_folder(settings.data_dir),
        settings.blob_cache_bytes,
        read_only=settings.read_only,
    )


def bootstrap_file(data_dir: Path) -> Path:
    """Returns the path of the file to which a first start writes the platform admin's key."""
    return data_dir / "bootstrap.key"


def check(settings: Settings) -> None:
    """Checks that the catalog can be read and written now.

    Raises:
        OutOfSpace: the disk is full, or nearly.
        StorageFailed: the folder is gone, or the disk refused.
    """
    with translated(f"look for {catalog_file(settings.data_dir)}"):
        catalog_file(settings.data_dir).stat()  # a connection can go on reading a file that was removed
    if not settings.read_only:
        require_writable(settings.data_dir, "the data folder")


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[int | None]:
    """Locks the folder for one service, migrates the catalog, makes the first key, and collects garbage while the block
    runs. With `read_only` the folder is not changed, and another service may write to it.

    Yields the lock's file descriptor, or None with `read_only`. The lock holds until every process that inherited the
    descriptor has ended.

    Raises:
        Conflict: another service runs on the folder.
        NotFound: with `read_only`, there is no catalog or no secret.
        StorageFailed, OutOfSpace: the disk refused.
    """
    data_dir = settings.data_dir
    if settings.read_only:
        _require_complete(settings)
        yield None
        return
    try:
        with translated(f"use the data folder {data_dir}"):
            data_dir.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
            _tighten(settings)
            handle = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except StorageFailed as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EROFS:
            raise StorageFailed(f"{error}: start with --read-only to serve what it holds") from error
        raise
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"another prefix-service runs on the data folder {data_dir}: stop it first") from error
        with _prepared(settings):
            yield handle
    finally:
        os.close(handle)


def _require_complete(settings: Settings) -> None:
    needed = (
        [catalog_file(settings.data_dir)] if settings.dev else [catalog_file(settings.data_dir), settings.secret_file]
    )
    for path in needed:
        with translated(f"look for {path}"):
            if not path.exists():
                raise NotFound(
                    f"{settings.data_dir} is not a data folder that can be served --read-only: {path} is missing"
                )


@contextlib.contextmanager
def keys_of(settings: Settings) -> Iterator[tuple[Keyring, Tenants]]:
    """Yields the keyring and the tenants of a service's folder, whether or not a service runs on it.

    Raises:
        NotFound: there is no catalog.
        StorageFailed, OutOfSpace: the disk refused.
    """
    place = catalog_file(settings.data_dir)
    with translated(f"look for {place}"):
        if not place.exists():
            raise NotFound(f"{settings.data_dir} is not a data folder of a service: {place} is missing")
    database = Database(place)
    try:
        yield Keyring(database, settings.secret_file), Tenants(database)
    finally:
        database.close()


def _tighten(settings: Settings) -> None:
    """Takes a folder away from group and others that an older release, or a copy, left open to them.

    Files of blobs are in folders, so only those folders are changed.
    """
    data_dir = settings.data_dir
    files = [data_dir / "lock", data_dir / "key.secret", bootstrap_file(data_dir)]
    found = [data_dir, *files, *data_dir.glob(f"{catalog_file(data_dir).name}*")]
    for blobs in (blob_folder(data_dir), cache_folder(data_dir)):
        found += [blobs, *blobs.glob("*")]
    for path in found:
        if path.exists():
            tighten(path)


@contextlib.contextmanager
def _prepared(settings: Settings) -> Iterator[None]:
    blobs = blob_store(settings)
    if settings.blobs_url is not None:
        _require_accepted(blobs)
    blobs.sweep(older_than=0)
    if not catalog_file(settings.data_dir).exists():
        with translated("make the catalog"):
            _make(settings)
    Reserve(reserve_file(catalog_file(settings.data_dir))).fill()
    database = Database(catalog_file(settings.data_dir))
    try:
        retention = Retention(settings.audit_days, settings.changes_days, settings.usage_days)
        with collecting(database, blobs, settings.garbage_grace, retention):
            yield
    finally:
        database.close()


def _require_accepted(blobs: BlobStore) -> None:
    """Checks that the bucket exists and takes the key. If it is away, the service starts: it serves what it has.

    Raises:
        StorageFailed: the bucket refuses.
    """
    try:
        blobs.check()
    except StorageFailed:
        raise
    except Unavailable as error:
        log.warning("the blob store is away: %s", error)


def _make(settings: Settings) -> None:
    """Makes the catalog of a first start. It appears with its first key, whose file exists already, or not at all."""
    place, first_key = catalog_file(settings.data_dir), bootstrap_file(settings.data_dir)
    aside = place.with_name(f"{place.name}.new")
    for left in (aside, first_key):
        left.unlink(missing_ok=True)  # left by a first start that was interrupted; no catalog knows this key
    database = Database(aside)
    try:
        if not settings.dev:
            _, text = Keyring(database, settings.secret_file).create(None, "admin", "bootstrap", COMMAND_LINE)
            write_private(first_key, text)
    finally:
        database.close()
    aside.replace(place)
    aside.with_name(f"{aside.name}-journal").unlink(missing_ok=True)
    sync_folder(settings.data_dir)
