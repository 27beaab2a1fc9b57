"""Connections to the catalog's database: how they are made, how long a transaction waits for one, and what is said when
it fails."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DataError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from prefix_service.catalog.url import shown
from prefix_service.errors import InvalidInput, InvalidRequest, OutOfSpace, StorageFailed
from prefix_service.system.disk import make_private
from prefix_service.system.disk import translated as translated_files


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds that a transaction waits for the locks of other processes; a reader waits as long for a connection, and a
    writer for its `turn` among those of this process."""

    reads: float
    writes: float
    turn: float


PATIENT: Final = Patience(reads=30, writes=30, turn=30)
"""For commands, migrations and background work, which have nobody waiting for an answer."""
PROMPT: Final = Patience(reads=1, writes=2, turn=5)
"""For requests: an answer that says "not now" is better than none."""

READERS: Final = 8
"""Transactions that read a SQLite file at a time, and that a hanging disk can keep."""

# One reader more than requests may have: `glancing` keeps it. On PostgreSQL, where connections are dear, a process has
# five, and one apart from these.
_READERS: Final = {"sqlite": READERS + 1, "postgresql": 3}
_WRITERS: Final = {"sqlite": 1, "postgresql": 2}
_REFUSING: Final = 1.0  # seconds

_REASONS: Final = {
    "25006": "the catalog's server accepts no changes now, as a standby does",
    "53300": "the catalog's server has no free connection",
    "55P03": "the catalog is locked by another transaction",
    "57014": "the catalog has not answered in time",
    "57P01": "the catalog's server is shutting down",
    "57P02": "the catalog's server is shutting down",
    "57P03": "the catalog's server is starting or shutting down",
}
"""What is said of errors of PostgreSQL, by their SQLSTATE."""

_UNDONE: Final = {"40001", "40P01", "57P01", "57P02"}
"""SQLSTATEs of transactions that are undone, and that may succeed if they are tried again immediately."""


def engine_of(place: Path | str, patience: Patience, *, writes: bool, read_only: bool) -> sa.Engine:
    """Make the engine for the transactions that write, or for those that only read."""
    if isinstance(place, Path):
        return _sqlite(place, patience, writes=writes, read_only=read_only)
    return _postgresql(place, patience, writes=writes and not read_only)


def _sqlite(path: Path, patience: Patience, *, writes: bool, read_only: bool) -> sa.Engine:
    query = {"uri": "true", "mode": "ro"} if read_only else {"uri": "true"}
    url = sa.URL.create("sqlite+pysqlite", database=path.absolute().as_uri(), query=query)
    locks = patience.writes if writes else patience.reads
    if writes and not read_only and not path.exists():
        # SQLite takes the mode of a file that is there, for its journal too.
        with translated_files(f"make the catalog {path}"):
            make_private(path)
    engine = sa.create_engine(url, connect_args={"timeout": locks}, **_pool("sqlite", patience, writes=writes))
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin_writing if writes else _begin_reading)
    event.listen(engine, "before_cursor_execute", _refuse_nul)
    return engine


def _postgresql(url: str, patience: Patience, *, writes: bool) -> sa.Engine:
    # The ping is a round trip; without it a restarted server would fail the first request of each idle process.
    pool = _pool("postgresql", patience, writes=writes) | {"pool_pre_ping": True}
    if writes:
        # A deletion may take longer than others wait for its locks.
        return _engine(url, statements=2 * patience.writes, locks=patience.writes, **pool)
    # A statement that takes this long has no reader any more.
    made = _engine(url, statements=patience.reads, locks=patience.reads, **pool)
    return made.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def apart_of(url: str, patience: Patience) -> sa.Engine:
    """Make the engine of PostgreSQL's connections that are kept for long, outside of transactions."""
    engine = _engine(url, statements=patience.reads, locks=patience.reads, poolclass=sa.NullPool)
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def lift_deadlines(connection: sa.Connection) -> None:
    """Lets the statements of a transaction take as long as they need; SQLite's have no deadline."""
    if connection.dialect.name == "postgresql":
        from prefix_service.catalog.postgres import unbounded

        unbounded(connection)


def _engine(url: str, **options: Any) -> sa.Engine:
    try:
        from prefix_service.catalog.postgres import engine
    except ModuleNotFoundError as error:
        if error.name != "psycopg":
            raise
        raise InvalidInput("a catalog on PostgreSQL needs psycopg: pip install 'prefix-service[fleet]'") from error
    return engine(url, **options)


def _pool(dialect: str, patience: Patience, *, writes: bool) -> dict[str, Any]:
    size, seconds = (_WRITERS[dialect], patience.turn) if writes else (_READERS[dialect], patience.reads)
    return {"poolclass": sa.QueuePool, "pool_size": size, "max_overflow": 0, "pool_timeout": seconds}


def _configure(connection: Any, _record: Any) -> None:
    # pysqlite would begin transactions by itself, and too late; the listeners of "begin" do.
    connection.isolation_level = None
    # Not WAL: before SQLite 3.51.3 it has a corruption bug, and Python often carries an older one.
    for pragma in ("journal_mode=TRUNCATE", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_reading(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _begin_writing(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _refuse_nul(
    _connection: sa.Connection, _cursor: Any, _statement: str, parameters: Any, _context: Any, is_many: bool
) -> None:
    """Refuses text with a NUL, which PostgreSQL cannot hold, in a row and in a query: both catalogs answer alike, and
    what one holds can move to the other.

    Raises:
        InvalidRequest: there is one.
    """
    for row in parameters if is_many else (parameters,):
        if any(isinstance(value, str) and "\0" in value for value in row):
            raise InvalidRequest("the catalog cannot hold this: text cannot contain NUL (0x00) characters")


class Access:
    """The connections for one kind of transaction, and whether they are worth waiting for."""

    def __init__(self, engine: sa.Engine, patience: float) -> None:
        self.engine = engine
        self._patience = patience
        self._refusal = ""
        self._refusing_until = 0.0

    @contextlib.contextmanager
    def connected(self) -> Iterator[sa.Connection]:
        """Lend a connection, and translate failures of the block; one that took long is repeated to all callers of the
        next second, and to those who wait, unless another try may succeed immediately.

        Raises:
            InvalidRequest, OutOfSpace, StorageFailed: as `Database.writing`.
        """
        began = time.monotonic()
        self._require_worth(began)
        try:
            with translated(), self.engine.connect() as connection:
                self._require_worth(time.monotonic())
                yield connection
        except StorageFailed as error:
            ended = time.monotonic()
            if ended - began >= self._patience / 2 and not can_try_again(error):
                self._refusal, self._refusing_until = error.message, ended + _REFUSING
            raise

    def _require_worth(self, now: float) -> None:
        if now < self._refusing_until:
            raise StorageFailed(self._refusal)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn what the database says into this project's errors.

    Raises:
        InvalidRequest, OutOfSpace, StorageFailed: as `Database.writing`.
    """
    try:
        yield
    except DataError as error:
        # PostgreSQL's text holds no NUL.
        raise InvalidRequest(f"the catalog cannot hold this: {error.orig}") from error
    except DBAPIError as error:
        if "disk is full" in str(error.orig) or getattr(error.orig, "sqlstate", None) == "53100":
            raise OutOfSpace("the catalog's disk is full") from error
        raise refused(error.orig) from error
    except PoolTimeout as error:
        raise StorageFailed("the catalog has no free connection: it is busy, or does not answer") from error


def refused(error: BaseException | None) -> StorageFailed:
    """Say what a driver said, without the values that its text may hold."""
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        return StorageFailed("the catalog is locked, by another process or by a write that its disk holds up")
    if getattr(error, "sqlite_errorname", "") == "SQLITE_READONLY_ROLLBACK":
        return StorageFailed(
            "a crash cut a change of the catalog short: start a service without --read-only on it once, which undoes it"
        )
    state = getattr(error, "sqlstate", "")
    if state is None:  # of psycopg, and not from the server
        return StorageFailed("the catalog cannot be reached")
    return StorageFailed(_REASONS.get(state, f"the catalog refused: {type(error).__name__}"))


def can_try_again(failure: StorageFailed) -> bool:
    """Returns whether a transaction that failed before its commit is worth another try immediately."""
    cause = failure.__cause__
    if not isinstance(cause, DBAPIError):
        return False
    state = getattr(cause.orig, "sqlstate", "")
    # One that waited in vain would wait again.
    return state in _UNDONE or (cause.connection_invalidated and type(cause.orig).__name__ != "NoAnswer")


def explained(failure: StorageFailed, url: str) -> StorageFailed:
    """Returns the failure to open a catalog at a URL with all that the driver said, for who starts the service. The
    driver's words hold no password; should they ever, it is taken out."""
    cause = failure.__cause__
    if not isinstance(cause, DBAPIError):
        return failure
    text = " ".join(str(cause.orig).split())
    parts = sa.make_url(url)
    for secret in (parts.password, parts.query.get("password")):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "***")
    return StorageFailed(f"the catalog {shown(url)} cannot be used: {text}")
