"""Bytes that tenants deleted and that are still on the disk: they count towards a tenant's quota until the collector
has removed them.

A deleted adapter whose versions still have rows counts by its own total, all others by the table `freed`: one row for a
tenant and a second, so that a tenant that deletes without pause has few of them.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta

import sqlalchemy as sa

from prefix_service.catalog.database import insert, now
from prefix_service.catalog.schema import adapters, freed, tenants


def note(connection: sa.Connection, nbytes: Mapping[int, int]) -> None:
    """Notes bytes that tenants have just deleted, by the tenants' ids."""
    # The next full second: the bytes must not be forgotten before the blobs that they stand for.
    since = now(connection).replace(microsecond=0) + timedelta(seconds=1)
    # In order: on PostgreSQL two who locked these rows each in its own order would deadlock.
    rows = [{"tenant_id": tenant, "since": since, "bytes": count} for tenant, count in sorted(nbytes.items())]
    if rows:
        statement = insert(connection, freed)
        added = {"bytes": freed.c.bytes + statement.excluded.bytes}
        connection.execute(statement.on_conflict_do_update(index_elements=["tenant_id", "since"], set_=added), rows)


def forget(connection: sa.Connection, before: datetime, limit: int) -> bool:
    """Forgets up to `limit` notes of deletions that were made before a moment; returns whether there may be more."""
    early = sa.select(freed.c.tenant_id, freed.c.since).where(freed.c.since <= before).order_by(freed.c.since)
    some = early.limit(limit).with_for_update(skip_locked=True)
    gone = sa.delete(freed).where(sa.tuple_(freed.c.tenant_id, freed.c.since).in_(some))
    return connection.execute(gone).rowcount == limit


def noted(before: datetime) -> sa.ColumnElement[bool]:
    """Returns whether there are notes of deletions that were made before a moment, for a query."""
    return sa.exists().where(freed.c.since <= before)


def uncollected() -> sa.ColumnElement[int]:
    """Returns a column for queries of `tenants`: the bytes that a tenant deleted and that are still on the disk."""
    noted = sa.select(sa.func.coalesce(sa.func.sum(freed.c.bytes), 0)).where(freed.c.tenant_id == tenants.c.id)
    hidden = sa.select(sa.func.coalesce(sa.func.sum(adapters.c.bytes), 0)).where(
        adapters.c.tenant_id == tenants.c.id, adapters.c.deleted
    )
    both = noted.correlate(tenants).scalar_subquery() + hidden.correlate(tenants).scalar_subquery()
    return sa.cast(both, sa.BigInteger).label("uncollected")
