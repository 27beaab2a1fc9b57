"""`catalog.audit`: each change is noted in one row and one log line; calls that change nothing are not noted."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from prefix_service.catalog.audit import AuditLog, record
from prefix_service.catalog.authority import writing_for
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import COMMAND_LINE, AuditEntry, AuditFilter, Principal, Quotas, VersionName
from prefix_service.catalog.schema import garbage, metadata
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import (
    Conflict,
    NotFound,
    PreconditionFailed,
    PrefixServiceError,
    QuotaExceeded,
    StorageFailed,
)
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, Content, on_sqlite


@pytest.fixture(autouse=True)
def acme(tenants: Tenants, catalog: Catalog, content: Content) -> None:
    """Makes a tenant with two versions of an adapter, the first one behind an alias."""
    tenants.put("acme", BY, Quotas(max_bytes=330))
    for word in "xy":
        catalog.add_version("acme", "a", content(word), BY)
    catalog.put_alias("acme", "a", "prod", 1, BY)


@pytest.fixture
def own(keyring: Keyring) -> Principal:
    """Returns a key of the tenant."""
    return keyring.verify(keyring.create("acme", "write", "own", BY)[1])


@pytest.fixture
def changes(
    tenants: Tenants, catalog: Catalog, keyring: Keyring, audit: AuditLog, content: Content, own: Principal
) -> dict[str, Callable[[], object]]:
    """Returns a call for every kind of change."""
    key, _ = keyring.create("acme", "read", "", BY)
    return {
        "tenant.created": lambda: tenants.put("beta", own, Quotas(max_bytes=9)),
        "tenant.changed": lambda: tenants.put("acme", own, Quotas(max_adapters=9)),
        "tenant.deleted": lambda: tenants.delete("acme", own),
        "key.created": lambda: keyring.create("acme", "read", "ci", own),
        "key.revoked": lambda: keyring.revoke("acme", key.id, own),
        "version.published": lambda: catalog.add_version("acme", "a", content("z"), own),
        "version.deleted": lambda: catalog.delete("acme", parse_reference("a@2"), own),
        "adapter.deleted": lambda: catalog.delete("acme", parse_reference("a"), own),
        "alias.moved": lambda: catalog.put_alias("acme", "a", "prod", 2, own),
        "alias.deleted": lambda: catalog.delete_alias("acme", "a", "prod", own),
        "residency.loaded": lambda: audit.add(own, "residency.loaded", "acme", "acme/a@1", pinned=True),
    }


EXPECTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tenant.created": ("beta", "beta", {"max_bytes": 9}),
    "tenant.changed": ("acme", "acme", {"max_adapters": 9, "max_bytes": None, "requests_per_second": None}),
    "tenant.deleted": ("acme", "acme", {}),
    "key.created": ("acme", "", {"scope": "read", "name": "ci"}),
    "key.revoked": ("acme", "", {}),
    "version.published": ("acme", "acme/a@3", {}),
    "version.deleted": ("acme", "acme/a@2", {"versions": [2]}),
    "adapter.deleted": ("acme", "acme/a", {"versions": 2}),
    "alias.moved": ("acme", "acme/a@prod", {"version": 2, "before": 1}),
    "alias.deleted": ("acme", "acme/a@prod", {"before": 1}),
    "residency.loaded": ("acme", "acme/a@1", {"pinned": True}),
}


@contextmanager
def captured() -> Iterator[list[dict[str, Any]]]:
    """Yields the fields of each line that the catalog logs during the test."""
    lines: list[dict[str, Any]] = []
    log, handler = logging.getLogger("prefix_service"), logging.Handler()
    handler.emit = lambda record: lines.append(vars(record))  # type: ignore[method-assign]
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def entries(audit: AuditLog, tenant: str | None = None) -> list[AuditEntry]:
    return audit.listed(tenant, before=None, limit=1000)


@pytest.mark.parametrize("action", EXPECTED)
def test_every_change_is_one_row_and_one_line(
    changes: dict[str, Callable[[], object]], audit: AuditLog, own: Principal, action: str
) -> None:
    """The row has the key, the action, the target and the time; the log line has the same fields."""
    before = entries(audit)
    with captured() as lines:
        changes[action]()
    entry, *rest = entries(audit)
    assert rest == before
    tenant, target, details = EXPECTED[action]
    assert (entry.actor, entry.key_id, entry.action, entry.tenant) == ("acme", own.key_id, action, tenant)
    assert entry.target.startswith(target)
    assert entry.details.items() >= details.items()
    assert abs(entry.at.replace(tzinfo=UTC) - datetime.now(UTC)) < timedelta(seconds=10)
    (line,) = lines
    assert {name: line[name] for name in ("actor", "key_id", "action", "tenant", "target", "details")} == {
        name: getattr(entry, name) for name in ("actor", "key_id", "action", "tenant", "target", "details")
    }


def test_an_entry_names_its_key(audit: AuditLog, catalog: Catalog, keyring: Keyring, own: Principal) -> None:
    """An entry has its key's name and id, also after the key was revoked, even by itself; without a key the name is
    empty."""
    catalog.put_alias("acme", "a", "prod", 2, own)
    keyring.revoke("acme", own.key_id, own)
    catalog.put_alias("acme", "a", "prod", 1, BY)
    shown = [(entry.action, entry.key_id, entry.key_name) for entry in entries(audit, "acme")[:3]]
    assert shown == [
        ("alias.moved", BY.key_id, None),
        ("key.revoked", own.key_id, "own"),
        ("alias.moved", own.key_id, "own"),
    ]


def everything(database: Database) -> dict[str, list[Any]]:
    """Returns every row of every table but garbage, where blobs are held before any change."""
    tables = [table for table in metadata.sorted_tables if table is not garbage]
    with database.reading() as connection:
        return {table.name: list(connection.execute(sa.select(table))) for table in tables}


@pytest.mark.parametrize("action", EXPECTED)
def test_what_cannot_be_noted_is_not_done(
    changes: dict[str, Callable[[], object]], database: Database, action: str
) -> None:
    """If the audit row cannot be written, the change is rolled back, and no line is logged."""
    before = everything(database)
    with database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE audit RENAME TO away")
    with captured() as lines, pytest.raises(StorageFailed):
        changes[action]()
    with database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE away RENAME TO audit")
    assert (everything(database), lines) == (before, [])


def note_and_fail(database: Database) -> None:
    with writing_for(database, BY) as connection:
        record(connection, BY, "looked.at", None, "x")
        raise KeyError


def test_what_fails_after_its_note_is_not_noted(database: Database, audit: AuditLog) -> None:
    """A transaction that fails after its note leaves neither a row nor a line."""
    before = entries(audit)
    with captured() as lines, pytest.raises(KeyError):
        note_and_fail(database)
    assert (entries(audit), lines) == (before, [])


def test_what_changes_nothing_is_not_noted(
    tenants: Tenants, catalog: Catalog, audit: AuditLog, content: Content
) -> None:
    """Publishing the same content, setting the same quotas and moving an alias to where it is leave no entry."""
    before = entries(audit)
    with captured() as lines:
        tenants.put("acme", BY)
        tenants.put("acme", BY, Quotas(max_bytes=330))
        catalog.add_version("acme", "a", content("x"), BY, make_tenant=True)
        catalog.put_alias("acme", "a", "prod", 1, BY)
    assert (entries(audit), lines) == (before, [])


def test_what_is_refused_is_not_noted(
    tenants: Tenants, catalog: Catalog, keyring: Keyring, audit: AuditLog, content: Content
) -> None:
    """A refused change leaves no entry, whatever it was refused for."""
    refused: list[tuple[type[PrefixServiceError], Callable[[], object]]] = [
        (NotFound, lambda: tenants.delete("ghost", BY)),
        (NotFound, lambda: keyring.create("ghost", "read", "", BY)),
        (NotFound, lambda: keyring.revoke("acme", "0" * 16, BY)),
        (NotFound, lambda: catalog.add_version("ghost", "a", content("x"), BY)),
        (QuotaExceeded, lambda: catalog.add_version("acme", "b", content("z"), BY)),
        (Conflict, lambda: catalog.delete("acme", parse_reference("a@1"), BY)),
        (PreconditionFailed, lambda: catalog.put_alias("acme", "a", "prod", 2, BY, expected=2)),
        (NotFound, lambda: catalog.delete_alias("acme", "a", "dev", BY)),
    ]
    tenants.put("acme", BY, Quotas(max_bytes=60))
    before = entries(audit)
    with captured() as lines:
        for wanted, call in refused:
            with pytest.raises(wanted):
                call()
    assert (entries(audit), lines) == (before, [])


def test_a_publication_may_bring_its_tenant(catalog: Catalog, audit: AuditLog, content: Content) -> None:
    """A publication that makes its tenant is two changes and two rows, both owned by the new tenant."""
    catalog.add_version("beta", "a", content("x"), BY, make_tenant=True)
    assert [entry.action for entry in entries(audit, "beta")] == ["version.published", "tenant.created"]


@pytest.mark.parametrize("by", [None, COMMAND_LINE])
def test_only_a_transaction_of_who_acts_can_be_recorded(database: Database, by: Principal | None) -> None:
    """Recording fails in a transaction that proved no caller, or another one, so a method that forgets it fails in all
    its tests."""
    with pytest.raises(AssertionError, match="proved"), database.writing(by) as connection:
        record(connection, BY, "looked.at", None, "x")


def test_the_line_comes_after_the_commit(database: Database, audit: AuditLog) -> None:
    """When the log line is written, another connection already finds the row."""
    with captured() as lines:
        with writing_for(database, BY) as connection:
            record(connection, BY, "looked.at", None, "x")
            assert lines == []
        assert [line["action"] for line in lines] == ["looked.at"]
    assert entries(audit)[0].action == "looked.at"


def test_changes_that_the_catalog_does_not_hold(audit: AuditLog, own: Principal) -> None:
    """`add` notes changes of a tenant, of the platform, and of a tenant that was deleted."""
    audit.add(BY, "residency.loaded", "acme", "acme/a@1", tier="host")
    audit.add(BY, "tenant.looked-at", "ghost", "ghost")
    audit.add(own, "limits.changed", None, "limits")
    limits, ghost, loaded = entries(audit)[:3]
    assert (loaded.tenant, loaded.actor, loaded.details) == ("acme", "platform", {"tier": "host"})
    assert (ghost.tenant, limits.tenant, limits.actor) == ("ghost", None, "acme")
    assert [entry for entry in entries(audit, "acme") if entry.id >= loaded.id] == [loaded]


def test_a_listing_is_the_tenants(tenants: Tenants, catalog: Catalog, audit: AuditLog, content: Content) -> None:
    """A tenant's listing has the changes of its own resources, whoever made them; without a tenant it has all."""
    catalog.add_version("beta", "a", content("x"), BY, make_tenant=True)
    own = entries(audit, "acme")
    assert [entry.target for entry in own] == ["acme/a@prod", "acme/a@2", "acme/a@1", "acme"]
    assert entries(audit) == [*entries(audit, "beta"), *own]
    with pytest.raises(NotFound, match="there is no tenant 'ghost'"):
        entries(audit, "ghost")


def test_a_listing_comes_in_pages(audit: AuditLog) -> None:
    """Entries come newest first; a page begins before an entry's id, and the id may be any number."""
    every = entries(audit, "acme")
    assert audit.listed("acme", before=None, limit=2) == every[:2]
    assert audit.listed("acme", before=every[1].id, limit=2) == every[2:4]
    assert audit.listed("acme", before=every[-1].id, limit=2) == []
    assert audit.listed("acme", before=10**17, limit=9) == every


def test_changes_are_filtered(audit: AuditLog, catalog: Catalog, own: Principal) -> None:
    """By action, and by a text in target, tenant, actor, or the key's id or name, in capitals or not. What is hidden
    from a tenant is not found by it."""
    catalog.put_alias("acme", "a", "prod", 2, own)
    moved, before = [entry for entry in entries(audit, "acme") if entry.action == "alias.moved"]

    def listed(action: str | None, search: str | None = None, hides_platform: bool = False) -> list[AuditEntry]:
        return audit.listed("acme", before=None, limit=9, wanted=AuditFilter(action, search, hides_platform))

    assert listed("alias.moved") == [moved, before]
    for text in ("OWN", own.key_id):
        assert moved in listed(None, text, hides_platform=True)
        assert before not in listed(None, text)
    assert listed("alias.moved", "A@PROD") == [moved, before]
    assert listed(None, "A@PR%") == listed(None, "a_prod") == []
    assert before in listed(None, BY.key_id)
    assert before not in listed(None, BY.key_id, hides_platform=True)
    assert before in listed(None, "platform", hides_platform=True)


@on_sqlite
def test_only_the_latest_changes_are_searched(database: Database, audit: AuditLog) -> None:
    """A filter looks at 100,000 changes, of a tenant or of all; without one, every change is listed."""
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 99999)"
    row = "(SELECT id FROM tenants), 'acme', 'acme', '0', 'looked.at', 'x', '{}'"
    columns = "tenant_id, tenant, actor, key_id, action, target, details"
    with database.writing() as connection:
        connection.exec_driver_sql(f"{numbers} INSERT INTO audit ({columns}) SELECT {row} FROM n")  # noqa: S608
    for tenant in ("acme", None):
        found = audit.listed(tenant, before=None, limit=9, wanted=AuditFilter(search="acme/a@"))
        assert [entry.target for entry in found] == ["acme/a@prod"]
        assert len(audit.listed(tenant, before=5, limit=9)) == 4


def test_a_namesake_does_not_see_what_was_before(tenants: Tenants, audit: AuditLog) -> None:
    """A tenant that was made again does not see the entries of the deleted one; the platform does."""
    before = entries(audit)
    tenants.delete("acme", BY)
    tenants.put("acme", BY)
    assert [entry.action for entry in entries(audit, "acme")] == ["tenant.created"]
    assert entries(audit)[2:] == before


def test_changes_of_a_version(catalog: Catalog, audit: AuditLog, content: Content, tenants: Tenants) -> None:
    """Of itself, and of the aliases that began or ceased to name it; none of another adapter, tenant or version."""
    tenants.put("acme", BY, Quotas())
    for tenant, adapter in (("acme", "a_b"), ("acme", "aab"), ("beta", "a")):
        catalog.add_version(tenant, adapter, content(adapter), BY, make_tenant=True)
        catalog.put_alias(tenant, adapter, "prod", 1, BY)
    catalog.put_alias("acme", "a", "prod", 2, BY)
    catalog.put_alias("acme", "a", "next", 2, BY)
    catalog.delete_alias("acme", "a", "next", BY)
    first, second = (VersionName("acme", "a", number, "") for number in (1, 2))
    found = [(entry.action, entry.target) for entry in audit.of_version(first, 9)]
    assert found == [
        ("alias.moved", "acme/a@prod"),
        ("alias.moved", "acme/a@prod"),
        ("version.published", "acme/a@1"),
    ]
    assert [entry.action for entry in audit.of_version(second, 3)] == ["alias.deleted", "alias.moved", "alias.moved"]
    named = VersionName("acme", "a_b", 1, "")
    assert [entry.target for entry in audit.of_version(named, 9)] == ["acme/a_b@prod", "acme/a_b@1"]
