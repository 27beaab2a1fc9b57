"""`catalog.database`: transactions, settings, and the errors that a failing database becomes."""

import re
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

import prefix_service.catalog
from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.database import Database, now
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.records import NewVersion
from prefix_service.catalog.schema import tenants
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import InvalidRequest, OutOfSpace, StorageFailed
from tests.catalog.conftest import BY, HoldingCatalog, on_postgresql, on_sqlite
from tests.postgresql import PostgreSQL


@on_sqlite
@pytest.mark.parametrize(("name", "value"), [("journal_mode", "truncate"), ("synchronous", 2), ("foreign_keys", 1)])
def test_settings_are_on_in_every_connection(database: Database, name: str, value: object) -> None:
    """Every connection of every thread is durable without WAL, and enforces foreign keys."""
    barrier = threading.Barrier(4)

    def look() -> object:
        with database.reading() as connection:
            barrier.wait(60)  # four connections are open at once
            return connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()

    with ThreadPoolExecutor(4) as pool:
        assert [future.result() for future in [pool.submit(look) for _ in range(4)]] == [value] * 4


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """A file that is no database is refused and not overwritten."""
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(b"not a database, but quite long enough to be read as one" * 100)
    before = path.read_bytes()
    with pytest.raises(StorageFailed, match="the catalog refused: DatabaseError"):
        Database(path)
    assert path.read_bytes() == before


def write(database: Database, *statements: str, error: Exception | None = None) -> None:
    """Runs one transaction, which may fail at its end."""
    with database.writing() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
        if error is not None:
            raise error


def test_a_block_that_fails_leaves_nothing(database: Database) -> None:
    """A transaction that fails leaves nothing, not even the tables that it made."""
    with pytest.raises(KeyError):
        write(database, "INSERT INTO tenants (name) VALUES ('acme')", "CREATE TABLE t (x integer)", error=KeyError())
    with database.reading() as connection:
        assert connection.scalars(sa.select(tenants.c.name)).all() == []
        assert "t" not in sa.inspect(connection).get_table_names()


@on_sqlite
def test_writers_wait_for_each_other(database: Database) -> None:
    """Threads that read and then write in one transaction lose no update."""
    with database.writing() as connection:
        connection.exec_driver_sql("CREATE TABLE counter AS SELECT 0 AS n")

    def count(_: int) -> None:
        with database.writing() as connection:
            n = connection.exec_driver_sql("SELECT n FROM counter").scalar_one()
            connection.execute(sa.text("UPDATE counter SET n = :n"), {"n": n + 1})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(40)))
    with database.reading() as connection:
        assert connection.exec_driver_sql("SELECT n FROM counter").scalar_one() == 40


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (sqlite3.OperationalError("database or disk is full"), OutOfSpace),
        (sqlite3.OperationalError("disk I/O error"), StorageFailed),
        (sqlite3.OperationalError("database is locked"), StorageFailed),
        (sqlite3.DatabaseError("database disk image is malformed"), StorageFailed),
    ],
    ids=lambda value: str(value) if isinstance(value, Exception) else "",
)
def test_failures_are_told_in_this_projects_words(
    database: Database, error: sqlite3.Error, wanted: type[Exception]
) -> None:
    """The error of a failed statement has neither the statement nor its values."""
    with pytest.raises(wanted) as caught:
        write(database, error=sa.exc.DBAPIError.instance("SELECT secret", {}, error, sqlite3.Error))
    assert "secret" not in str(caught.value)


@on_sqlite
def test_a_full_disk_is_out_of_space(database: Database) -> None:
    """A file that may not grow, by a limit on SQLite's pages, is OutOfSpace."""
    with pytest.raises(OutOfSpace, match="the catalog's disk is full"):
        write(database, "PRAGMA max_page_count = 1", "CREATE TABLE big AS SELECT zeroblob(10000000) AS x")
    with database.reading() as connection:
        assert "big" not in sa.inspect(connection).get_table_names()


def test_no_free_connection(database: Database) -> None:
    """An exhausted pool of connections is StorageFailed."""
    with pytest.raises(StorageFailed, match="the catalog has no free connection"):
        write(database, error=sa.exc.TimeoutError())


def test_a_reader_sees_one_moment(database: Database) -> None:
    """A reader does not see what is committed after it began; on SQLite the writer waits for it."""
    with ThreadPoolExecutor(1) as pool:
        with database.reading() as connection:
            assert connection.scalars(sa.select(tenants.c.name)).all() == []
            writer = pool.submit(write, database, "INSERT INTO tenants (name) VALUES ('acme')")
            wait([writer], 0.5)
            assert connection.scalars(sa.select(tenants.c.name)).all() == []
        writer.result(30)
    with database.reading() as connection:
        assert connection.scalars(sa.select(tenants.c.name)).all() == ["acme"]


def test_times_are_in_utc(database: Database) -> None:
    """The database notes times in UTC, and reports its own clock in UTC, whatever the server's time zone is."""
    write(database, "INSERT INTO tenants (name) VALUES ('acme')")
    with database.reading() as connection:
        created = connection.scalar(sa.select(tenants.c.created))
        present = now(connection)
    for moment in (created, present):
        assert moment is not None
        assert moment.tzinfo is None
        assert abs(moment.replace(tzinfo=UTC) - datetime.now(UTC)) < timedelta(seconds=10)


def test_only_the_databases_time_is_compared() -> None:
    """No module of the catalog reads this process's clock; monotonic clocks are allowed."""
    sources = {path: path.read_text() for path in Path(prefix_service.catalog.__path__[0]).rglob("*.py")}
    asks = re.compile(r"\b(datetime\.(utc)?now|today|time\.time|from time)\b")
    assert [path.name for path, source in sources.items() if asks.search(source)] == []


@pytest.mark.parametrize(
    "call",
    [
        lambda database, text: Tenants(database).put(text, BY),
        lambda database, text: Listings(database).adapters("acme", after=None, limit=1, base_model=text),
        lambda database, text: HoldingCatalog(database).add_version(
            "acme", "a", new(base_model=text), BY, make_tenant=True
        ),
        lambda database, text: AuditLog(database).add(BY, "looked.at", None, text),
        lambda database, text: executed_together(database, text),
    ],
    ids=["tenant", "filter", "base model", "audit", "several rows"],
)
def test_text_with_nul_is_the_callers_error(database: Database, call: Callable[[Database, str], object]) -> None:
    """Text with NUL is InvalidRequest in a row and in a query, also on SQLite, which could hold it."""
    with pytest.raises(InvalidRequest, match=r"the catalog cannot hold this: .* cannot contain NUL"):
        call(database, "a\0b")


def executed_together(database: Database, text: str) -> None:
    with database.writing() as connection:
        connection.execute(sa.insert(tenants), [{"name": "acme"}, {"name": text}])


def new(base_model: str) -> NewVersion:
    return NewVersion("d", "{}", base_model, "w", 1, "bfloat16", "kv", 1)


@on_postgresql
def test_a_full_disk_of_the_server_is_out_of_space(database: Database) -> None:
    """PostgreSQL's error code for a full disk is OutOfSpace, whatever language the server speaks."""
    with pytest.raises(OutOfSpace, match="the catalog's disk is full"):
        write(database, "DO $$ BEGIN RAISE 'kein Platz' USING ERRCODE = 'disk_full'; END $$")


@on_postgresql
def test_a_connection_that_breaks(database: Database) -> None:
    """A transaction on a broken connection is StorageFailed and leaves nothing; the next transaction works."""
    broken = ("INSERT INTO tenants (name) VALUES ('acme')", "SELECT pg_terminate_backend(pg_backend_pid())")
    with pytest.raises(StorageFailed, match="the catalog's server is shutting down"):
        write(database, *broken)
    Tenants(database).put("beta", BY)
    assert [tenant.name for tenant in Tenants(database).listed("", 9)] == ["beta"]


@on_postgresql
def test_a_server_that_is_away(database: Database, postgresql: PostgreSQL) -> None:
    """Every call is StorageFailed while the server is stopped; once it is back, the first call works, and nothing is
    lost."""
    room = Tenants(database)
    assert room.put("acme", BY)
    with ThreadPoolExecutor(4) as pool:  # several connections, all of them stale
        list(pool.map(room.require, ["acme"] * 8))
    with postgresql.away():
        for call in (room.require, lambda name: room.put(name, BY)):
            with pytest.raises(StorageFailed, match="the catalog cannot be reached"):
                call("acme")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(room.require, ["acme"] * 8))


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    """Opening a catalog on a missing server raises an error without the password."""
    url = f"postgresql+psycopg://someone:hunter2@/db?host={tmp_path}"
    with pytest.raises(StorageFailed) as told:
        Database(url)
    assert str(told.value).startswith("the catalog postgresql+psycopg://someone@/db cannot be used: connection ")
    assert "hunter2" not in str(told.value)


@on_postgresql
def test_names_are_ordered_by_their_bytes(database: Database) -> None:
    """Names come in byte order, although the server's own collation differs."""
    names = ["a-c", "a.b", "a0", "a_b", "ab"]
    for name in reversed(names):
        Tenants(database).put(name, BY)
    assert [tenant.name for tenant in Tenants(database).listed("", 9)] == names
    with database.reading() as connection:
        by_language = sa.text('SELECT name::text COLLATE "default" FROM tenants ORDER BY 1')
        assert connection.scalars(by_language).all() != names
