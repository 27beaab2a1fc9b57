"""Opens the data folder of an embedded service: locks it, and creates its contents at the first start."""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from prefix_service.blobs.folder import FolderBlobStore
from prefix_service.blobs.port import BlobStore
from prefix_service.catalog.claim import Claim, claim, require_claim, require_finished
from prefix_service.catalog.database import Database
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import COMMAND_LINE
from prefix_service.catalog.retention import Retention
from prefix_service.catalog.tenants import Tenants
from prefix_service.catalog.url import shown
from prefix_service.data_folder.collector import collecting
from prefix_service.errors import Conflict, InvalidInput, NotFound, StorageFailed, Unauthenticated, Unavailable
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


def catalog_place(settings: Settings) -> Path | str:
    """Returns where the catalog is: a SQLite file in the data folder, or the URL of a PostgreSQL database."""
    url = settings.catalog_url
    return catalog_file(settings.data_dir) if url is None else url.get_secret_value()


def shown_catalog(settings: Settings) -> str | None:
    """Returns the URL of the catalog without its password; None if it is in the data folder."""
    url = settings.catalog_url
    return None if url is None else shown(url.get_secret_value())


def bootstrap_file(data_dir: Path) -> Path:
    """Returns the path of the file to which a first start writes the platform admin's key."""
    return data_dir / "bootstrap.key"


def check(settings: Settings) -> None:
    """Checks that the data folder, and a catalog in it, can be read and written now.

    Raises:
        OutOfSpace: the disk is full, or nearly.
        StorageFailed: the folder is gone, or the disk refused.
    """
    place = settings.data_dir if settings.catalog_url else catalog_file(settings.data_dir)
    with translated(f"look for {place}"):
        place.stat()  # a connection can go on reading a file that was removed
    if not settings.read_only:
        require_writable(settings.data_dir, "the data folder")


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[int | None]:
    """Locks the folder for one service, migrates the catalog, makes the first key, and collects garbage while the block
    runs. With `read_only` neither folder nor catalog is changed, and another service may write to them.

    Yields the lock's file descriptor, or None with `read_only`. The lock holds until every process that inherited the
    descriptor has ended.

    Raises:
        Conflict: another service runs on the folder, or the catalog belongs to another secret or blob store, or to an
            unfinished `migrate`.
        InvalidInput: the catalog's URL needs psycopg.
        NotFound: there is no secret that replicas share; or with `read_only`, no catalog or no secret.
        StorageFailed, OutOfSpace: the disk or the database refused.
    """
    if settings.catalog_url is not None:
        require_secret(settings.secret_file)
    if settings.read_only:
        _require_complete(settings)
        yield None
        return
    with folder_locked(settings) as handle, _prepared(settings):
        yield handle


@contextlib.contextmanager
def folder_locked(settings: Settings) -> Iterator[int]:
    """Makes the data folder if it is missing, and holds it for this process while the block runs; yields the lock's
    file descriptor.

    Raises:
        Conflict: another service, or a `migrate`, holds the folder.
        StorageFailed, OutOfSpace: the disk refused.
    """
    data_dir = settings.data_dir
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
        with translated(f"write {data_dir / 'lock'}"):
            os.truncate(handle, 0)
            os.write(handle, secrets.token_hex(8).encode())
        yield handle
    finally:
        os.close(handle)


def replica_id(data_dir: Path) -> str:
    """Returns the id of the service that runs on a data folder; its processes share it, and every start has another."""
    with translated("read the lock of the data folder"):
        return (data_dir / "lock").read_text()


def require_secret(path: Path) -> None:
    """Raises NotFound if there is no secret that keys are hashed with."""
    with translated(f"look for {path}"):
        if not path.exists():
            raise NotFound(
                f"there is no secret {path} (PREFIX_KEY_SECRET_FILE): copy that of another replica, or make the first "
                f"one with `openssl rand -hex 32 > {path}`"
            )


def _require_complete(settings: Settings) -> None:
    if settings.catalog_url is not None:
        with contextlib.closing(Database(catalog_place(settings), read_only=True)) as database:
            require_claim(database, Keyring(database, settings.secret_file), blob_store(settings).identity)
        return
    needed = (
        [catalog_file(settings.data_dir)] if settings.dev else [catalog_file(settings.data_dir), settings.secret_file]
    )
    for path in needed:
        with translated(f"look for {path}"):
            if not path.exists():
                raise NotFound(
                    f"{settings.data_dir} is not a data folder that can be served --read-only: {path} is missing"
                )
    with contextlib.closing(Database(catalog_file(settings.data_dir), read_only=True)) as database:
        require_finished(database)


@contextlib.contextmanager
def keys_of(settings: Settings) -> Iterator[tuple[Keyring, Tenants]]:
    """Yields the keyring and the tenants of a service's folder, or of the catalog at the configured URL, whether or not
    a service runs on it.

    Raises:
        NotFound: there is no catalog, or no secret.
        Conflict: the catalog's keys are hashed with another secret, or a `migrate` to it is unfinished.
        StorageFailed, OutOfSpace: the disk or the database refused.
    """
    place = catalog_place(settings)
    if isinstance(place, Path):
        with translated(f"look for {place}"):
            if not place.exists():
                raise NotFound(f"{settings.data_dir} is not a data folder of a service: {place} is missing")
    else:
        require_secret(settings.secret_file)
    with contextlib.closing(Database(place)) as database:
        keyring = Keyring(database, settings.secret_file)
        if isinstance(place, Path):
            require_finished(database)
        else:
            require_claim(database, keyring)
        yield keyring, Tenants(database)


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
    place = catalog_place(settings)
    if isinstance(place, Path) or settings.blobs_url is not None:
        blobs.sweep(older_than=0)  # else other replicas write to this folder too
    if isinstance(place, Path):
        if not place.exists():
            with translated("make the catalog"):
                _make(settings)
        Reserve(reserve_file(place)).fill()
    database = Database(place)
    try:
        if isinstance(place, Path):
            require_finished(database)
        else:
            _claim(settings, database, blobs)
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


def _claim(settings: Settings, database: Database, blobs: BlobStore) -> None:
    """Makes the catalog on PostgreSQL this service's, if it is nobody's, with a first key whose file exists before it
    is valid."""
    keyring, first_key = Keyring(database, settings.secret_file), bootstrap_file(settings.data_dir)

    def make(connection: sa.Connection) -> None:
        first_key.unlink(missing_ok=True)
        write_private(first_key, keyring.create_first(connection))

    with translated(f"write the first key to {first_key}"):
        claim(database, Claim(keyring.fingerprint, blobs.identity), None if settings.dev else make)
        if first_key.exists():
            try:
                keyring.verify(first_key.read_text().strip())
            except Unauthenticated:
                first_key.unlink()  # it was revoked, or its start failed and another replica made the first key


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
