"""Tenants: who has what, and how much of it they may have."""

from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from service.catalog.audit import record
from service.catalog.database import Database, insert
from service.catalog.deletions import hide_tenant
from service.catalog.records import Principal, Quotas, Tenant
from service.catalog.schema import adapters, tenants
from service.errors import NotFound, QuotaExceeded


class Tenants:
    """Blocking. Every method is one transaction, and may also raise OutOfSpace or StorageFailed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, name: str, by: Principal, quotas: Quotas | None = None) -> bool:
        """Make a tenant, or give one other quotas; whether it is new. None leaves the quotas as they are."""
        values = asdict(quotas or Quotas())
        with self._database.writing() as connection:
            if make(connection, name, by, quotas):
                return True
            before = lock(connection, name)
            if quotas is not None and any(before._mapping[quota] != value for quota, value in values.items()):
                connection.execute(sa.update(tenants).where(tenants.c.name == name).values(values))
                record(connection, by, "tenant.changed", name, name, **values)
            return False

    def delete(self, name: str, by: Principal) -> None:
        """Delete a tenant with its keys, adapters and versions; its version numbers are never given again.

        Raises:
            NotFound: there is no such tenant.
        """
        with self._database.writing() as connection:
            owner = lock(connection, name)
            record(connection, by, "tenant.deleted", name, name)
            hide_tenant(connection, owner.id)

    def get(self, name: str) -> Tenant:
        """A tenant with its quotas and what it has.

        Raises:
            NotFound: there is no such tenant.
        """
        with self._database.reading() as connection:
            row = connection.execute(sa.select(tenants).where(tenants.c.name == name)).one_or_none()
        if row is None:
            raise NotFound(f"there is no tenant {name!r}")
        return _tenant(row)

    def listed(self, after: str, limit: int) -> list[Tenant]:
        """Up to `limit` tenants in the order of their names, beginning behind `after`."""
        behind = sa.and_(tenants.c.name > after, sa.not_(tenants.c.deleted))
        query = sa.select(tenants).where(behind).order_by(tenants.c.name).limit(limit)
        with self._database.reading() as connection:
            return [_tenant(row) for row in connection.execute(query)]

    def require(self, name: str) -> None:
        """That there is such a tenant.

        Raises:
            NotFound: there is none.
        """
        with self._database.reading() as connection:
            if connection.scalar(sa.select(tenants.c.id).where(tenants.c.name == name)) is None:
                raise NotFound(f"there is no tenant {name!r}")

    def requests_per_second(self, name: str) -> int | None:
        """How many requests a tenant may make in a second; None for no limit, or no such tenant."""
        query = sa.select(tenants.c.requests_per_second).where(tenants.c.name == name)
        with self._database.reading() as connection:
            rate: int | None = connection.scalar(query)
        return rate


def _tenant(row: sa.Row[Any]) -> Tenant:
    return Tenant(row.name, row.created, _quotas(row), row.adapters, row.bytes)


def _quotas(row: sa.Row[Any]) -> Quotas:
    return Quotas(**{name: row._mapping[name] for name in Quotas.__dataclass_fields__})


def make(connection: sa.Connection, name: str, by: Principal, quotas: Quotas | None = None) -> bool:
    """Make a tenant unless it exists; whether it is new."""
    given = {key: value for key, value in asdict(quotas or Quotas()).items() if value is not None}
    statement = insert(connection, tenants).values(name=name, **given).on_conflict_do_nothing()
    if connection.scalar(statement.returning(tenants.c.id)) is None:
        return False
    record(connection, by, "tenant.created", name, name, **given)
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


def require_room(connection: sa.Connection, owner: sa.Row[Any], adapter: str, nbytes: int) -> None:
    """That a version of so many bytes fits its tenant's quotas, those of this moment.

    Raises:
        QuotaExceeded: says which quota, what is used of it, and what to do.
    """
    quotas = _quotas(owner)
    if quotas.max_adapters is None and quotas.max_bytes is None:
        return
    known = sa.select(adapters.c.id).where(adapters.c.tenant_id == owner.id, adapters.c.name == adapter)
    if quotas.max_adapters is not None and owner.adapters >= quotas.max_adapters and connection.scalar(known) is None:
        raise QuotaExceeded(
            f"tenant {owner.name!r} has {owner.adapters} adapters and may have {quotas.max_adapters}: delete one, or "
            "ask the platform for more"
        )
    if quotas.max_bytes is not None and owner.bytes + nbytes > quotas.max_bytes:
        raise QuotaExceeded(
            f"tenant {owner.name!r} has {owner.bytes} of {quotas.max_bytes} bytes, and this version takes {nbytes}: "
            "delete versions, or ask the platform for more"
        )
