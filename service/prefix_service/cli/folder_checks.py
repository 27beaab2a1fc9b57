"""Checks of this machine's data folder: problems that would keep a service from working on it."""

import contextlib
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

from prefix_service.errors import PrefixServiceError
from prefix_service.system.disk import LEAST_FREE_BYTES
from prefix_service.system.sizes import human_bytes

_LITTLE_SPACE: Final = 1 << 30
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_SECRET: Final = ("key.secret", "bootstrap.key")
_OF_NETWORKS: Final = ("nfs", "cifs", "smb", "9p", "ceph", "glusterfs", "fuse.sshfs")
_MOUNTS: Final = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Check:
    """A finding of `doctor`, and advice unless it is good. `failed` means that this machine cannot fetch prefixes."""

    name: str
    state: Literal["ok", "warning", "failed"]
    found: str
    advice: str = ""


def folder_checks(folder: Path, uid: int, catalog_url: str | None = None) -> Iterator[Check]:
    """The checks of a data folder on which user `uid` may want to run a service, and of its catalog; of the disk alone
    where the folder is not there, for a worker needs none."""
    if catalog_url is not None:
        yield _server(catalog_url)
    yield _disk(folder if folder.is_dir() else Path.cwd())
    if not folder.is_dir():
        yield Check("permissions", "ok", f"there is no data folder {folder} here, and a worker needs none")
        return
    yield _permissions(folder, uid)
    if catalog_url is None:
        yield _schema(folder)


def _disk(folder: Path) -> Check:
    free, kind = shutil.disk_usage(folder).free, _file_system(folder)
    found = f"{human_bytes(free)} free in {folder.resolve()}"
    advice = "make room, or put the data folder on another disk with PREFIX_DATA_DIR"
    if free < LEAST_FREE_BYTES:
        return Check("disk", "failed", found, advice)
    if free < _LITTLE_SPACE:
        return Check("disk", "warning", found, advice)
    if kind.startswith(_OF_NETWORKS):
        advice = (
            "one machine at a time may run a service on it, and only where SQLite's locks work: better a local disk"
        )
        return Check("disk", "warning", f"{found}, which is on a network ({kind})", advice)
    return Check("disk", "ok", found)


def _file_system(folder: Path) -> str:
    """Returns the kind of file system that a folder is on; nothing where the system does not say."""
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return ""
    # Each line: id, parent, device, root, mount point, options, …, "-", kind, source, options.
    mounts = {Path(line.split()[4].replace("\\040", " ")): line.partition(" - ")[2].split()[0] for line in lines}
    place = folder.resolve()
    return next((mounts[path] for path in (place, *place.parents) if path in mounts), "")


def _permissions(folder: Path, uid: int) -> Check:
    """Checks that the user can run a service on the folder, and that others cannot read its secrets."""
    found = folder.stat()
    if found.st_uid != uid:
        whose = f"{folder} belongs to user {found.st_uid}, and this is user {uid}"
        advice = f"run `prefix-service serve` as user {found.st_uid} on this folder"
        return Check("permissions", "warning", whose, advice)
    if found.st_mode & stat.S_IRWXU != stat.S_IRWXU:
        closed = f"{folder} is closed to its owner (mode {stat.S_IMODE(found.st_mode):o})"
        return Check("permissions", "warning", closed, f"chmod u=rwx {folder}, or serve it with --read-only")
    entries = sorted(folder.iterdir())
    strangers = [path for path in entries if path.lstat().st_uid != uid]
    if strangers:
        whose = f"{strangers[0]} belongs to user {strangers[0].lstat().st_uid}: a command ran as that user"
        return Check("permissions", "warning", whose, f"chown -R {uid} {folder}")
    # A folder with the sticky bit is shared on purpose.
    secret = [path for path in entries if path.name in _SECRET]
    secret += [] if found.st_mode & stat.S_ISVTX else [folder]
    open_ones = [str(path) for path in sorted(secret) if path.stat().st_mode & _OTHERS]
    if open_ones:
        others = f"others may use {', '.join(open_ones)}"
        return Check("permissions", "warning", others, f"chmod go= {' '.join(open_ones)}")
    return Check("permissions", "ok", f"{folder} is this user's alone")


def _server(url: str) -> Check:
    """Checks that a catalog's server answers, and that this release can serve what it holds."""
    from prefix_service.catalog.database import schema_of

    try:
        found, newest = schema_of(url)
    except PrefixServiceError as error:
        return Check("catalog", "failed", str(error), "correct PREFIX_CATALOG_URL, or look after that server")
    if found is None:
        return Check("catalog", "ok", "PostgreSQL answers; its database is empty, and the first start fills it")
    if found > newest:
        wrote = f"a newer prefix-service wrote this catalog (schema {found}, and this one knows {newest})"
        return Check("catalog", "warning", wrote, "update prefix-service on this machine")
    return Check("catalog", "ok", f"PostgreSQL answers, with schema {found}")


def _schema(folder: Path) -> Check:
    """Checks that this release can serve a folder that an older or newer one wrote."""
    catalog = folder / "catalog.sqlite"
    if not catalog.exists():
        return Check("catalog", "ok", "none yet: the first start makes it")
    versions = (files("prefix_service.catalog") / "migrations" / "versions").iterdir()
    newest = max(path.name.partition("_")[0] for path in versions if path.name[0].isdigit())
    try:
        with contextlib.closing(sqlite3.connect(f"{catalog.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            (found,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except (sqlite3.Error, TypeError) as error:
        advice = "restore a backup, or look at who may read the folder"
        return Check("catalog", "warning", f"{catalog} cannot be read: {error}", advice)
    if found > newest:
        wrote = f"a newer prefix-service wrote {catalog} (schema {found}, and this one knows {newest})"
        return Check("catalog", "warning", wrote, "update prefix-service on this machine")
    return Check("catalog", "ok", f"schema {found}" + ("" if found == newest else f", which `serve` makes {newest}"))
