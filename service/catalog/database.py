"""The catalog's database: how it is opened, migrated, and how its failures are told."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.errors import OutOfSpace, StorageFailed

_MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """A migrated SQLite file, used from many threads and processes; every write transaction is exclusive."""

    def __init__(self, path: Path) -> None:
        self._engine = sa.create_engine(f"sqlite+pysqlite:///{path}", connect_args={"timeout": 30})
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin)
        self._migrate(path)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that only reads.

        Raises:
            StorageFailed: the database refused.
        """
        with _translated(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that writes, durable when the block ends.

        Raises:
            OutOfSpace, StorageFailed: the database refused.
        """
        with _translated(), self._engine.connect() as plain:
            connection = plain.execution_options(writes=True)
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Give back every connection."""
        self._engine.dispose()

    def _migrate(self, path: Path) -> None:
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        with self.writing() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
            if found is not None and found not in known:
                raise StorageFailed(
                    f"the catalog {path} was written by a newer prefix-service (schema {found}): run that version, or "
                    "start with a copy made before the upgrade"
                )
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


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
    except DBAPIError as error:
        if "full" in str(error.orig):
            raise OutOfSpace("the catalog's disk is full") from error
        raise StorageFailed(f"the catalog refused: {type(error.orig).__name__}") from error
    except PoolTimeout as error:
        raise StorageFailed("the catalog has no free connection") from error
