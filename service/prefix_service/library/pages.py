"""Listings, a page at a time: read from the catalog and written in threads, in their tenant's turn."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final, Generic, TypeVar

from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.records import (
    Adapter,
    AdapterOrder,
    AdapterPlace,
    AuditEntry,
    AuditFilter,
    Dimension,
    Key,
    Tenant,
    Use,
    Version,
    VersionName,
)
from prefix_service.catalog.tenants import Tenants
from prefix_service.catalog.threads import read_catalog
from prefix_service.catalog.usage import UsageStore
from prefix_service.registry.admission import PLATFORM, Admission

Row = TypeVar("Row")
Place = TypeVar("Place")

PAGE_BYTES: Final = 2 << 20
"""A page ends with the item that makes it this long, whatever its limit."""

_TOGETHER: Final = 100  # rows that are in memory together


@dataclass(frozen=True, slots=True)
class WantedPage(Generic[Row, Place]):
    """Up to `limit` items behind the place `after`, or the first ones if it is None; each as `write` writes it. `write`
    is called in a thread."""

    after: Place | None
    limit: int
    write: Callable[[Row], bytes]


@dataclass(frozen=True, slots=True)
class Page(Generic[Place]):
    """Written items with commas between them, and the place of the last item if others follow, else None."""

    items: bytes
    last: Place | None


class Pages:
    """The listings of the catalog. Any method may also raise StorageFailed, when the catalog refuses."""

    def __init__(
        self,
        listings: Listings,
        tenants: Tenants,
        keyring: Keyring,
        audit: AuditLog,
        usage: UsageStore,
        admission: Admission,
    ) -> None:
        self._listings, self._tenants, self._keyring = listings, tenants, keyring
        self._audit, self._usage, self._admission = audit, usage, admission

    async def adapters(
        self,
        tenant: str,
        page: WantedPage[Adapter, AdapterPlace],
        *,
        order: AdapterOrder,
        search: str | None,
        base_model: str | None,
    ) -> Page[AdapterPlace]:
        """Returns adapters of a tenant, sorted by `order`.

        Raises:
            NotFound: there is no such tenant.
        """
        await read_catalog(self._tenants.require, tenant)

        def load(after: AdapterPlace | None, limit: int) -> list[Adapter]:
            return self._listings.adapters(
                tenant, after=after, limit=limit, order=order, search=search, base_model=base_model
            )

        return await self._page(tenant, load, lambda adapter: AdapterPlace.of(adapter, order), page)

    async def versions(self, tenant: str, adapter: str, page: WantedPage[Version, int]) -> Page[int]:
        """Returns versions of an adapter, newest first. The place of a version is its number.

        Raises:
            NotFound: there is no such adapter.
        """

        def load(after: int | None, limit: int) -> list[Version]:
            return self._listings.versions(tenant, adapter, before=after, limit=limit)

        return await self._page(tenant, load, lambda version: version.number, page)

    async def index(
        self, tenant: str | None, adapter: str | None, page: WantedPage[VersionName, VersionName]
    ) -> Page[VersionName]:
        """Returns the names of an adapter's versions, of a tenant's, or of all, in the order of names and numbers."""

        def load(after: VersionName | None, limit: int) -> list[VersionName]:
            return self._listings.index(tenant, adapter, after=after, limit=limit)

        return await self._page(tenant, load, lambda version: version, page, together=page.limit + 1)

    async def tenants(self, page: WantedPage[Tenant, str]) -> Page[str]:
        """Returns tenants in the order of their names."""

        def load(after: str | None, limit: int) -> list[Tenant]:
            return self._tenants.listed(after or "", limit)

        return await self._page(None, load, lambda tenant: tenant.name, page)

    async def keys(self, tenant: str | None, page: WantedPage[Key, tuple[datetime, str]]) -> Page[tuple[datetime, str]]:
        """Returns keys of a tenant, or of the platform, oldest first. A key's place is its creation and its id.

        Raises:
            NotFound: there is no such tenant.
        """

        def load(after: tuple[datetime, str] | None, limit: int) -> list[Key]:
            return self._keyring.listed(tenant, after=after, limit=limit)

        return await self._page(tenant, load, lambda key: (key.created, key.id), page)

    async def audit(self, tenant: str | None, page: WantedPage[AuditEntry, int], *, wanted: AuditFilter) -> Page[int]:
        """Returns the changes of a tenant's resources, or of all, that are `wanted`, newest first. The place of a
        change is its id.

        Raises:
            NotFound: there is no such tenant.
        """

        def load(after: int | None, limit: int) -> list[AuditEntry]:
            return self._audit.listed(tenant, before=after, limit=limit, wanted=wanted)

        return await self._page(tenant, load, lambda entry: entry.id, page)

    async def usage(
        self,
        tenant: str | None,
        by: Collection[Dimension],
        page: WantedPage[Use, Use],
        *,
        adapter: str | None,
        since: datetime | None,
        until: datetime | None,
    ) -> Page[Use]:
        """Returns usage of a tenant, or of each of them, by hour and by the dimensions of `by`; of one adapter, or of
        all.

        Raises:
            NotFound: there is no such tenant.
        """

        def load(after: Use | None, limit: int) -> list[Use]:
            return self._usage.listed(tenant, by, adapter=adapter, since=since, until=until, after=after, limit=limit)

        return await self._page(tenant, load, lambda use: use, page)

    async def _page(
        self,
        tenant: str | None,
        load: Callable[[Place | None, int], Sequence[Row]],
        place: Callable[[Row], Place],
        page: WantedPage[Row, Place],
        together: int = _TOGETHER,
    ) -> Page[Place]:
        return await self._admission.run(tenant or PLATFORM, partial(_read, load, place, page, together))


def _read(
    load: Callable[[Place | None, int], Sequence[Row]],
    place: Callable[[Row], Place],
    page: WantedPage[Row, Place],
    together: int,
) -> Page[Place]:
    """Reads and writes a page, up to `together` rows at a time. `load` returns up to so many rows behind a place."""
    items: list[bytes] = []
    size, last = 0, page.after
    while True:
        asked = min(together, page.limit + 1 - len(items))
        rows = load(last, asked)
        for row in rows:
            if len(items) == page.limit or size >= PAGE_BYTES:
                return Page(b",".join(items), last)
            items.append(page.write(row))
            size, last = size + len(items[-1]), place(row)
        if len(rows) < asked:
            return Page(b",".join(items), None)
