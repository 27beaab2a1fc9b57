"""`catalog.migrations`: migrations make the schema that the code expects, and newer catalogs are refused."""

import json
import multiprocessing
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import Script, ScriptDirectory

from prefix_service.catalog import migrations
from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.changes import Change, VersionPublished, catalog_id, revision_of
from prefix_service.catalog.database import Database
from prefix_service.catalog.descriptions import Descriptions
from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.records import Principal
from prefix_service.catalog.schema import metadata
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import StorageFailed
from prefix_service.prefix.description import Description
from prefix_service.prefix.references import parse_qualified
from tests.catalog.conftest import BY, Content, HoldingCatalog, Place, on_sqlite

FOLDER_0001 = Path(__file__).parents[1] / "data" / "folder-0001"
"""A data folder as release 0001 left it, and what it told of itself."""


FOLDER_0002 = FOLDER_0001.with_name("folder-0002")


def plain(place: Place) -> sa.Engine:
    """Opens the database with SQLAlchemy alone, without this project's settings."""
    return sa.create_engine(f"sqlite+pysqlite:///{place}" if isinstance(place, Path) else place)


def execute(place: Place, *statements: str) -> None:
    engine = plain(place)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def contents(place: Place) -> dict[str, list[tuple[object, ...]]]:
    """Returns every table with its rows."""
    engine = plain(place)
    with engine.connect() as connection:
        tables = sa.MetaData()
        tables.reflect(connection)
        found = {
            name: [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key))]
            for name, table in tables.tables.items()
        }
    engine.dispose()
    return found


def differences(connection: sa.Connection) -> list[Any]:
    """Returns the differences between the tables that migrations made and those of the code. SQLite does not report the
    directions of an index's columns: `test_plans` checks that one."""
    unread = "ix_adapters_tenant_id_used_name" if connection.dialect.name == "sqlite" else None
    chosen = {"include_object": lambda _object, name, *_: name != unread}
    return list(compare_metadata(MigrationContext.configure(connection, opts=chosen), metadata))


@pytest.fixture
def old(place: Place, tmp_path: Path) -> Place:
    """Yields the catalog of an old release; on PostgreSQL its rows, in the tables that the migration of that release
    makes."""
    shutil.copy(FOLDER_0001 / "catalog.sqlite", tmp_path / "old.sqlite")
    if isinstance(place, Path):
        return tmp_path / "old.sqlite"
    execute(place, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    at_revision(place, "0001")
    _copy(tmp_path / "old.sqlite", place)
    return place


def _copy(source: Path, target: Place) -> None:
    tables = sa.MetaData()
    reading, writing = plain(source), plain(target)
    tables.reflect(writing)
    with reading.connect() as old, writing.begin() as new:
        new.execute(sa.delete(tables.tables["alembic_version"]))
        for table in tables.sorted_tables:
            for row in old.execute(sa.select(table)).mappings():
                new.execute(sa.insert(table), dict(row))
            if "id" in table.c and isinstance(table.c.id.type, sa.Integer):
                sequence = sa.func.pg_get_serial_sequence(table.name, "id")
                new.execute(sa.select(sa.func.setval(sequence, sa.func.max(table.c.id))))
    reading.dispose()
    writing.dispose()


def test_migrations_make_the_schema(database: Database) -> None:
    """The tables that migrations make are the tables of the code."""
    with database.reading() as connection:
        assert differences(connection) == []


def test_a_migration_is_named_after_its_revision() -> None:
    """The names of the files are their revisions, so that a catalog is known to be current before Alembic is
    imported."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__path__[0])))
    found = [
        Path(script.path).name.partition("_")[0] for script in ScriptDirectory.from_config(config).walk_revisions()
    ]
    assert found == [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert found == sorted(found, reverse=True)


def test_alembic_is_imported_by_who_migrates_alone(tmp_path: Path) -> None:
    """Opening a current catalog does not import Alembic."""
    Database(tmp_path / "catalog.sqlite").close()
    opening = (
        "import sys; from pathlib import Path; from prefix_service.catalog.database import Database; "
        f"Database(Path({str(tmp_path / 'catalog.sqlite')!r})).close(); print('alembic' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", opening], check=True, capture_output=True, text=True)
    assert told.stdout.strip() == "False"


def test_constraints_have_their_names(database: Database) -> None:
    """Constraints are named by the naming convention, which later migrations need and compare_metadata does not
    check."""

    def names(connection: sa.Connection) -> dict[str, set[str | None]]:
        look = sa.inspect(connection)
        return {
            table: {found["name"] for found in (*look.get_unique_constraints(table), *look.get_foreign_keys(table))}
            | {found["name"] for found in look.get_indexes(table) if not found["unique"]}
            for table in metadata.tables
        }

    made = sa.create_engine("sqlite://")
    metadata.create_all(made)
    with made.connect() as expected, database.reading() as found:
        assert names(found) == names(expected)
    made.dispose()


def test_opening_again_keeps_everything(place: Place) -> None:
    """Opening a migrated database again changes nothing."""
    first = Database(place)
    Tenants(first).put("acme", BY)
    first.close()
    before = contents(place)
    Database(place).close()
    assert contents(place) == before


@pytest.fixture
def migrated(old: Place) -> Iterator[Database]:
    database = Database(old)
    yield database
    database.close()


def test_an_older_catalog_comes_along(migrated: Database) -> None:
    """A migrated catalog has every version with its digests, every alias and every key."""
    told = json.loads((FOLDER_0001 / "told.json").read_text())
    with migrated.reading() as connection:
        assert differences(connection) == []
    catalog = HoldingCatalog(migrated)
    for name, digests in told["versions"].items():
        version = catalog.resolve(*parse_qualified(name))
        assert {field: getattr(version, field) for field in digests} == digests
    assert catalog.aliases_of("acme", "summarize") == {"prod": 1}
    caller = Keyring(migrated, FOLDER_0001 / "key.secret").verify(told["key"])
    assert caller == Principal(told["key"].split("_")[1], "acme", "write", Tenants(migrated).require("acme"))


def test_an_older_catalog_goes_on(migrated: Database, content: Content) -> None:
    """In a migrated catalog numbers go on counting, known content is the same version, and usage counts it."""
    catalog, tenants = HoldingCatalog(migrated), Tenants(migrated)
    known = catalog.resolve(*parse_qualified("acme/summarize@1"))
    assert catalog.find("acme", "summarize", known.digest, known.nbytes, BY) == known
    usage = tenants.get("acme")
    assert (usage.adapters, usage.bytes) == (
        1,
        sum(one.nbytes for one in Listings(migrated).versions("acme", "summarize", before=None, limit=9)),
    )
    assert catalog.add_version("acme", "summarize", content("x"), BY)[0].number == 3
    assert catalog.add_version("gamma", "a", content("x"), BY, make_tenant=True)[0].number == 1


def test_where_aliases_pointed_comes_from_the_audit(place: Place, content: Content) -> None:
    """The previous version of an alias comes from its latest move in the audit; an alias or a tenant that was made
    again has none."""
    database = Database(place)
    catalog, tenants = HoldingCatalog(database), Tenants(database)
    for tenant in ("acme", "again"):
        for text in ("x", "y"):
            catalog.add_version(tenant, "a", content(text), BY, make_tenant=True)
        for number in (1, 2):
            catalog.put_alias(tenant, "a", "prod", number, BY)
        if tenant == "again":
            tenants.delete(tenant, BY)
            catalog.add_version(tenant, "a", content("x"), BY, make_tenant=True)
            catalog.add_version(tenant, "a", content("y"), BY)
            catalog.put_alias(tenant, "a", "prod", 4, BY)
    catalog.put_alias("acme", "a", "gone", 1, BY)
    catalog.put_alias("acme", "a", "gone", 2, BY)
    catalog.delete_alias("acme", "a", "gone", BY)
    catalog.put_alias("acme", "a", "gone", 1, BY)
    database.close()
    execute(place, "ALTER TABLE aliases DROP COLUMN previous")
    engine = plain(place)
    with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
        _script("0008").module.upgrade()
    engine.dispose()
    database = Database(place)
    catalog = HoldingCatalog(database)
    assert catalog.alias("acme", "a", "prod") == (2, 1)
    assert catalog.alias("acme", "a", "gone") == (1, None)
    assert catalog.alias("again", "a", "prod") == (4, None)
    database.close()


def _script(revision: str) -> Script:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__path__[0])))
    found = ScriptDirectory.from_config(config).get_revision(revision)
    assert found is not None
    return found


def test_an_older_catalog_gets_an_id_and_a_first_revision(migrated: Database, old: Place, content: Content) -> None:
    """Migration gives a catalog an id and its first revision, which it keeps when it is opened again."""
    with migrated.reading() as connection:
        found = catalog_id(connection)
        assert re.fullmatch(r"[0-9a-f]{32}", found)
        assert revision_of(connection) == 0
    feed, heard = ChangeFeed(migrated), list[Change]()
    feed.listen(heard.extend)
    version, _ = HoldingCatalog(migrated).add_version("acme", "summarize", content("x"), BY)
    assert heard == [VersionPublished("acme", "summarize", version.number, version.digest)]
    again = Database(old)
    with again.reading() as connection:
        assert (catalog_id(connection), revision_of(connection)) == (found, 1)
    again.close()


@on_sqlite
def test_totals_are_counted_from_what_was_there(place: Place, tmp_path: Path) -> None:
    """Migration counts the bytes of weights, keys, values and manifests of a folder with several tenants, and marks
    nothing as deleted."""
    shutil.copy(FOLDER_0002 / "catalog.sqlite", tmp_path / "older.sqlite")
    migrated = Database(tmp_path / "older.sqlite")
    tenants, listings = Tenants(migrated), Listings(migrated)
    found = tenants.listed("", 99)
    assert len(found) > 1
    for tenant in found:
        there = listings.adapters(tenant.name, after=None, limit=99)
        versions = {
            one.latest.adapter: listings.versions(tenant.name, one.latest.adapter, before=None, limit=99)
            for one in there
        }
        assert [one.versions for one in there] == [len(some) for some in versions.values()]
        assert tenant.adapters == len(there)
        assert tenant.bytes == sum(version.nbytes for some in versions.values() for version in some)
    assert any(tenant.bytes for tenant in found)
    migrated.close()


def at_revision(place: Place, revision: str) -> None:
    """Makes the tables that an older release left, in an empty database."""
    engine = plain(place)
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(Path(migrations.__path__[0])))
        command.upgrade(config, revision)
    engine.dispose()


def test_0005_counts_uses_and_names_keys(place: Place) -> None:
    """Migration 0005 counts uses from the hours that are kept, names keys by the keys and the audit, and keeps
    descriptions."""
    if isinstance(place, str):
        execute(place, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    at_revision(place, "0004")
    audited = "INSERT INTO audit (tenant_id, tenant, actor, key_id, action, target, details) VALUES (1, 'acme', "
    used = "INSERT INTO usage (hour, tenant_id, adapter, version, key_id, requests, bytes, cold_loads, prefix_tokens) "
    execute(
        place,
        "INSERT INTO tenants (id, name, adapters, bytes) VALUES (1, 'acme', 2, 7)",
        "INSERT INTO adapters (id, tenant_id, name, versions, bytes) VALUES (1, 1, 'a', 1, 7), (2, 1, 'b', 1, 0)",
        "INSERT INTO versions (id, adapter_id, number, digest, manifest, weights, weights_bytes, weights_dtype, "
        "key_values, key_values_bytes) VALUES (1, 1, 1, 'd', '{}', 'w', 1, 'float32', 'k', 1)",
        """INSERT INTO descriptions VALUES (1, 'card', '{"a": "b"}', 6)""",
        "INSERT INTO keys (id, tenant_id, scope, name, hash) VALUES ('k1', 1, 'admin', 'ci', 'h')",
        audited + """'platform', 'dev', 'key.created', 'k2', '{"scope": "write", "name": "gone"}')""",
        audited + "'acme', 'k1', 'x', 'y', '{}')",
        audited + "'acme', 'k2', 'x', 'y', '{}')",
        used + "VALUES ('2026-11-26 04:00:00', 1, 'a', 1, 'k1', 3, 0, 0, 0)",
        used + "VALUES ('2026-11-26 05:00:00', 1, 'a', 1, 'k2', 4, 0, 0, 0)",
        used + "VALUES ('2026-11-26 05:00:00', 1, '', 0, '', 9, 0, 0, 0)",
    )
    database = Database(place)
    found = Listings(database).adapters("acme", after=None, limit=9, order="-created")
    entries = AuditLog(database).listed("acme", before=None, limit=9)
    described = Descriptions(database).get(HoldingCatalog(database).resolve(*parse_qualified("acme/a@1")))
    database.close()
    assert [(one.latest.adapter, one.used) for one in found] == [("a", 7)]
    assert [entry.key_name for entry in entries] == ["gone", "ci", None]
    assert described == Description("card", {"a": "b"})


def test_a_newer_database_is_refused(place: Place) -> None:
    """A newer catalog is refused and left as it was; the message says what to do, without a password."""
    Database(place).close()
    execute(place, "UPDATE alembic_version SET version_num = '9999'")
    execute(place, "UPDATE catalog SET usable_since = '9998'")
    before = contents(place)
    secret = place
    if isinstance(place, str):
        secret = place.replace("postgres@", "postgres:hunter2@") + "&password=hunter2"
    with pytest.raises(
        StorageFailed, match=r"written by a newer prefix-service \(schema 9999\): run that vers"
    ) as told:
        Database(secret)
    assert "hunter2" not in str(told.value)
    assert contents(place) == before


def test_a_newer_database_that_only_has_more_is_used(place: Place) -> None:
    """On PostgreSQL, whose replicas are upgraded one after another; a folder of a newer service is refused."""
    Database(place).close()
    execute(place, "ALTER TABLE garbage ADD COLUMN later TEXT")
    execute(place, "UPDATE alembic_version SET version_num = '9999'")
    before = contents(place)
    if isinstance(place, str):
        for read_only in (False, True):
            database = Database(place, read_only=read_only)
            HoldingCatalog(database).check()
            database.close()
    else:
        with pytest.raises(StorageFailed, match="newer prefix-service"):
            Database(place)
    assert contents(place) == before


@pytest.mark.parametrize(
    "obstacle", ["garbage", "audit", "descriptions", "usage", "catalog", "changes", "freed", "sessions", "replicas"]
)
def test_a_migration_that_fails_changes_nothing(old: Place, obstacle: str) -> None:
    """A migration that fails leaves nothing, on SQLite too; once the obstacle is gone it succeeds."""
    execute(old, f"CREATE TABLE {obstacle} (x integer primary key)")
    before = contents(old)
    with pytest.raises(StorageFailed, match=f'the catalog (refused|.* cannot be used: relation "{obstacle}")'):
        Database(old)
    assert contents(old) == before
    execute(old, f"DROP TABLE {obstacle}")
    Database(old).close()
    assert contents(old)["alembic_version"] != before["alembic_version"]


def migrate(place: Place, barrier: Barrier) -> None:
    """Opens the catalog, as a process that starts does."""
    barrier.wait(180)
    Database(place).close()


def migrate_at_once(place: Place) -> None:
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(2, mp_context=spawn) as pool:
        barrier = manager.Barrier(2)
        for future in [pool.submit(migrate, place, barrier) for _ in range(2)]:
            future.result(180)


def test_two_who_start_at_once(old: Place) -> None:
    """Of two processes that open an old catalog in parallel one migrates it, and the other waits."""
    migrate_at_once(old)
    assert "audit" in contents(old)


def test_two_who_start_at_once_on_an_empty_database(place: Place) -> None:
    """Two processes can open an empty database in parallel."""
    if isinstance(place, str):
        execute(place, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    migrate_at_once(place)
    assert contents(place)["tenants"] == []
