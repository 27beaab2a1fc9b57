"""`catalog.retention`: old entries of the audit go in slices, and the change feed notices nothing."""

from datetime import timedelta

import sqlalchemy as sa

from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.changes import Changes
from prefix_service.catalog.database import Database, now
from prefix_service.catalog.garbage import SLICE
from prefix_service.catalog.records import AuditEntry
from prefix_service.catalog.retention import expire_audit
from prefix_service.catalog.schema import audit as audit_table
from prefix_service.catalog.tenants import Tenants
from tests.catalog.conftest import BY


def add(audit: AuditLog, database: Database, count: int, days_ago: float) -> None:
    """So many entries, as old as told."""
    with database.writing() as connection:
        row = {"actor": "acme", "key_id": "k", "action": "x", "target": "acme", "details": {}}
        at = now(connection) - timedelta(days=days_ago)
        connection.execute(sa.insert(audit_table), [row | {"at": at} for _ in range(count)])


def ids(audit: AuditLog) -> list[int]:
    return [entry.id for entry in audit.listed(None, before=None, limit=10 * SLICE)]


def test_what_is_older_goes_and_the_rest_stays(audit: AuditLog, database: Database) -> None:
    """Slice by slice."""
    add(audit, database, SLICE + 7, days_ago=31)
    add(audit, database, 3, days_ago=29)
    kept = ids(audit)[:3]
    assert expire_audit(database, 30)
    assert len(ids(audit)) == 7 + 3
    assert not expire_audit(database, 30)
    assert ids(audit) == kept
    assert not expire_audit(database, 30)


def test_who_follows_changes_misses_none(audit: AuditLog, database: Database, tenants: Tenants) -> None:
    """The newest entry stays, however old: an id that is given again would not be heard."""
    add(audit, database, 9, days_ago=900)
    changes, heard = Changes(database), list[AuditEntry]()
    changes.listen(heard.extend)
    last = ids(audit)[0]
    expire_audit(database, 1)
    assert ids(audit) == [last]
    tenants.put("acme", BY)
    changes.catch_up()
    assert [(entry.id, entry.action) for entry in heard] == [(last + 1, "tenant.created")]
