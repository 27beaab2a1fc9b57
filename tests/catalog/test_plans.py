"""Every query of the catalog uses an index, whatever the number of adapters and tenants."""

from collections.abc import Iterator
from datetime import datetime

import pytest
from sqlalchemy import event

from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database
from prefix_service.catalog.descriptions import Descriptions
from prefix_service.catalog.garbage import Garbage
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.records import AdapterOrder, AdapterPlace, AuditFilter, Quotas, Use, VersionName
from prefix_service.catalog.retention import expire_audit
from prefix_service.catalog.schema import metadata
from prefix_service.catalog.tenants import Tenants
from prefix_service.catalog.usage import UsageStore
from prefix_service.prefix.description import Description
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, Content, on_sqlite, remove_deleted

Asked = list[tuple[str, tuple[object, ...]]]


@pytest.fixture
def asked(database: Database) -> Iterator[Asked]:
    """Yields a list that gets every statement that is run, with its values."""
    statements: Asked = []

    def note(_connection: object, _cursor: object, statement: str, values: tuple[object, ...], *_: object) -> None:
        statements.append((statement, values))

    event.listen(database._reads.engine, "before_cursor_execute", note)
    yield statements
    event.remove(database._reads.engine, "before_cursor_execute", note)


def plan(database: Database, asked: Asked) -> list[str]:
    """Returns the steps that SQLite plans for all statements."""
    statements = [one for one in asked if not one[0].startswith("BEGIN")]
    with database.reading() as connection:
        return [
            step
            for statement, values in statements
            for *_, step in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)
        ]


@on_sqlite
def test_no_table_is_read_whole(
    database: Database,
    catalog: Catalog,
    listings: Listings,
    descriptions: Descriptions,
    tenants: Tenants,
    audit: AuditLog,
    garbage: Garbage,
    keyring: Keyring,
    content: Content,
    asked: Asked,
) -> None:
    """No query of reading, publishing, moving, deleting, counting or listing scans a table; `named` alone may."""
    usage = UsageStore(database)
    tenants.put("acme", BY, Quotas(9, 10**9))
    for word in "xy":
        catalog.find("acme", "a", content(word).digest, 1, BY)
        catalog.add_version("acme", "a", content(word), BY, make_tenant=True)
    catalog.put_alias("acme", "a", "prod", 1, BY)
    described = catalog.add_version("acme", "a", content("z"), BY, description=Description("card"))[0]
    descriptions.change(described, BY, "card", lambda _: Description("another card"))
    descriptions.get(described)
    catalog.delete("acme", parse_reference("a@3"), BY)
    for reference in ("a", "a@1", "a@prod", f"a@{content('x').digest}"):
        catalog.resolve("acme", parse_reference(reference))
    for before in (None, 2):
        listings.versions("acme", "a", before=before, limit=9)
    listings.numbers("acme", "a", 9)
    orders: dict[AdapterOrder, AdapterPlace] = {
        "name": AdapterPlace(None, "A"),
        "-created": AdapterPlace(datetime(2099, 1, 1), "A"),  # noqa: DTZ001 - as the catalog has it, in UTC
        "-bytes": AdapterPlace(10**9, "A"),
        "-used": AdapterPlace(0, "A"),
    }
    for order, place in orders.items():
        for after in (None, place):
            found = listings.adapters("acme", after=after, limit=9, order=order, search="a", base_model="gpt2")
            assert found == listings.adapters("acme", after=after, limit=9, order=order) != []
    for tenant in (None, "acme"):
        for name in (None, VersionName("acme", "a", 1, "")):
            listings.index(tenant, after=name, limit=9)
    usage.add([Use(datetime(2026, 1, 1), "acme", "a", 1, "k", requests=1)])  # noqa: DTZ001 - as the catalog has it
    usage.unread([VersionName("acme", "a", 1, "")], 7)
    usage.read_hours(VersionName("acme", "a", 1, ""))
    audit.of_version(VersionName("acme", "a", 1, ""), 9)
    key, text = keyring.create("acme", "read", "", BY)
    keyring.verify(text)
    keyring.listed("acme")
    keyring.listed("acme", after=(key.created, key.id), limit=9)
    keyring.revoke("acme", key.id, BY)
    tenants.get("acme")
    tenants.listed("a", 9)
    tenants.requests_per_second("acme")
    audit.listed("acme", before=9, limit=9)
    audit.listed(None, before=9, limit=9)
    for tenant in ("acme", None):
        audit.listed(tenant, before=9, limit=9, wanted=AuditFilter("alias.moved", "a", hides_platform=True))
    garbage.wanted([content("x").weights], 0)
    catalog.delete("acme", parse_reference("a@2"), BY)
    catalog.delete("acme", parse_reference("a"), BY)
    tenants.delete("acme", BY)
    remove_deleted(database)
    garbage.forget(garbage.expired(0))
    expire_audit(database, 1)
    assert {step.split()[1] for step in plan(database, asked) if step.startswith("SCAN")} & set(
        metadata.tables
    ) == set()


@on_sqlite
def test_reads_of_a_version_are_found_an_hour_at_a_time(database: Database, asked: Asked) -> None:
    """Whatever else its tenant used in an hour is not looked at, and nothing is sorted."""
    usage, version = UsageStore(database), VersionName("acme", "a", 1, "")
    asked.clear()
    usage.unread([version], 7)
    usage.read_hours(version)
    steps = plan(database, [one for one in asked if "usage" in one[0]])
    found = [step.partition("(")[2] for step in steps if " usage " in f"{step} "]
    assert found == ["hour=? AND tenant_id=? AND adapter=? AND version=?)"] * 4
    assert not [step for step in steps if "TEMP B-TREE" in step]


@on_sqlite
def test_deleted_bytes_are_counted_without_a_look_at_those_of_others(
    database: Database, tenants: Tenants, asked: Asked
) -> None:
    """A tenant is shown, and publishes, as fast as before while another has 100,000 deleted adapters to be removed."""
    tenants.put("acme", BY, Quotas(max_bytes=9))
    tenants.get("acme")
    steps = [step for step in plan(database, asked) if " adapters " in step]
    assert steps == ["SEARCH adapters USING INDEX ix_adapters_hidden (tenant_id=?)"]


@on_sqlite
def test_the_most_used_are_read_in_the_order_of_an_index(
    database: Database, catalog: Catalog, listings: Listings, content: Content, asked: Asked
) -> None:
    """A page by use reads its own adapters from an index: none are sorted, and none before its place are read."""
    catalog.add_version("acme", "a", content("x"), BY, make_tenant=True)
    asked.clear()
    for after in (None, AdapterPlace(7, "a")):
        listings.adapters("acme", after=after, limit=9, order="-used")
    pages = [one for one in asked if "adapters.used" in one[0] and "LIMIT" in one[0]]
    steps = plan(database, pages)
    assert [step.partition("(")[2] for step in steps if "ix_adapters_tenant_id_used_name" in step] == [
        "tenant_id=?)",
        "tenant_id=? AND used=? AND name>?)",
        "tenant_id=? AND used<?)",
    ]
    assert not [step for step in steps if "TEMP B-TREE" in step]
