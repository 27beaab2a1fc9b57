"""`service.catalog.database`: transactions, settings, refusals, and failures in this project's words."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.catalog.database import Database
from service.catalog.schema import tenants
from service.errors import OutOfSpace, StorageFailed
from tests.catalog.conftest import on_sqlite


@on_sqlite
@pytest.mark.parametrize(("name", "value"), [("journal_mode", "truncate"), ("synchronous", 2), ("foreign_keys", 1)])
def test_settings_are_on_in_every_connection(database: Database, name: str, value: object) -> None:
    """Durable without WAL, and with foreign keys, also in the connections that threads open."""
    barrier = threading.Barrier(4)

    def look() -> object:
        with database.reading() as connection:
            barrier.wait(10)  # four connections are open at once
            return connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()

    with ThreadPoolExecutor(4) as pool:
        assert [future.result() for future in [pool.submit(look) for _ in range(4)]] == [value] * 4


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """And not overwritten."""
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(b"not a database, but quite long enough to be read as one" * 100)
    before = path.read_bytes()
    with pytest.raises(StorageFailed, match="the catalog refused: DatabaseError"):
        Database(path)
    assert path.read_bytes() == before


def write(database: Database, *statements: str, error: Exception | None = None) -> None:
    """One transaction, which may fail in the end."""
    with database.writing() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
        if error is not None:
            raise error


def test_a_block_that_fails_leaves_nothing(database: Database) -> None:
    """A transaction is all or nothing, tables too."""
    with pytest.raises(KeyError):
        write(database, "INSERT INTO tenants (name) VALUES ('acme')", "CREATE TABLE t (x integer)", error=KeyError())
    with database.reading() as connection:
        assert connection.scalars(sa.select(tenants.c.name)).all() == []
        assert "t" not in sa.inspect(connection).get_table_names()


@on_sqlite
def test_writers_wait_for_each_other(database: Database) -> None:
    """Read, then write, in one exclusive transaction: no update is lost between threads."""
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
    """Without the statement and its values."""
    with pytest.raises(wanted) as caught:
        write(database, error=sa.exc.DBAPIError.instance("SELECT secret", {}, error, sqlite3.Error))
    assert "secret" not in str(caught.value)


@on_sqlite
def test_a_full_disk_is_out_of_space(database: Database) -> None:
    """SQLite's own word for it, brought about by a limit on the file's pages."""
    with pytest.raises(OutOfSpace, match="the catalog's disk is full"):
        write(database, "PRAGMA max_page_count = 1", "CREATE TABLE big AS SELECT zeroblob(10000000) AS x")
    with database.reading() as connection:
        assert "big" not in sa.inspect(connection).get_table_names()


def test_no_free_connection(database: Database) -> None:
    """The pool's own failure is told too."""
    with pytest.raises(StorageFailed, match="the catalog has no free connection"):
        write(database, error=sa.exc.TimeoutError())
