"""Tenants, their quotas, and the running totals of what they have."""

import secrets
from dataclasses import asdict
from typing import Any, Final

import sqlalchemy as sa

from prefix_service.catalog.audit import record
from prefix_service.catalog.authority import writing_for
from prefix_service.catalog.changes import QuotasChanged, TenantCreated, TenantDeleted, announce
from prefix_service.catalog.database import Database, insert
from prefix_service.catalog.deletions import hide_tenant
from prefix_service.catalog.freed import uncollected
from prefix_service.catalog.quotas import quotas_of
from prefix_service.catalog.records import Principal, Quotas, Tenant
from prefix_service.catalog.schema import adapters, tenants
from prefix_service.errors import NotFound

_SHOWN: Final = sa.select(tenants, uncollected())


class Tenants:
    """Blocking. Every method is one transaction, and may also raise OutOfSpace or StorageFailed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, name: str, by: Principal, quotas: Quotas | None = None) -> bool:
        """Make a tenant, or give one other quotas; whether it is new. None leaves the quotas as they are.

        Raises:
            Unauthenticated: `by` has no authority any more.
            NotFound: the tenant existed when the request began, and has been deleted since.
        """
        values = asdict(quotas or Quotas())
        with writing_for(self._database, by) as connection:
            if make(connection, name, by, quotas):
                return True
            before = lock(connection, name)
            if quotas is not None and any(before._mapping[quota] != value for quota, value in values.items()):
                connection.execute(sa.update(tenants).where(tenants.c.name == name).values(values))
                record(connection, by, "tenant.changed", name, name, **values)
                announce(connection, QuotasChanged(name))
            return False

    def delete(self, name: str, by: Principal) -> None:
        """Delete a tenant with its keys, adapters and versions; its version numbers are never given again.

        Raises:
            Unauthenticated: `by` has no authority any more.
            NotFound: there is no such tenant.
        """
        with writing_for(self._database, by, frees=True) as connection:
            owner = lock(connection, name)
            record(connection, by, "tenant.deleted", name, name)
            announce(connection, TenantDeleted(name))
            hide_tenant(connection, owner.id)

    def get(self, name: str) -> Tenant:
        """A tenant with its quotas and what it has.

        Raises:
            NotFound: there is no such tenant.
        """
        with self._database.reading() as connection:
            row = connection.execute(_SHOWN.where(tenants.c.name == name)).one_or_none()
        if row is None:
            raise NotFound(f"there is no tenant {name!r}")
        return _tenant(row)

    def listed(self, after: str, limit: int) -> list[Tenant]:
        """Up to `limit` tenants in the order of their names, beginning behind `after`."""
        behind = sa.and_(tenants.c.name > after, sa.not_(tenants.c.deleted))
        query = _SHOWN.where(behind).order_by(tenants.c.name).limit(limit)
        with self._database.reading() as connection:
            return [_tenant(row) for row in connection.execute(query)]

    def require(self, name: str) -> int:
        """Returns the id of a tenant.

        Raises:
            NotFound: there is none of that name.
        """
        with self._database.reading() as connection:
            found: int | None = connection.scalar(sa.select(tenants.c.id).where(tenants.c.name == name))
        if found is None:
            raise NotFound(f"there is no tenant {name!r}")
        return found

    def requests_per_second(self, name: str) -> int | None:
        """Returns how many requests a tenant may send in a second; None for no limit, or no such tenant."""
        query = sa.select(tenants.c.requests_per_second).where(tenants.c.name == name)
        with self._database.reading() as connection:
            rate: int | None = connection.scalar(query)
        return rate


def _tenant(row: sa.Row[Any]) -> Tenant:
    return Tenant(row.name, row.created, quotas_of(row), row.adapters, row.bytes, row.uncollected)


def make(connection: sa.Connection, name: str, by: Principal, quotas: Quotas | None = None) -> bool:
    """Make a tenant unless it exists; whether it is new."""
    given = {key: value for key, value in asdict(quotas or Quotas()).items() if value is not None}
    # At random: a number from a sequence would be given again by SQLite, once the last tenant was deleted.
    row = {"id": 1 + secrets.randbelow(2**31 - 1), "name": name, **given}
    statement = insert(connection, tenants).values(row).on_conflict_do_nothing(index_elements=["name"])
    if connection.scalar(statement.returning(tenants.c.id)) is None:
        return False
    record(connection, by, "tenant.created", name, name, **given)
    announce(connection, TenantCreated(name))
    return True


def lock(connection: sa.Connection, name: str) -> sa.Row[Any]:
    """Begin a change of a tenant's things; its row. On PostgreSQL such changes wait for each other here; SQLite's
    writers always do.

    Raises:
        NotFound: there is no such tenant.
    """
    row = connection.execute(sa.select(tenants).where(tenants.c.name == name).with_for_update()).one_or_none()
    if row is None:
        raise NotFound(f"there is no tenant {name!r}")
    return row


def count(
    connection: sa.Connection, adapter_id: int, *, adapters_more: int = 0, versions_more: int, bytes_more: int
) -> None:
    """Adds to the running totals of an adapter and its tenant, which the caller has locked."""
    change = {"versions": adapters.c.versions + versions_more, "bytes": adapters.c.bytes + bytes_more}
    changed = sa.update(adapters).where(adapters.c.id == adapter_id).values(change).returning(adapters.c.tenant_id)
    owner = connection.execute(changed).scalar_one()
    total = {"adapters": tenants.c.adapters + adapters_more, "bytes": tenants.c.bytes + bytes_more}
    connection.execute(sa.update(tenants).where(tenants.c.id == owner).values(total))
