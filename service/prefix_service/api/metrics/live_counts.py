"""The counts of one worker in a slot of some seconds, and the document that sums the slots of all workers."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from prefix_service.registry.report import TierReport

BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
ALL: Final = "*"
"""Stands for all tenants together; no tenant has this name."""

_MOST_TENANTS: Final = 20  # in a document
_NO_TIME: Final = (0,) * (len(BOUNDS) + 1)


@dataclass(slots=True)
class Counts:
    """Requests of one tenant that ended in a slot: how many, their bytes, those that loaded a version, how many took
    how long (one number for each of `BOUNDS`, and one for what took longer), and problems by their codes."""

    requests: int = 0
    bytes: int = 0
    cold_loads: int = 0
    seconds: list[int] = field(default_factory=lambda: list(_NO_TIME))
    problems: dict[str, int] = field(default_factory=dict)

    def add(self, problem: str | None, seconds: float, sent: int, *, is_cold: bool) -> None:
        """Counts a request."""
        self.requests += 1
        self.bytes += sent
        self.cold_loads += is_cold
        self.seconds[bisect_left(BOUNDS, seconds)] += 1
        if problem is not None:
            self.problems[problem] = self.problems.get(problem, 0) + 1

    def merge(self, other: "Counts") -> None:
        """Adds the numbers of another."""
        self.requests += other.requests
        self.bytes += other.bytes
        self.cold_loads += other.cold_loads
        self.seconds = [a + b for a, b in zip(self.seconds, other.seconds, strict=True)]
        for code, count in other.problems.items():
            self.problems[code] = self.problems.get(code, 0) + count


@dataclass(frozen=True, slots=True)
class TierCounts:
    """A tier of a worker in a slot: its bytes at the end of the slot, and what happened during it."""

    name: str
    place: str
    budget: int
    used: int
    pinned: int
    entries: int
    hits: int
    misses: int
    evictions: int
    failures: int

    @classmethod
    def between(cls, before: TierReport | None, now: TierReport) -> "TierCounts":
        """Returns the counts between two reports; without the first one, those since the start."""
        counted = ("hits", "misses", "evictions", "failures")
        changes = {name: getattr(now, name) - (getattr(before, name) if before else 0) for name in counted}
        return cls(now.name, now.place, now.budget, now.used, now.pinned, now.entries, **changes)


@dataclass(slots=True)
class Sample:
    """A slot of one worker; `slot` numbers slots since 1970. The tenant "" is nobody's, and `ALL` is all together."""

    slot: int
    tenants: dict[str, Counts]
    in_flight: dict[str, int]
    in_flight_limit: int
    tiers: list[TierCounts]

    def to_json(self) -> dict[str, Any]:
        """Returns the sample as JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Sample":
        """Returns the sample that `to_json` wrote."""
        return cls(
            values["slot"],
            {tenant: Counts(**counts) for tenant, counts in values["tenants"].items()},
            values["in_flight"],
            values["in_flight_limit"],
            [TierCounts(**tier) for tier in values["tiers"]],
        )


def document(samples: Iterable[Sample], slots: Sequence[int], seconds: float, tenant: str | None) -> dict[str, Any]:
    """Returns the numbers of some slots as columns, summed over workers: of one tenant, or of all with `tenant` None,
    which alone shows the tiers, and the tenants with the most requests."""
    by_slot: dict[int, list[Sample]] = defaultdict(list)
    wanted = set(slots)
    for sample in samples:
        if sample.slot in wanted:
            by_slot[sample.slot].append(sample)
    name = ALL if tenant is None else tenant
    sums = [merged(sample.tenants[name] for sample in by_slot[slot] if name in sample.tenants) for slot in slots]
    codes = sorted({code for counts in sums for code in counts.problems})
    last = [sample for slot in slots[-1:] for sample in by_slot[slot]]
    return {
        "seconds": seconds,
        "at": [int(slot * seconds) for slot in slots],
        "requests": [counts.requests for counts in sums],
        "bytes": [counts.bytes for counts in sums],
        "cold_loads": [counts.cold_loads for counts in sums],
        "p50": [quantile(counts.seconds, 0.5) for counts in sums],
        "p99": [quantile(counts.seconds, 0.99) for counts in sums],
        "problems": {code: [counts.problems.get(code, 0) for counts in sums] for code in codes},
        "in_flight": [sum(sample.in_flight.get(name, 0) for sample in by_slot[slot]) for slot in slots],
        "in_flight_limit": sum(sample.in_flight_limit for sample in last) if tenant is None else None,
        "tiers": _tiers(by_slot, slots) if tenant is None else [],
        "tenants": _busiest(by_slot.values()) if tenant is None else [],
    }


def merged(parts: Iterable[Counts]) -> Counts:
    """Returns the sums of some counts."""
    total = Counts()
    for part in parts:
        total.merge(part)
    return total


def _tiers(by_slot: Mapping[int, Sequence[Sample]], slots: Sequence[int]) -> list[dict[str, Any]]:
    """Returns each tier with the columns of its numbers; workers' tiers of the same name are one."""
    names = sorted({tier.name for samples in by_slot.values() for sample in samples for tier in sample.tiers})
    columns = ("budget", "used", "pinned", "entries", "hits", "misses", "evictions", "failures")
    found = []
    for name in names:
        tiers = [[tier for sample in by_slot[slot] for tier in sample.tiers if tier.name == name] for slot in slots]
        found.append({"name": name} | {key: [sum(getattr(t, key) for t in some) for some in tiers] for key in columns})
    return found


def _busiest(slots: Iterable[Sequence[Sample]]) -> list[dict[str, Any]]:
    requests: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for samples in slots:
        for sample in samples:
            for tenant, counts in sample.tenants.items():
                if tenant not in ("", ALL):
                    requests[tenant] += counts.requests
                    nbytes[tenant] += counts.bytes
    most = requests.most_common(_MOST_TENANTS)
    return [{"tenant": tenant, "requests": count, "bytes": nbytes[tenant]} for tenant, count in most]


def quantile(seconds: Sequence[int], part: float) -> float | None:
    """Returns the time in seconds that a part of the requests did not exceed, estimated as Prometheus does; None
    without requests."""
    total = sum(seconds)
    if not total:
        return None
    rank, seen = part * total, 0
    for number, count in enumerate(seconds):
        if count and seen + count >= rank:
            if number == len(BOUNDS):
                break
            low = BOUNDS[number - 1] if number else 0.0
            return round(low + (BOUNDS[number] - low) * (rank - seen) / count, 6)
        seen += count
    return BOUNDS[-1]
