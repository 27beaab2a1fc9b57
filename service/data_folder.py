"""The data folder of an embedded service: who may use it, and what a first start puts there."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from service.blobs import FolderBlobStore
from service.catalog.database import Database
from service.catalog.garbage import Garbage
from service.catalog.keys import Keyring
from service.catalog.records import COMMAND_LINE
from service.catalog.tenants import Tenants
from service.collector import Collector, collecting
from service.disk import sync_folder, translated, write_private
from service.errors import Conflict
from service.settings import Settings


def catalog_file(data_dir: Path) -> Path:
    """The catalog's SQLite file."""
    return data_dir / "catalog.sqlite"


def blob_folder(data_dir: Path) -> Path:
    """Where the blobs are."""
    return data_dir / "blobs"


def bootstrap_file(data_dir: Path) -> Path:
    """Where a first start writes the platform admin's key."""
    return data_dir / "bootstrap.key"


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[int]:
    """Keep the folder for one service: lock, migrate, make the first key, and collect garbage meanwhile.

    Yields the lock's file descriptor. The lock holds until every process that inherited the descriptor has ended.

    Raises:
        Conflict: another service runs on it.
        StorageFailed, OutOfSpace: the disk refused.
    """
    data_dir = settings.data_dir
    with translated(f"use the data folder {data_dir}"):
        data_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"another prefix-service runs on the data folder {data_dir}: stop it first") from error
        with _prepared(settings):
            yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def keys_of(settings: Settings) -> Iterator[tuple[Keyring, Tenants]]:
    """The keyring and the tenants of a folder, whether or not a service runs on it.

    Raises:
        StorageFailed, OutOfSpace: the disk refused.
    """
    with translated(f"use the data folder {settings.data_dir}"):
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    database = Database(catalog_file(settings.data_dir))
    try:
        yield Keyring(database, settings.secret_file), Tenants(database)
    finally:
        database.close()


@contextlib.contextmanager
def _prepared(settings: Settings) -> Iterator[None]:
    blobs = FolderBlobStore(blob_folder(settings.data_dir))
    blobs.sweep(older_than=0)
    if not catalog_file(settings.data_dir).exists():
        with translated("make the catalog"):
            _make(settings)
    database = Database(catalog_file(settings.data_dir))
    try:
        with collecting(Collector(Garbage(database), blobs, settings.garbage_grace), settings.garbage_grace):
            yield
    finally:
        database.close()


def _make(settings: Settings) -> None:
    """A first start: the catalog appears with the first key in it, whose file is there already, or not at all. Where
    the command line makes a key meanwhile, its catalog stays, and that key is the first."""
    place, first_key = catalog_file(settings.data_dir), bootstrap_file(settings.data_dir)
    aside = place.with_name(f"{place.name}.new")
    for left in (aside, first_key):
        left.unlink(missing_ok=True)  # of a first start that was cut short: no catalog knows this key
    database = Database(aside)
    try:
        if not settings.dev:
            _, text = Keyring(database, settings.secret_file).create(None, "admin", "bootstrap", COMMAND_LINE)
            write_private(first_key, text)
    finally:
        database.close()
    try:
        os.link(aside, place)
    except FileExistsError:
        first_key.unlink(missing_ok=True)
    for left in (aside, aside.with_name(f"{aside.name}-journal")):
        left.unlink(missing_ok=True)
    sync_folder(settings.data_dir)
