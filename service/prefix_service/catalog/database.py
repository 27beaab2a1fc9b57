"""The catalog's database: opening, migration, transactions, and translation of its failures."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Final, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from prefix_service.catalog.access import (
    PATIENT,
    PROMPT,
    Access,
    Patience,
    apart_of,
    can_try_again,
    engine_of,
    explained,
    lift_deadlines,
    translated,
)
from prefix_service.catalog.changes import Change, Stored, store
from prefix_service.catalog.glances import Glances, glances_of
from prefix_service.catalog.records import Principal
from prefix_service.catalog.schema import catalog
from prefix_service.catalog.url import shown
from prefix_service.errors import ReadOnly, StorageFailed
from prefix_service.system.reserve import Reserve, reserve_file

log = logging.getLogger("prefix_service")

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_MIGRATION_LOCK: Final = 0x7072_6566_6978  # "prefix": any number that all processes agree on
_ENDING: Final = 2.0  # seconds that a server has to notice a lost connection, and to end its transaction
_PAUSE: Final = 0.02  # seconds between two questions whether it has ended
_PRECISE: Final = "%Y-%m-%d %H:%M:%f"

Insert: TypeAlias = sqlite.Insert | postgresql.Insert


class Database:
    """A migrated database, used from many threads and processes: SQLite in a file, or PostgreSQL at a URL
    (`postgresql+psycopg://…`). On SQLite every write transaction is exclusive; on PostgreSQL writers lock the row of
    the tenant whose things they change.

    A transaction that fails after a long wait makes those of the next second fail immediately, so callers do not queue
    for a database that is locked or away. At most `READERS` readers can hang in it.

    With `read_only` a SQLite file is opened for reading alone: it may lie on a read-only mount, and a service that
    writes may use it at the same time.
    """

    def __init__(self, place: Path | str, patience: Patience = PATIENT, *, read_only: bool = False) -> None:
        self._reads = Access(engine_of(place, patience, writes=False, read_only=read_only), patience.reads)
        self._writes = Access(engine_of(place, patience, writes=True, read_only=read_only), patience.writes)
        self._reserve = Reserve(reserve_file(place)) if isinstance(place, Path) else None
        self._apart = None if isinstance(place, Path) else apart_of(place, patience)
        self._read_only = read_only
        self._after_writes: list[Callable[[int, list[Change]], object]] = []
        try:
            self._migrate(place)
        except StorageFailed as error:
            self.close()
            raise (error if isinstance(place, Path) else explained(error, place)) from error.__cause__
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that only reads, and sees the database as it is at one moment.

        Raises:
            InvalidRequest: a value that the database cannot hold.
            StorageFailed: the database refused, or did not answer in time.
        """
        try:
            with self._reads.connected() as connection, connection.begin():
                yield connection
        except StorageFailed as error:
            error.is_undone |= can_try_again(error)
            raise

    @contextlib.contextmanager
    def writing(self, by: Principal | None = None, *, frees: bool = False) -> Iterator[sa.Connection]:
        """A transaction that writes, durable when the block ends, with the changes that were announced in it; then what
        was given to `afterwards` is called, and what was given to `after_writes`. `by` is who was given the transaction
        (`authority.writing_for`); without it nothing can be recorded in the audit. One that `frees` space may use the
        reserve while the disk is full.

        Raises:
            InvalidRequest: a value that the database cannot hold.
            OutOfSpace, StorageFailed: the database refused, or did not answer in time.
            ReadOnly: the database is opened for reading alone.
        """
        if self._read_only:
            raise ReadOnly("this service is read-only (--read-only): send changes to the one that writes")
        calls: list[Callable[[], object]] = []
        announced: list[tuple[int | None, Change]] = []
        stored: Stored | None = None
        is_ending = False
        try:
            with contextlib.ExitStack() as stack:
                plain = stack.enter_context(self._writes.connected())
                if frees and self._reserve is not None:
                    stack.enter_context(self._reserve.lent())
                connection = plain.execution_options(afterwards=calls, by=by, announced=announced)
                stack.enter_context(connection.begin())
                yield connection
                stored = store(connection, announced)
                is_ending = True
        except StorageFailed as error:
            if not is_ending:
                error.is_undone |= can_try_again(error)
                raise
            self._require_committed(stored, error)
        for call in calls:
            call()
        if stored is not None:
            for follow in self._after_writes:
                follow(stored.revision, [change for _, change in announced])

    def _require_committed(self, stored: Stored | None, failure: StorageFailed) -> None:
        """Returns if a transaction was committed whose reply got lost: PostgreSQL remembers how its transactions ended.

        Raises:
            StorageFailed: the failure; `is_undone` says that the transaction was not committed.
        """
        if stored is None or stored.transaction is None:
            raise failure
        try:
            status = self._status_of(stored.transaction)
        except StorageFailed:
            status = None
        if status != "committed":
            failure.is_undone = status == "aborted"
            raise failure

    def _status_of(self, transaction: str) -> str | None:
        """Returns how a transaction of PostgreSQL ended: "committed", "aborted", "in progress", or None for one of long
        ago. A server needs a moment to notice a lost connection, so one in progress is asked for again, for up to
        `_ENDING` seconds.

        Raises:
            StorageFailed: the database refused, or did not answer in time.
        """
        query = sa.text("SELECT pg_xact_status(CAST(:id AS xid8))")
        until = time.monotonic() + _ENDING
        while True:
            with self._reads.connected() as connection, connection.begin():
                status: str | None = connection.execute(query, {"id": transaction}).scalar_one()
            if status != "in progress" or time.monotonic() >= until:
                return status
            time.sleep(_PAUSE)

    def after_writes(self, call: Callable[[int, list[Change]], object]) -> None:
        """Call this with the changes of every write transaction of this process that is durable, and the revision of
        the last of them, before its writer goes on."""
        self._after_writes.append(call)

    @contextlib.contextmanager
    def glancing(self) -> Iterator[Glances]:
        """Yields looks at whether anything may have changed; they belong to one thread, and have a connection of their
        own.

        Raises:
            StorageFailed: the database refused.
        """
        with translated(), (self._apart or self._reads.engine).connect() as connection:
            yield glances_of(connection)

    @contextlib.contextmanager
    def alone(self, lock: int) -> Iterator[bool]:
        """Yields whether no other process is in a block of this lock, a number; until the block ends, none can enter
        one. A SQLite file has one process that asks.

        A process that loses its connection to PostgreSQL loses the lock, too, and does not notice.

        Raises:
            StorageFailed: the database refused.
        """
        if self._apart is None:
            yield True
            return
        with translated(), self._apart.connect() as connection:  # the lock ends with the connection
            yield connection.execute(sa.select(sa.func.pg_try_advisory_lock(lock))).scalar_one()

    def close(self) -> None:
        """Give back every connection."""
        self._reads.engine.dispose()
        self._writes.engine.dispose()

    def _migrate(self, place: Path | str) -> None:
        known = _known()
        with self.reading() as connection:
            found = _revision(connection)
            if found == max(known) or _is_newer_and_usable(connection, found, known):
                return
        _require_known(found, known, place)
        if self._read_only:
            name = place if isinstance(place, Path) else shown(place)
            raise StorageFailed(
                f"the catalog {name} has an older schema ({found}), and this service is read-only: start one without "
                "--read-only on it, which migrates it"
            )
        # Only who migrates waits for its import, a tenth of a second.
        from alembic import command
        from alembic.config import Config

        with self.writing() as connection:
            lift_deadlines(connection)
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            found = _revision(connection)  # another process may have migrated it meanwhile
            if not _is_newer_and_usable(connection, found, known):
                _require_known(found, known, place)
                config = Config(attributes={"connection": connection})
                config.set_main_option("script_location", str(_MIGRATIONS))
                command.upgrade(config, "head")
        # SQLite's PRAGMAs would describe the old schema, and PostgreSQL's connection has no deadline any more. A pool's
        # first connection is made under a lock: let it be now.
        self._reads.engine.dispose()
        self._writes.engine.dispose()
        self._reads.engine.connect().close()


def _known() -> set[str]:
    return {path.name.partition("_")[0] for path in (_MIGRATIONS / "versions").glob("[0-9]*.py")}


def _is_newer_and_usable(connection: sa.Connection, found: str | None, known: set[str]) -> bool:
    """Returns whether a newer release has migrated the catalog in a way that this release need not know: while a fleet
    is upgraded, both serve it. A SQLite file has one service."""
    if found is None or found in known or connection.dialect.name != "postgresql":
        return False
    if connection.scalar(sa.select(catalog.c.usable_since)) not in known:
        return False
    log.warning("the catalog was migrated by a newer release, which this one can work beside", extra={"schema": found})
    return True


def _require_known(found: str | None, known: set[str], place: Path | str) -> None:
    if found is not None and found not in known:
        name = place if isinstance(place, Path) else shown(place)
        raise StorageFailed(
            f"the catalog {name} was written by a newer prefix-service (schema {found}): run that version, or "
            "start with a copy made before the upgrade"
        )


def _revision(connection: sa.Connection) -> str | None:
    """Returns the schema's revision from Alembic's table; None for an empty database."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return found


def schema_of(url: str) -> tuple[str | None, str]:
    """Returns the revision of a PostgreSQL database's schema, None if it is empty, and the newest that this release
    knows. Nothing is changed.

    Raises:
        InvalidInput: psycopg is missing.
        StorageFailed: the database refused, or did not answer in time.
    """
    access = Access(engine_of(url, PROMPT, writes=False, read_only=True), PROMPT.reads)
    try:
        with access.connected() as connection:
            return _revision(connection), max(_known())
    except StorageFailed as error:
        raise explained(error, url) from error.__cause__
    finally:
        access.engine.dispose()


def afterwards(connection: sa.Connection, call: Callable[[], object]) -> None:
    """Call this once the write transaction is durable; never, if it fails."""
    connection.get_execution_options()["afterwards"].append(call)


def insert(connection: sa.Connection, table: sa.Table) -> Insert:
    """An INSERT that knows ON CONFLICT, in the words of this database."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


def now(connection: sa.Connection) -> datetime:
    """The database's time, naive and in UTC: the only clock that is compared with stored times."""
    if connection.dialect.name == "sqlite":  # its CURRENT_TIMESTAMP has whole seconds
        return datetime.fromisoformat(connection.execute(sa.select(sa.func.strftime(_PRECISE, "now"))).scalar_one())
    moment: datetime = connection.execute(sa.select(sa.func.now())).scalar_one()
    return moment.replace(tzinfo=None)
