"""Reports of a registry: the bytes of each budget, the versions in memory, and the tenants' shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

TierName = Literal["device", "host"]
Reason = Literal["loading", "reading", "pinned", "share", "kept"]
"""Why a version is in memory: it is being loaded or read, it is pinned, its tenant is within its guaranteed share, or
the eviction policy has kept it so far.
"""
EvictionReason = Literal["probation", "idle", "memory"]
"""Why something was evicted: room was needed, and it was new and hardly used (`probation`), or had been used more, but
not lately (`idle`); or the machine had no memory left, although the budget had (`memory`).
"""


@dataclass(frozen=True, slots=True)
class TierReport:
    """The state of one budget, in bytes, and its counts.

    `pinned` is a part of `used`; `readers` are the current leases. The other counts are totals since the start: lookups
    that found their value (`hits`), started its load (`misses`) or joined one in progress (`waits`); `evictions`; loads
    that succeeded (`loads`) and failed (`failures`), and the seconds that loads took.
    """

    name: TierName
    place: str
    budget: int
    used: int
    pinned: int
    entries: int
    loading: int
    readers: int
    hits: int
    misses: int
    waits: int
    evictions: int
    loads: int
    failures: int
    load_seconds: float


@dataclass(frozen=True, slots=True)
class RenderingReport:
    """One rendering in host memory: its dtypes (`dtype` is null if keys and values have two), its layers and heads as a
    request names them (`0:32`), its bytes, and the lookups since it was made.
    """

    dtype: str | None
    key_dtype: str
    value_dtype: str
    layers: str
    kv_heads: str
    nbytes: int
    uses: int


@dataclass(frozen=True, slots=True)
class ResidentReport:
    """One version in memory.

    `device_bytes` and `host_bytes` are the bytes of its prefix on the device and of its `renderings` in host memory,
    `uses` the lookups since it was loaded, `readers` its current leases, and `reason` why it stays.
    `largest_renderings` are up to 8 of its renderings, the largest first.
    """

    tenant: str
    adapter: str
    version: int
    digest: str
    device_bytes: int
    host_bytes: int
    renderings: int
    uses: int
    readers: int
    pinned: bool
    reason: Reason
    largest_renderings: Sequence[RenderingReport] = ()


@dataclass(frozen=True, slots=True)
class ShareReport:
    """The bytes that a tenant has in one tier, and the share of the budget that is guaranteed to it."""

    tenant: str
    tier: TierName
    used: int
    share: int


@dataclass(frozen=True, slots=True)
class EvictionReport:
    """A prefix (tier `device`) or a rendering (`host`) that left memory, `nbytes` large and used `uses` times since it
    was loaded, for something of the tenant `for_tenant`, and why it was the one.
    """

    at: datetime
    tier: TierName
    tenant: str
    adapter: str
    version: int
    nbytes: int
    uses: int
    for_tenant: str
    reason: EvictionReason
