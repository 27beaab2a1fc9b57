"""What a registry tells of itself: where bytes are, why they are there, and what was asked for."""

from dataclasses import dataclass
from typing import Literal

TierName = Literal["device", "host"]
Reason = Literal["loading", "reading", "pinned", "share", "kept"]
"""Why a version is in memory: it is being loaded or read, it is pinned, its tenant is within its guaranteed share, or
the policy has kept it so far."""


@dataclass(frozen=True, slots=True)
class TierReport:
    """One budget of bytes. `used` holds `pinned`; `readers` are the leases of this moment. The rest are counts since
    the start: of lookups that found their value (`hits`), began its load (`misses`) or joined one under way (`waits`);
    of entries that left for others; of loads that ended well and badly, and seconds spent in them."""

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
class ResidentReport:
    """One version in memory: bytes of its prefix on the device, of its `renderings` in host memory, lookups since it
    came (`uses`), leases of this moment, and why it stays."""

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


@dataclass(frozen=True, slots=True)
class ShareReport:
    """What a tenant has in one tier, in bytes, beside the share of the budget that is guaranteed to it."""

    tenant: str
    tier: TierName
    used: int
    share: int
