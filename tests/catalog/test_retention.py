"""`catalog.retention`: old entries of the audit and old changes are removed in slices."""

from datetime import timedelta

import sqlalchemy as sa

from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.changes import Change, TenantCreated
from prefix_service.catalog.database import Database, now
from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.garbage import SLICE
from prefix_service.catalog.retention import expire_audit, expire_changes
from prefix_service.catalog.schema import audit as audit_table
from prefix_service.catalog.schema import changes
from prefix_service.catalog.tenants import Tenants
from tests.catalog.conftest import BY


def add(audit: AuditLog, database: Database, count: int, days_ago: float) -> None:
    """Adds entries of these ages."""
    with database.writing() as connection:
        row = {"actor": "acme", "key_id": "k", "action": "x", "target": "acme", "details": {}}
        at = now(connection) - timedelta(days=days_ago)
        connection.execute(sa.insert(audit_table), [row | {"at": at} for _ in range(count)])


def ids(audit: AuditLog) -> list[int]:
    return [entry.id for entry in audit.listed(None, before=None, limit=10 * SLICE)]


def test_what_is_older_goes_and_the_rest_stays(audit: AuditLog, database: Database) -> None:
    """Entries above the age are removed slice by slice, and younger ones stay."""
    add(audit, database, SLICE + 7, days_ago=31)
    add(audit, database, 3, days_ago=29)
    kept = ids(audit)[:3]
    assert expire_audit(database, 30)
    assert len(ids(audit)) == 7 + 3
    assert not expire_audit(database, 30)
    assert ids(audit) == kept
    assert not expire_audit(database, 30)


def test_the_newest_entry_stays(audit: AuditLog, database: Database, tenants: Tenants) -> None:
    """The newest entry stays at any age, since SQLite would give its id again."""
    add(audit, database, 9, days_ago=900)
    last = ids(audit)[0]
    expire_audit(database, 1)
    assert ids(audit) == [last]
    tenants.put("acme", BY)
    assert ids(audit) == [last + 1, last]


def test_old_changes_go_and_revisions_count_on(database: Database, tenants: Tenants) -> None:
    """Old changes are removed slice by slice, the last one too; revisions go on counting, and a feed that is up to date
    misses nothing."""
    for number in range(3):
        tenants.put(f"t{number}", BY)
    with database.writing() as connection:
        early = now(connection) - timedelta(days=8)
        connection.execute(sa.update(changes).where(changes.c.revision < 3).values(at=early))
    feed, heard = ChangeFeed(database), list[Change]()
    feed.listen(heard.extend)
    assert not expire_changes(database, 7)
    assert revisions(database) == [3]
    with database.writing() as connection:
        connection.execute(sa.update(changes).values(at=early))
        row = {"kind": "tenant-created", "at": early}
        connection.execute(sa.insert(changes), [row | {"revision": 100 + number} for number in range(SLICE)])
    assert expire_changes(database, 7)
    assert revisions(database) == [99 + SLICE]
    assert not expire_changes(database, 7)
    assert revisions(database) == []
    tenants.put("acme", BY)
    assert revisions(database) == [4]
    assert heard == [TenantCreated("acme")]


def revisions(database: Database) -> list[int]:
    with database.reading() as connection:
        return list(connection.scalars(sa.select(changes.c.revision).order_by(changes.c.revision)))
