"""The state of the registry's memory at one moment, which a thread can examine while the registry goes on."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeAlias, get_args

from prefix_service.prefix.variant import Span
from prefix_service.registry.accounts import Entry, K
from prefix_service.registry.eviction import Eviction
from prefix_service.registry.keys import RenderingKey, VersionKey
from prefix_service.registry.report import (
    EvictionReport,
    Reason,
    RenderingReport,
    ResidentReport,
    ShareReport,
    TierName,
)

Place: TypeAlias = tuple[int, VersionKey]
"""A version's position in the order of `Snapshot.resident`: its bytes, negated, and its key."""

_MOST_RENDERINGS: Final = 8  # of one version that are shown
_SUMS: Final = ("device_bytes", "host_bytes", "renderings", "uses", "readers")


@dataclass(frozen=True, slots=True)
class TierSnapshot(Generic[K]):
    """The entries of one tier, the keys that were being loaded, each tenant's bytes and guaranteed `share`, and the
    latest evictions.

    The counts of an entry can change after the snapshot was taken.
    """

    name: TierName
    entries: Sequence[tuple[K, Entry[K]]]
    loading: frozenset[K]
    tenants: Sequence[tuple[str, int]]
    share: int
    evicted: Sequence[Eviction[K]]

    def reason(self, key: K, entry: Entry[K]) -> Reason:
        """Returns why an entry stays in memory."""
        if key in self.loading:
            return "loading"
        if entry.leases:
            return "reading"
        if entry.pinned:
            return "pinned"
        return "share" if entry.owner.used <= self.share else "kept"

    def shares(self, limit: int) -> list[ShareReport]:
        """Returns the shares of the `limit` tenants with the most bytes, the largest first."""
        most = heapq.nsmallest(limit, self.tenants, key=lambda tenant: (-tenant[1], tenant[0]))
        return [ShareReport(name, self.name, used, self.share) for name, used in most]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of both tiers."""

    prefixes: TierSnapshot[VersionKey]
    renderings: TierSnapshot[RenderingKey]

    def shares(self, limit: int) -> list[ShareReport]:
        """Returns the shares of up to `limit` tenants in each tier, the device first, the largest first."""
        return [*self.prefixes.shares(limit), *self.renderings.shares(limit)]

    def evicted(self, limit: int) -> list[EvictionReport]:
        """Returns up to `limit` of the latest evictions, the newest first."""
        found = [_evicted("device", one.key, one) for one in self.prefixes.evicted]
        found += [_evicted("host", one.key.version, one) for one in self.renderings.evicted]
        return heapq.nlargest(limit, found, key=lambda one: one.at)

    def resident(self, limit: int, after: Place | None = None) -> list[ResidentReport]:
        """Returns up to `limit` versions in memory, the largest first, starting behind the position `after`."""
        totals: Counter[VersionKey] = Counter()
        for key, entry in self.prefixes.entries:
            totals[key.whole] += entry.nbytes
        for rendering, part in self.renderings.entries:
            totals[rendering.version.whole] += part.nbytes
        places = ((-nbytes, key) for key, nbytes in totals.items())
        found = heapq.nsmallest(limit, (place for place in places if after is None or place > after))
        return self._rows([key for _, key in found])

    def pinned(self, limit: int) -> list[tuple[VersionKey, int]]:
        """Returns up to `limit` pinned versions, the largest first, and their bytes on the device."""
        found = ((key.whole, entry.nbytes) for key, entry in self.prefixes.entries if entry.pinned)
        return heapq.nsmallest(limit, found, key=lambda one: (-one[1], one[0]))

    def _rows(self, keys: Sequence[VersionKey]) -> list[ResidentReport]:
        rows: dict[VersionKey, ResidentReport | None] = dict.fromkeys(keys)
        for prefix, entry in self.prefixes.entries:
            if (key := prefix.whole) in rows:
                row = _row(key, entry, self.prefixes.reason(prefix, entry))
                rows[key] = _joined(rows[key], replace(row, device_bytes=entry.nbytes))
        renderings: defaultdict[VersionKey, list[RenderingReport]] = defaultdict(list)
        for rendering, part in self.renderings.entries:
            if (key := rendering.version.whole) in rows:
                row = _row(key, part, self.renderings.reason(rendering, part))
                rows[key] = _joined(rows[key], replace(row, host_bytes=part.nbytes, renderings=1))
                renderings[key].append(_rendering(rendering, part))
        return [
            replace(row, largest_renderings=_largest(renderings[key])) for key, row in rows.items() if row is not None
        ]


def place_of(row: ResidentReport) -> Place:
    """Returns the position of a version in `Snapshot.resident`."""
    return -(row.device_bytes + row.host_bytes), VersionKey(row.tenant, row.adapter, row.version, row.digest)


def _row(key: VersionKey, entry: Entry[Any], reason: Reason) -> ResidentReport:
    readers = entry.leases - (reason == "loading")  # a load holds one lease of its own
    return ResidentReport(
        key.tenant, key.adapter, key.version, key.digest, 0, 0, 0, entry.uses, readers, entry.pinned, reason
    )


def _rendering(key: RenderingKey, entry: Entry[Any]) -> RenderingReport:
    ranges = _written(key.layers), _written(key.kv_heads)
    return RenderingReport(key.dtypes.single, *key.dtypes, *ranges, entry.nbytes, entry.uses)


def _written(span: Span) -> str:
    """Returns a range as a request names it."""
    return f"{span[0]}:{span[1]}"


def _largest(renderings: Sequence[RenderingReport]) -> list[RenderingReport]:
    return heapq.nsmallest(
        _MOST_RENDERINGS,
        renderings,
        key=lambda one: (-one.nbytes, one.key_dtype, one.value_dtype, one.layers, one.kv_heads),
    )


def _evicted(tier: TierName, key: VersionKey, one: Eviction[Any]) -> EvictionReport:
    of_version = key.tenant, key.adapter, key.version
    return EvictionReport(one.at, tier, *of_version, one.nbytes, one.uses, one.for_tenant, one.reason)


def _joined(first: ResidentReport | None, second: ResidentReport) -> ResidentReport:
    if first is None:
        return second
    return replace(
        first,
        pinned=first.pinned or second.pinned,
        reason=min(first.reason, second.reason, key=get_args(Reason).index),
        **{name: getattr(first, name) + getattr(second, name) for name in _SUMS},
    )
