"""`catalog.copying` makes one catalog equal to another, also from SQLite to PostgreSQL and back."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from prefix_service.catalog.claim import Claim, require_claim
from prefix_service.catalog.copying import Rows, begin, copy_rows, finish, require_earlier
from prefix_service.catalog.database import Database
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import COMMAND_LINE, Quotas, Use
from prefix_service.catalog.schema import catalog, metadata, replicas
from prefix_service.catalog.sessions import Sessions
from prefix_service.catalog.tenants import Tenants
from prefix_service.catalog.usage import UsageStore
from prefix_service.errors import Conflict
from prefix_service.prefix.description import Description
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, Content, HoldingCatalog, remove_deleted
from tests.postgresql import PostgreSQL

HOUR = datetime.fromisoformat("2026-11-01T10:00:00")
OWNER = Claim("fingerprint", "s3://bucket/path@host")


@pytest.fixture(params=["to postgresql", "to sqlite"])
def both(
    request: pytest.FixtureRequest, tmp_path: Path, postgresql: PostgreSQL, template: str
) -> Iterator[tuple[Database, Database]]:
    """A catalog to copy, and an empty one of the other kind."""
    name = postgresql.new_database(template)
    found = [Database(tmp_path / "catalog.sqlite"), Database(postgresql.url(name))]
    yield (found[0], found[1]) if request.param == "to postgresql" else (found[1], found[0])
    for database in found:
        database.close()
    postgresql.drop(name)


def copied(both: tuple[Database, Database]) -> Rows:
    source, target = both
    with source.reading() as rows, target.writing() as written:
        begin(rows, written, OWNER)
    with source.reading() as rows, target.writing() as written:
        require_earlier(rows, written)
        found = copy_rows(rows, written, lambda _: None)
        finish(rows, written, OWNER)
    return found


def contents(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """Returns all rows of all tables, without fractions of seconds, which SQLite does not keep everywhere."""

    def plain(value: Any) -> Any:
        return value.replace(microsecond=0) if isinstance(value, datetime) else value

    with database.reading() as connection:
        tables = [table for table in metadata.sorted_tables if table is not replicas]
        found = {
            table.name: [tuple(map(plain, row)) for row in connection.execute(sa.select(table))] for table in tables
        }
        found["catalog"] = [tuple(connection.execute(sa.select(catalog.c.id, catalog.c.revision)).one())]
    return {name: sorted(rows, key=repr) for name, rows in found.items()}


def fill(database: Database, content: Content, secret: Path) -> None:
    tenants, adapters = Tenants(database), HoldingCatalog(database)
    for tenant in ("acme", "beta"):
        tenants.put(tenant, BY, Quotas(10, None, 5))
        for word in ("one", "two"):
            adapters.add_version(tenant, "a", content(word), BY)
        card = Description("# A card", {"author": "me"})
        adapters.add_version(tenant, "b", content("three"), BY, description=card)
        adapters.put_alias(tenant, "a", "prod", 2, BY)
    keyring = Keyring(database, secret)
    _, text = keyring.create("acme", "read", "a worker's", COMMAND_LINE)
    Sessions(database).begin(keyring.verify(text))
    UsageStore(database).add([Use(HOUR, "acme", "a", 1, "key", 3, 100, 1, 20)])


def test_a_copy_has_every_row(both: tuple[Database, Database], content: Content, secret: Path) -> None:
    """Of every table, under the same ids; a second copy has nothing to do."""
    source, target = both
    fill(source, content, secret)
    first = copied(both)
    found = contents(target)
    assert found == contents(source)
    assert first == Rows(sum(map(len, found.values())) - 1, 0, 0)
    assert copied(both) == Rows(0, 0, 0)


def test_a_copy_follows_what_changed(both: tuple[Database, Database], content: Content, secret: Path) -> None:
    """Names that others took since, versions and tenants that went, and what was added."""
    source, target = both
    fill(source, content, secret)
    copied(both)
    tenants, adapters = Tenants(source), HoldingCatalog(source)
    adapters.delete("acme", parse_reference("a"), BY)
    remove_deleted(source)
    adapters.add_version("acme", "c", content("four"), BY)  # SQLite gives it the id of the one that went
    adapters.add_version("acme", "a", content("five"), BY)
    tenants.delete("beta", BY)
    remove_deleted(source)
    tenants.put("gamma", BY, Quotas(None, None, None))
    tenants.put("beta", BY, Quotas(1, 1, 1))
    done = copied(both)
    assert contents(target) == contents(source)
    assert min(done.added, done.changed, done.removed) > 0


def test_a_copy_goes_on_counting(both: tuple[Database, Database], content: Content, secret: Path) -> None:
    """What is made in a copy takes ids, numbers and a revision after those that were copied."""
    source, target = both
    fill(source, content, secret)
    copied(both)
    assert HoldingCatalog(target).add_version("acme", "a", content("six"), BY)[0].number == 3
    Tenants(target).put("delta", BY)
    before, after = contents(source), contents(target)
    assert after["catalog"][0][1] > before["catalog"][0][1]
    for name in ("tenants", "versions", "audit", "changes"):
        assert len(after[name]) > len(before[name])


def test_a_copy_that_was_changed_is_left_alone(both: tuple[Database, Database], content: Content, secret: Path) -> None:
    """It is refused, whichever of the two has more changes; so is the catalog of another service."""
    source, target = both
    fill(source, content, secret)
    copied(both)
    Tenants(target).put("mine", BY)
    kept = contents(target)
    with pytest.raises(Conflict, match="changes that the source does not have"):
        copied(both)
    for name in ("its", "more"):
        Tenants(source).put(name, BY)
    with pytest.raises(Conflict, match="changes that the source does not have"):
        copied(both)
    assert contents(target) == kept
    with target.writing() as connection:
        connection.execute(sa.update(catalog).values(id="another"))
    with pytest.raises(Conflict, match="holds the catalog another"):
        copied(both)


def test_what_cannot_be_compared_is_left_alone(both: tuple[Database, Database], content: Content, secret: Path) -> None:
    """A source that no longer keeps the changes up to the copy cannot tell whether the copy has others."""
    source, _ = both
    fill(source, content, secret)
    copied(both)
    with source.writing() as connection:
        connection.execute(sa.delete(metadata.tables["changes"]))
    with pytest.raises(Conflict, match="PREFIX_CHANGES_DAYS"):
        copied(both)


def test_no_service_takes_an_unfinished_copy(both: tuple[Database, Database], content: Content, secret: Path) -> None:
    """Before the rows are there, and whoever asks; the next copy completes it."""
    source, target = both
    fill(source, content, secret)
    with source.reading() as rows, target.writing() as written:
        begin(rows, written, OWNER)
    with pytest.raises(Conflict, match="has not come to its end"):
        require_claim(target, Keyring(target, secret))
    copied(both)
    assert contents(target) == contents(source)


def test_a_nul_is_replaced(both: tuple[Database, Database], secret: Path) -> None:
    """PostgreSQL cannot hold it, and older releases let it into the names of keys in SQLite."""
    source, target = both
    if source._apart is None:
        Keyring(source, secret).create(None, "admin", "a_b", COMMAND_LINE)
        with source.writing() as connection:
            connection.execute(sa.text("UPDATE keys SET name = replace(name, '_', char(0))"))
        copied(both)
        with target.reading() as connection:
            assert connection.scalar(sa.select(metadata.tables["keys"].c.name)) == "a\ufffdb"
        assert copied(both) == Rows(0, 0, 0)
