"""Listings of adapters and versions, each read from an index a page at a time."""

from collections.abc import Iterator
from typing import Any, Final

import sqlalchemy as sa

from prefix_service.catalog.database import Database
from prefix_service.catalog.records import Adapter, AdapterOrder, AdapterPlace, Version, VersionName
from prefix_service.catalog.rows import OWNED, PRESENT, VERSION, aliases_of, find_adapter, version_of
from prefix_service.catalog.schema import adapters, tenants, versions

_ORDER: Final = (tenants.c.name, adapters.c.name, versions.c.number)
# Adding nothing keeps SQLite from beginning with the versions, all of which it would read and sort.
_FROM: Final = tenants.join(adapters, adapters.c.tenant_id == tenants.c.id + 0).join(
    versions, versions.c.adapter_id == adapters.c.id + 0
)
_SORTED_BY: Final = {"-created": versions.c.created, "-bytes": adapters.c.bytes, "-used": adapters.c.used}
_NAME: Final = sa.select(*_ORDER, versions.c.digest).select_from(_FROM).where(PRESENT).order_by(*_ORDER)


class Listings:
    """Blocking; call it from a thread. Every page is one transaction, and takes time for its own rows alone, unless it
    is sorted by moments or bytes, or searched: then it takes time for all adapters of its tenant.

    Any method may also raise StorageFailed, when the database refuses.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def adapters(
        self,
        tenant: str,
        *,
        after: AdapterPlace | None,
        limit: int,
        order: AdapterOrder = "name",
        search: str | None = None,
        base_model: str | None = None,
    ) -> list[Adapter]:
        """Returns up to `limit` adapters, sorted by `order`, beginning behind `after`; adapters that `order` does not
        tell apart are sorted by name.

        Args:
            tenant: whose adapters.
            after: the place of the last adapter of the page before; None for the first page.
            limit: the most adapters of this page.
            order: what they are sorted by.
            search: a part of the name, in capitals or not; every character means itself.
            base_model: the base model of the newest version.
        """
        newest = sa.select(sa.func.max(versions.c.number)).where(versions.c.adapter_id == adapters.c.id)
        query = (
            sa.select(versions.c.id)
            .select_from(OWNED)
            .where(PRESENT, tenants.c.name == tenant)
            .where(versions.c.number == newest.correlate(adapters).scalar_subquery())
        )
        if search is not None:
            query = query.where(adapters.c.name.contains(search.lower(), autoescape=True))
        if base_model is not None:
            query = query.where(versions.c.base_model == base_model)
        with self._database.reading() as connection:
            # The database sorts numbers, not rows with their manifests.
            ids: list[int] = []
            for part in _sorted(query, order, after):
                ids += connection.scalars(part.limit(limit - len(ids)))
                if len(ids) == limit:
                    break
            found = VERSION.add_columns(adapters.c.versions, adapters.c.bytes, adapters.c.used)
            rows = {row.id: row for row in connection.execute(found.where(versions.c.id.in_(ids)))}
            named = aliases_of(connection, [row.adapter_id for row in rows.values()])
        ordered = [rows[version_id] for version_id in ids]
        return [Adapter(version_of(row), row.versions, row.bytes, row.used, named[row.adapter_id]) for row in ordered]

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


def _sorted(query: sa.Select[Any], order: AdapterOrder, after: AdapterPlace | None) -> Iterator[sa.Select[Any]]:
    """Yields queries that follow each other, of adapters sorted by `order`, those behind the place `after` alone: the
    rest of those with the same key, and those behind them. An index could not answer both in one query."""
    name = adapters.c.name
    if order == "name":
        yield query.order_by(name) if after is None else query.where(name > after.name).order_by(name)
        return
    column = _SORTED_BY[order]
    if after is not None:
        key = sa.literal(after.key, column.type)
        yield query.where(column == key, name > after.name).order_by(name)
        query = query.where(column < key)
    yield query.order_by(column.desc(), name)


def _behind(tenant: str | None, adapter: str | None, after: VersionName) -> Iterator[sa.Select[Any]]:
    """Yields queries that follow each other: the rest of the adapter of `after`, the rest of its tenant, and the
    tenants behind it. An index answers each of them in order; it could not answer a comparison of all three columns."""
    of_tenant = _NAME.where(tenants.c.name == after.tenant)
    yield of_tenant.where(adapters.c.name == after.adapter, versions.c.number > after.number)
    if adapter is None:
        yield of_tenant.where(adapters.c.name > after.adapter)
    if tenant is None:
        yield _NAME.where(tenants.c.name > after.tenant)
