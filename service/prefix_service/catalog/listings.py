"""Listings of adapters and versions, each read from an index a page at a time."""

from collections.abc import Iterator
from typing import Any, Final

import sqlalchemy as sa

from prefix_service.catalog.database import Database
from prefix_service.catalog.records import Adapter, Version, VersionName
from prefix_service.catalog.rows import PRESENT, VERSION, aliases_of, find_adapter, version_of
from prefix_service.catalog.schema import adapters, tenants, versions

_ORDER: Final = (tenants.c.name, adapters.c.name, versions.c.number)
# Adding nothing keeps SQLite from beginning with the versions, all of which it would read and sort.
_FROM: Final = tenants.join(adapters, adapters.c.tenant_id == tenants.c.id + 0).join(
    versions, versions.c.adapter_id == adapters.c.id + 0
)
_NAME: Final = sa.select(*_ORDER, versions.c.digest).select_from(_FROM).where(PRESENT).order_by(*_ORDER)


class Listings:
    """Blocking; call it from a thread. Every page is one transaction, and takes time for its own rows alone.

    Any method may also raise StorageFailed, when the database refuses.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def adapters(self, tenant: str, *, after: str, limit: int, base_model: str | None) -> list[Adapter]:
        """Returns up to `limit` adapters in the order of their names, beginning behind `after`."""
        newest = sa.select(sa.func.max(versions.c.number)).where(versions.c.adapter_id == adapters.c.id)
        query = (
            VERSION.add_columns(versions.c.adapter_id, adapters.c.versions)
            .where(tenants.c.name == tenant, adapters.c.name > after)
            .where(versions.c.number == newest.correlate(adapters).scalar_subquery())
            .order_by(adapters.c.name)
            .limit(limit)
        )
        if base_model is not None:
            query = query.where(versions.c.base_model == base_model)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
            named = aliases_of(connection, [row.adapter_id for row in rows])
        return [Adapter(version_of(row), row.versions, named[row.adapter_id]) for row in rows]

    def versions(self, tenant: str, adapter: str, *, before: int | None, limit: int) -> list[Version]:
        """Returns up to `limit` versions of an adapter, the newest first, beginning below the number `before`.

        Raises:
            NotFound: there is no such adapter.
        """
        with self._database.reading() as connection:
            query = VERSION.where(versions.c.adapter_id == find_adapter(connection, tenant, adapter))
            if before is not None:
                query = query.where(versions.c.number < sa.literal(before, sa.BigInteger))
            query = query.order_by(versions.c.number.desc()).limit(limit)
            return [version_of(row) for row in connection.execute(query)]

    def numbers(self, tenant: str, adapter: str, limit: int) -> list[int]:
        """Returns the numbers of the `limit` newest versions of an adapter, ascending.

        Raises:
            NotFound: there is no such adapter.
        """
        with self._database.reading() as connection:
            owned = versions.c.adapter_id == find_adapter(connection, tenant, adapter)
            query = sa.select(versions.c.number).where(owned).order_by(versions.c.number.desc()).limit(limit)
            return sorted(connection.scalars(query))

    def index(
        self, tenant: str | None, adapter: str | None = None, *, after: VersionName | None, limit: int
    ) -> list[VersionName]:
        """Returns up to `limit` versions of an adapter, of a tenant, or of all, in the order of tenant, adapter and
        number, beginning behind `after`."""
        found: list[VersionName] = []
        after = after or VersionName(tenant or "", adapter or "", 0, "")
        with self._database.reading() as connection:
            for query in _behind(tenant, adapter, after):
                rows = connection.execute(query.limit(limit - len(found)))
                found += [VersionName(*row) for row in rows]
                if len(found) == limit:
                    break
        return found


def _behind(tenant: str | None, adapter: str | None, after: VersionName) -> Iterator[sa.Select[Any]]:
    """Yields queries that follow each other: the rest of the adapter of `after`, the rest of its tenant, and the
    tenants behind it. An index answers each of them in order; it could not answer a comparison of all three columns."""
    of_tenant = _NAME.where(tenants.c.name == after.tenant)
    yield of_tenant.where(adapters.c.name == after.adapter, versions.c.number > after.number)
    if adapter is None:
        yield of_tenant.where(adapters.c.name > after.adapter)
    if tenant is None:
        yield _NAME.where(tenants.c.name > after.tenant)
