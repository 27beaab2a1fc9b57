"""Every change: a row in the same transaction, and a line in the log once it is durable."""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import sqlalchemy as sa

from prefix_service.catalog.authority import writing_for
from prefix_service.catalog.database import Database, afterwards
from prefix_service.catalog.records import (
    PLATFORM,
    WITHOUT_KEY,
    AuditEntry,
    AuditFilter,
    Principal,
    VersionName,
)
from prefix_service.catalog.schema import audit, keys, tenants
from prefix_service.errors import NotFound

_EXAMINED: Final = 100_000  # the latest changes of a tenant, or of all, among which some are looked for

log = logging.getLogger("prefix_service")

ENTRY: Final = sa.select(*(audit.c[name] for name in AuditEntry.__dataclass_fields__))
"""The rows of the audit log, as `AuditEntry` takes them."""

EVERYTHING: Final = AuditFilter()


def record(
    connection: sa.Connection, by: Principal, action: str, tenant: str | None, target: str, **details: Any
) -> None:
    """Note that `by`, for whom the transaction was opened with `writing_for`, did `action` to `target`, a resource of
    `tenant` or of the platform."""
    if connection.get_execution_options()["by"] != by:
        raise AssertionError("a change is recorded outside a transaction that proved who makes it")
    actor = by.tenant or PLATFORM
    # Held, or PostgreSQL would refuse the row of a tenant that goes meanwhile.
    owner = sa.select(tenants.c.id).where(tenants.c.name == tenant).with_for_update(read=True, key_share=True)
    row = {"tenant": tenant, "actor": actor, "key_id": by.key_id, "action": action, "target": target}
    named = sa.select(keys.c.name).where(keys.c.id == by.key_id).scalar_subquery()
    connection.execute(
        sa.insert(audit).values(tenant_id=owner.scalar_subquery(), key_name=named, details=details, **row)
    )
    afterwards(connection, partial(log.info, "audit", extra={**row, "details": details}))


class AuditLog:
    """The changes that were made. Blocking."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, by: Principal, action: str, tenant: str | None, target: str, **details: Any) -> None:
        """Note a change that the catalog does not hold.

        Raises:
            Unauthenticated, NotFound: `by` may not act any more.
            OutOfSpace, StorageFailed: the database refused.
        """
        with writing_for(self._database, by) as connection:
            record(connection, by, action, tenant, target, **details)

    def listed(
        self, tenant: str | None, *, before: int | None, limit: int, wanted: AuditFilter = EVERYTHING
    ) -> list[AuditEntry]:
        """Up to `limit` changes, newest first, beginning before an entry's id: those of a tenant, or with None all. If
        not everything is `wanted`, only the latest 100,000 of these changes are examined.

        Raises:
            NotFound: there is no such tenant.
        """
        query = ENTRY.order_by(audit.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(audit.c.id < sa.literal(before, sa.BigInteger))
        with self._database.reading() as connection:
            if tenant is not None:
                owner = connection.scalar(sa.select(tenants.c.id).where(tenants.c.name == tenant))
                if owner is None:
                    raise NotFound(f"there is no tenant {tenant!r}")
                query = query.where(audit.c.tenant_id == owner)
            if wanted != EVERYTHING:
                # A condition in either case, so that the latest are read from an index and no table is read whole.
                mine = audit.c.id > 0 if tenant is None else audit.c.tenant_id == owner
                query = query.where(audit.c.id >= _first_examined(mine), *_conditions(wanted))
            return [AuditEntry(*row) for row in connection.execute(query)]

    def of_version(self, version: VersionName, limit: int) -> list[AuditEntry]:
        """Returns up to `limit` changes of a version, newest first: of itself, and of the aliases that began or ceased
        to name it. Only the latest 100,000 changes of its tenant are examined."""
        of_adapter = f"{version.tenant}/{version.adapter}@"
        owner = sa.select(tenants.c.id).where(tenants.c.name == version.tenant).scalar_subquery()
        moved = audit.c.action.in_(("alias.moved", "alias.deleted")) & audit.c.target.startswith(
            of_adapter, autoescape=True
        )
        named = audit.c.details["version"].as_integer(), audit.c.details["before"].as_integer()
        concerns = (audit.c.target == str(version)) | (moved & sa.or_(*(number == version.number for number in named)))
        mine = audit.c.tenant_id == owner
        query = ENTRY.where(mine, audit.c.id >= _first_examined(mine), concerns)
        with self._database.reading() as connection:
            return [AuditEntry(*row) for row in connection.execute(query.order_by(audit.c.id.desc()).limit(limit))]


def _first_examined(mine: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    """The id of the oldest of the latest 100,000 changes that meet a condition."""
    latest = sa.select(audit.c.id).where(mine).order_by(audit.c.id.desc())
    return sa.func.coalesce(latest.offset(_EXAMINED - 1).limit(1).scalar_subquery(), 0)


def _conditions(wanted: AuditFilter) -> Iterator[sa.ColumnElement[bool]]:
    if wanted.action is not None:
        yield audit.c.action == wanted.action
    if wanted.search is not None:
        target, tenant, actor, key_id, key_name = (
            audit.c[name].icontains(wanted.search, autoescape=True)
            for name in ("target", "tenant", "actor", "key_id", "key_name")
        )
        in_key = key_id | key_name
        if wanted.hides_platform:
            in_key &= (audit.c.actor != PLATFORM) | audit.c.key_id.in_(WITHOUT_KEY)
        yield target | tenant | actor | in_key
