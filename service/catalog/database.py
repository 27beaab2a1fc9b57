"""The catalog's database: how it is opened, migrated, and how its failures are told."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.catalog.records import Principal
from service.disk import make_private, translated
from service.errors import InvalidRequest, OutOfSpace, StorageFailed

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_MIGRATION_LOCK: Final = 0x7072_6566_6978  # "prefix": any number that all processes agree on
_PRECISE: Final = "%Y-%m-%d %H:%M:%f"

Insert: TypeAlias = sqlite.Insert | postgresql.Insert


class Database:
    """A migrated database, used from many threads and processes: SQLite in a file, or PostgreSQL at a URL
    (`postgresql+psycopg://…`). On SQLite every write transaction is exclusive; on PostgreSQL writers lock the row of
    the tenant whose things they change."""

    def __init__(self, place: Path | str) -> None:
        self._engine = _sqlite(place) if isinstance(place, Path) else _postgresql(place)
        self._reads = self._engine
        self._after_writes: list[Callable[[], object]] = []
        if self._engine.dialect.name == "postgresql":
            self._reads = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        try:
            self._migrate(place)
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that only reads, and sees the database as it is at one moment.

        Raises:
            InvalidRequest: a value that the database cannot hold.
            StorageFailed: the database refused.
        """
        with _translated(), self._reads.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self, by: Principal | None = None) -> Iterator[sa.Connection]:
        """A transaction that writes, durable when the block ends; then what was given to `afterwards` is called, and
        what was given to `after_writes`. `by` is who was given the transaction (`authority.writing_for`); without it
        nothing can be recorded in the audit.

        Raises:
            InvalidRequest: a value that the database cannot hold.
            OutOfSpace, StorageFailed: the database refused.
        """
        calls: list[Callable[[], object]] = []
        with _translated(), self._engine.connect() as plain:
            connection = plain.execution_options(writes=True, afterwards=calls, by=by)
            with connection.begin():
                yield connection
        for call in (*calls, *self._after_writes):
            call()

    def after_writes(self, call: Callable[[], object]) -> None:
        """Call this after every write transaction of this process that is durable, before its writer goes on."""
        self._after_writes.append(call)

    @contextlib.contextmanager
    def glancing(self) -> Iterator[Callable[[], bool]]:
        """Whether anyone may have written since the last call of what is given; it belongs to one thread. On SQLite
        that is one statement without a transaction (`PRAGMA data_version`), elsewhere always so.

        Raises:
            StorageFailed: the database refused.
        """
        if self._engine.dialect.name != "sqlite":
            yield lambda: True
            return
        with _translated(), contextlib.closing(self._engine.raw_connection()) as pooled:
            driver: Any = pooled.driver_connection
            last: int | None = None

            def may_have_changed() -> bool:
                nonlocal last
                try:
                    found: int = driver.execute("PRAGMA data_version").fetchone()[0]
                except driver.Error as error:
                    raise StorageFailed(f"the catalog refused: {type(error).__name__}") from error
                changed, last = found != last, found
                return changed

            yield may_have_changed

    def close(self) -> None:
        """Give back every connection."""
        self._engine.dispose()

    def _migrate(self, place: Path | str) -> None:
        known = {path.name.partition("_")[0] for path in (_MIGRATIONS / "versions").glob("[0-9]*.py")}
        with self.reading() as connection:
            if _revision(connection) == max(known):
                return
        # Only who migrates waits for its import, a tenth of a second.
        from alembic import command
        from alembic.config import Config

        with self.writing() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            found = _revision(connection)
            if found is not None and found not in known:
                name = place if isinstance(place, Path) else sa.make_url(place).set(query={}).render_as_string()
                raise StorageFailed(
                    f"the catalog {name} was written by a newer prefix-service (schema {found}): run that version, or "
                    "start with a copy made before the upgrade"
                )
            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(_MIGRATIONS))
            command.upgrade(config, "head")


def _revision(connection: sa.Connection) -> str | None:
    """Where Alembic notes the schema's revision; none in an empty database."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return found


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


def _sqlite(path: Path) -> sa.Engine:
    if not path.exists():
        # SQLite takes the mode of a file that is there, for its journal too.
        with translated(f"make the catalog {path}"):
            make_private(path)
    engine = sa.create_engine(f"sqlite+pysqlite:///{path}", connect_args={"timeout": 30})
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    return engine


def _postgresql(url: str) -> sa.Engine:
    # The ping is a round trip; without it a restarted server would fail the first request of each idle process.
    return sa.create_engine(url, connect_args={"options": "-c timezone=utc"}, pool_pre_ping=True)


def _configure(connection: Any, _record: Any) -> None:
    # pysqlite would begin transactions by itself, and too late; `_begin` does.
    connection.isolation_level = None
    # Not WAL: before SQLite 3.51.3 it has a corruption bug, and Python often carries an older one.
    for pragma in ("journal_mode=TRUNCATE", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        # PostgreSQL's text holds no NUL.
        raise InvalidRequest(f"the catalog cannot hold this: {error.orig}") from error
    except DBAPIError as error:
        if "disk is full" in str(error.orig) or getattr(error.orig, "sqlstate", None) == "53100":
            raise OutOfSpace("the catalog's disk is full") from error
        raise StorageFailed(f"the catalog refused: {type(error.orig).__name__}") from error
    except PoolTimeout as error:
        raise StorageFailed("the catalog has no free connection") from error
