"""Residency: what is in memory, what stays there, and what leaves."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Final, TypeVar

from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.changes import (
    AdapterDeleted,
    Change,
    EverythingChanged,
    TenantDeleted,
    VersionDeleted,
    VersionEncoded,
)
from prefix_service.catalog.records import Principal, Version, VersionName
from prefix_service.catalog.threads import write_catalog
from prefix_service.catalog.usage import UsageStore
from prefix_service.library import advice
from prefix_service.library.advice import Advice, PinnedVersion
from prefix_service.library.library import Library, key_of
from prefix_service.prefix.references import Reference
from prefix_service.registry.admission import PLATFORM, Admission
from prefix_service.registry.keys import VersionKey
from prefix_service.registry.registry import AdapterRegistry
from prefix_service.registry.report import EvictionReport, ResidentReport, ShareReport, TierReport
from prefix_service.registry.snapshot import place_of

T = TypeVar("T")

_MOST_EXAMINED: Final = 200  # pinned versions, the largest

ResidentPlace = tuple[int, VersionName]
"""The place of a version among those in memory, the largest first: its bytes, and its name."""


@dataclass(frozen=True, slots=True)
class Overview:
    """A snapshot of the memory: both budgets, the tenants with the most bytes in each, the latest evictions, the
    largest versions, and the place of the last of these versions if others follow, else None."""

    tiers: Sequence[TierReport]
    shares: Sequence[ShareReport]
    evicted: Sequence[EvictionReport]
    resident: Sequence[ResidentReport]
    last: ResidentPlace | None


class Residency:
    """The memory of this process, for callers that are already authorised."""

    def __init__(
        self,
        library: Library,
        registry: AdapterRegistry,
        admission: Admission,
        audit: AuditLog,
        usage: UsageStore,
    ) -> None:
        self._library, self._registry, self._admission = library, registry, admission
        self._audit, self._usage = audit, usage

    async def pin(self, version: Version, by: Principal, *, pinned: bool) -> None:
        """Loads a version on request, records it in the audit log, and pins it if `pinned`.

        Raises:
            Unauthenticated, NotFound: `by` has lost its authority; nothing is pinned.
            OutOfSpace, Unavailable, Overloaded: the memory budget does not allow it now.
        """
        await self._library.load(version)
        add = partial(self._audit.add, by, "residency.loaded", version.tenant, str(version), pinned=pinned)
        await write_catalog(add)
        loaded = await self._library.load(version)  # it may have been evicted while the change was recorded
        self._registry.pin(key_of(loaded), pinned=pinned)

    async def unload_all(self, tenant: str, adapter: str, by: Principal) -> None:
        """Evicts all versions of an adapter; the audit log names the latest version, and those that were in memory.

        Raises:
            Unauthenticated, NotFound: `by` has lost its authority, or there is no such adapter.
        """
        latest = await self._library.resolve(tenant, Reference(adapter))
        present = [VersionName(*key[:4]) for key in self._registry.versions() if key[:2] == (tenant, adapter)]
        await self.unload(latest, by)
        for version in present:
            if version.number != latest.number:
                await self.unload(version, by)

    async def unload(self, version: Version | VersionName, by: Principal) -> None:
        """Evicts a version; the next request loads it again.

        Raises:
            Unauthenticated, NotFound: `by` has lost its authority; the version stays in memory.
        """
        await write_catalog(self._audit.add, by, "residency.unloaded", version.tenant, str(version))
        self._registry.forget(VersionKey(version.tenant, version.adapter, version.number, version.digest))

    def state(self, version: Version | VersionName) -> dict[str, bool | str]:
        """Returns whether a version is resident and pinned, and on which device."""
        return self._registry.state(VersionKey(version.tenant, version.adapter, version.number, version.digest))

    def versions(self, tenant: str | None) -> list[VersionName]:
        """Returns the versions in memory, of a tenant or of all, in the order of names and numbers."""
        return [VersionName(*key[:4]) for key in sorted(self._registry.versions()) if tenant in (None, key.tenant)]

    async def overview(self, limit: int, after: ResidentPlace | None, write: Callable[[Overview], T]) -> T:
        """Returns what `write` makes, in a thread, of what is in memory: up to `limit` tenants of each budget, up to
        `limit` evictions, and up to `limit` versions, beginning behind `after`."""
        tiers, snapshot = self._registry.tiers(), self._registry.snapshot()
        begin = None if after is None else (-after[0], VersionKey(*astuple(after[1])))

        def read() -> T:
            found = snapshot.resident(limit + 1, begin)
            last = None
            if len(found) > limit:
                nbytes, key = place_of(found[limit - 1])
                last = -nbytes, VersionName(*key[:4])
            return write(Overview(tiers, snapshot.shares(limit), snapshot.evicted(limit), found[:limit], last))

        return await self._admission.run(PLATFORM, read)

    async def advice(self, days: int) -> list[Advice]:
        """Returns what an operator may do about the memory of this process. Pinned versions are unread if no process
        has recorded a read for so many days; the 200 largest are examined.

        Raises:
            StorageFailed: the catalog refuses.
        """
        tiers, snapshot = self._registry.tiers(), self._registry.snapshot()

        def examine() -> list[Advice]:
            pinned = {VersionName(*key[:4]): nbytes for key, nbytes in snapshot.pinned(_MOST_EXAMINED)}
            unread = [
                PinnedVersion(name.tenant, name.adapter, name.number, pinned[name])
                for name in self._usage.unread(pinned, days)
            ]
            return [*advice.of_unread(unread, days), *advice.of_tiers(tiers)]

        return await self._admission.run(PLATFORM, examine)

    def on_changes(self, changes: Sequence[Change]) -> None:
        """Take what was deleted or encoded again out of memory, whichever process did it."""
        tenants, adapters = set[str](), set[tuple[str, str]]()
        for change in changes:
            match change:
                case TenantDeleted(tenant):
                    tenants.add(tenant)
                case AdapterDeleted(tenant, adapter):
                    adapters.add((tenant, adapter))
                case VersionDeleted() | VersionEncoded():
                    self._registry.forget(VersionKey(change.tenant, change.adapter, change.version, change.digest))
                case EverythingChanged():
                    self._registry.forget_where(lambda _: True)
        if tenants or adapters:
            self._registry.forget_where(lambda version: version.tenant in tenants or version[:2] in adapters)
