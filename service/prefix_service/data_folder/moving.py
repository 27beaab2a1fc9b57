"""Moves a service to another catalog and another blob store while it runs: from a data folder to a fleet, and back.

Blobs are copied first, then all rows in one transaction. A run that is ended anywhere leaves blobs, which the next run
does not copy again, and either a catalog on which no service starts or that of the last complete run.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from prefix_service.blobs.port import BlobStore
from prefix_service.blobs.reading import PIECE
from prefix_service.catalog import copying
from prefix_service.catalog.access import lift_deadlines
from prefix_service.catalog.changes import catalog_id, revision_of
from prefix_service.catalog.claim import Claim, require_claim, require_finished
from prefix_service.catalog.database import Database
from prefix_service.catalog.keys import Keyring
from prefix_service.data_folder.backup import snapshot
from prefix_service.data_folder.opening import (
    blob_folder,
    blob_store,
    catalog_file,
    catalog_place,
    folder_locked,
    require_secret,
    shown_catalog,
)
from prefix_service.errors import Conflict, CorruptBlob, InvalidInput, NotFound
from prefix_service.settings import Settings
from prefix_service.system.disk import translated, write_private

_AT_ONCE: Final = 8  # blobs that are copied in parallel
_TOGETHER: Final = 1000  # blobs that wait for a thread: a failure ends the run after these
_LOCK: Final = 0x6D69_6772_6174_6500  # "migrate": any number that all processes agree on

Progress = Callable[[str, int, int], object]
"""Is called with what is copied now, `blobs` or `rows`, how many of them are done, and how many there are."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The result of a run: the catalog's id and revision, what was copied, and the `lost` digests.

    A digest is lost if the catalog names it, but its blob is missing or damaged in the source.
    """

    catalog: str
    revision: int
    blobs: int
    nbytes: int
    rows: copying.Rows
    lost: list[str]


def move(source: Settings, target: Settings, progress: Progress) -> Moved:
    """Makes the catalog and the blobs of `target` equal to those of `source`, which may be in use and is not changed.

    Every blob is verified as it is read, and once more after it is written. Blobs that the target has are not copied
    again. What the target has beyond them is left to its collector.

    Raises:
        Conflict: the target holds something else, was changed since the last run, or is in use: by a service on its
            folder, or by another run.
        InvalidInput: source and target are the same, or an extra is missing that a URL needs.
        NotFound: the source has no catalog, or no secret.
        OutOfSpace, StorageFailed, Unavailable: a disk, a database or a bucket refused.
    """
    source = source.model_copy(update={"read_only": True})
    _require_source(source)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefix-migrate-")))
        if _uses_folder(target):
            if _uses_folder(source) and target.data_dir.resolve() == source.data_dir.resolve():
                raise InvalidInput(f"{target.data_dir} is the data folder that is moved: name another")
            stack.enter_context(folder_locked(target))
        if target.catalog_url is None:
            _copy_secret(source, target)
        blobs = _target_blobs(target, scratch)
        if source.catalog_url is not None:
            stack.enter_context(_alone(source, read_only=True))
        database = stack.enter_context(_alone(target))
        claim = Claim(Keyring(database, source.secret_file).fingerprint, blobs.identity)
        copy = _BlobCopy(blob_store(source), blobs, progress, are_same=_share_blobs(source, target))
        with _reading(source, scratch) as rows:
            with _writing(database) as target_rows:
                copying.begin(rows, target_rows, claim)
            named = copying.named_blobs(rows)
        copy.add(named)
        # What changed meanwhile is little.
        with _reading(source, scratch) as rows:
            named = copying.named_blobs(rows)
            copy.add(named)
            written = _written(rows, database, None if target.catalog_url is None else claim, progress)
            # A collector of the target may have removed what its catalog did not name yet.
            copy.add(named)
            return Moved(catalog_id(rows), revision_of(rows), copy.blobs, copy.nbytes, written, sorted(copy.lost))


def _written(rows: sa.Connection, target: Database, claim: Claim | None, progress: Progress) -> copying.Rows:
    done, total = 0, copying.count_rows(rows)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("rows", done, total)

    with _writing(target) as target_rows:
        copying.require_earlier(rows, target_rows)
        found = copying.copy_rows(rows, target_rows, advance)
        copying.finish(rows, target_rows, claim)
    return found


def _require_source(settings: Settings) -> None:
    path = catalog_file(settings.data_dir)
    if settings.catalog_url is None and not path.exists():
        raise NotFound(f"{settings.data_dir} is not a data folder: it has no {path.name}")
    require_secret(settings.secret_file)


@contextlib.contextmanager
def _alone(settings: Settings, *, read_only: bool = False) -> Iterator[Database]:
    """Opens a catalog that no other run reads or writes until the block ends, nor this one a second time."""
    opened = contextlib.closing(Database(catalog_place(settings), read_only=read_only))
    with opened as database, database.alone(_LOCK) as is_alone:
        if not is_alone:
            raise Conflict(
                f"another `migrate` is at work on {shown_catalog(settings)}, or it is source and target in one: "
                "wait until the other has ended, or name another target"
            )
        yield database


def _uses_folder(settings: Settings) -> bool:
    return settings.catalog_url is None or settings.blobs_url is None


def _share_blobs(source: Settings, target: Settings) -> bool:
    """Returns whether both have one blob store, so that no blob is copied."""
    if source.blobs_url is None and target.blobs_url is None:
        return blob_folder(source.data_dir).resolve() == blob_folder(target.data_dir).resolve()
    return source.blobs_url == target.blobs_url


@contextlib.contextmanager
def _reading(settings: Settings, scratch: Path) -> Iterator[sa.Connection]:
    """Yields the rows of the source as they are at this moment.

    A reader of SQLite would keep its writers waiting, so its file is copied first.
    """
    if settings.catalog_url is None:
        place: Path | str = scratch / "catalog.sqlite"
        with translated(f"copy the catalog to {scratch}"):
            Path(place).unlink(missing_ok=True)
            snapshot(catalog_file(settings.data_dir), Path(place))
    else:
        place = catalog_place(settings)
    with contextlib.closing(Database(place, read_only=settings.catalog_url is not None)) as database:
        if isinstance(place, Path):
            require_finished(database)
        else:
            require_claim(database, Keyring(database, settings.secret_file), blob_store(settings).identity)
        with database.reading() as connection:
            lift_deadlines(connection)
            yield connection


@contextlib.contextmanager
def _writing(database: Database) -> Iterator[sa.Connection]:
    with database.writing() as connection:
        lift_deadlines(connection)
        yield connection


def _copy_secret(source: Settings, target: Settings) -> None:
    secret = source.secret_file.read_text().strip()
    with translated(f"write {target.secret_file}"):
        if not target.secret_file.exists():
            write_private(target.secret_file, secret)
        elif target.secret_file.read_text().strip() != secret:
            raise Conflict(f"{target.secret_file} is another secret than {source.secret_file}: name an empty folder")


def _target_blobs(settings: Settings, scratch: Path) -> BlobStore:
    """Returns the blob store of the target, without copies on this disk: reads verify what the bucket has."""
    if settings.blobs_url is not None:
        settings = settings.model_copy(update={"data_dir": scratch, "blob_cache_bytes": 0})
    blobs = blob_store(settings)
    blobs.check()
    return blobs


class _BlobCopy:
    """Copies blobs from one store to another; counts them and their bytes."""

    def __init__(self, source: BlobStore, target: BlobStore, progress: Progress, *, are_same: bool) -> None:
        self.blobs = self.nbytes = 0
        self.lost: set[str] = set()
        self._source, self._target, self._progress, self._are_same = source, target, progress, are_same

    def add(self, named: set[str]) -> None:
        """Copies those of the blobs that the target does not have."""
        if self._are_same:
            return
        self.lost.clear()
        there = {blob.digest for blob in self._target.listed()} & named
        missing = iter(sorted(named - there))
        done = len(there)
        with ThreadPoolExecutor(_AT_ONCE, "migrate") as threads:
            while some := list(islice(missing, _TOGETHER)):
                for digest, nbytes in zip(some, threads.map(self._copied, some), strict=True):
                    done += 1
                    self._progress("blobs", done, len(named))
                    if nbytes is None:
                        self.lost.add(digest)
                    else:
                        self.blobs, self.nbytes = self.blobs + 1, self.nbytes + nbytes

    def _copied(self, digest: str) -> int | None:
        """Copies a blob; returns its size, or None if the source has lost it."""
        try:
            file = self._source.open(digest)
        except (NotFound, CorruptBlob):
            return None
        with file:
            staged = self._target.stage()
            try:
                with translated(f"read blob {digest}"):
                    while piece := file.read(PIECE):
                        staged.write(piece)
                if staged.digest != digest:  # it changed since it was opened
                    return None
                staged.commit()
            finally:
                staged.discard()
        self._target.open(digest).close()
        return staged.size
