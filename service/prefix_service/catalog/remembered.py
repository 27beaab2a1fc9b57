"""What references mean, remembered in this process until their adapter changes."""

import threading
from collections.abc import Sequence
from typing import Final

from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.changes import AdapterChange, Change, EverythingChanged, TenantDeleted
from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.records import Version
from prefix_service.prefix.references import Reference
from prefix_service.system.shares import Shares

_MOST_BYTES: Final = 256 << 20
_OF_ADAPTER: Final = 1024  # selectors of the same adapter

_Known = dict[str, Version]
"""Versions of an adapter by selector."""


class RememberedVersions:
    """Safe to share between threads. What is missing is not remembered: it may be there the next moment."""

    def __init__(self, catalog: Catalog, feed: ChangeFeed) -> None:
        self._catalog = catalog
        self._feed = feed
        self._lock = threading.Lock()
        self._forgotten = 0
        self._known: Shares[tuple[str, str], _Known] = Shares(_MOST_BYTES)
        feed.listen(self._on_changes)

    def get(self, tenant: str, reference: Reference) -> Version | None:
        """The version that a reference means, if that is known without a look into the catalog."""
        known = self._known.get((tenant, reference.adapter))
        return known.get(reference.selector) if known is not None and self._feed.are_known else None

    def resolve(self, tenant: str, reference: Reference) -> Version:
        """The version that a reference means now. Blocking.

        Raises:
            NotFound: there is none.
            StorageFailed: the catalog cannot be read.
        """
        before = self._forgotten
        version = self._catalog.resolve(tenant, reference)
        with self._lock:
            if before == self._forgotten:  # else it may have been read before a change that was heard meanwhile
                self._remember(tenant, reference, version)
        return version

    def _remember(self, tenant: str, reference: Reference, version: Version) -> None:
        key = tenant, reference.adapter
        known = self._known.get(key) or {}
        # Readers look into it without the lock, so it is replaced, not changed.
        kept = dict(list(known.items())[-_OF_ADAPTER + 1 :]) | {reference.selector: version}
        self._known.put(tenant, key, kept, sum(version.memory for version in kept.values()))

    def _on_changes(self, changes: Sequence[Change]) -> None:
        with self._lock:
            self._forgotten += 1
            for change in changes:
                match change:
                    case AdapterChange(tenant, adapter):
                        self._known.pop((tenant, adapter))
                    case TenantDeleted(tenant):
                        self._known.pop_tenant(tenant)
                    case EverythingChanged():
                        self._known.clear()
