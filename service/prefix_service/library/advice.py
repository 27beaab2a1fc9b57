"""Advice on the memory of a process: what an operator may do, in words, with the numbers that say why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from prefix_service.registry.report import TierName, TierReport
from prefix_service.system.sizes import human_bytes

AdviceCode = Literal["pinned-unread", "low-hit-ratio"]

_NAMES: Final[dict[TierName, tuple[str, str]]] = {
    "device": ("device memory", "PREFIX_DEVICE_BYTES"),
    "host": ("host memory", "PREFIX_RENDERING_BYTES"),
}
_LOW: Final = 0.8  # hits of all lookups
_ENOUGH: Final = 1000  # lookups that say something


@dataclass(frozen=True, slots=True)
class PinnedVersion:
    """A pinned version and its bytes on the device."""

    tenant: str
    adapter: str
    version: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Advice:
    """What an operator may do about a tier, and why: `text` says it in words. `nbytes` are the bytes that it concerns,
    and `versions` the versions, the largest first; both are 0 and empty where no version is named."""

    code: AdviceCode
    tier: TierName
    text: str
    nbytes: int = 0
    versions: Sequence[PinnedVersion] = ()


def of_unread(unread: Sequence[PinnedVersion], days: int) -> list[Advice]:
    """Returns the advice on pinned versions that nobody has read for so many days."""
    if not unread:
        return []
    nbytes = sum(version.nbytes for version in unread)
    count, verb = ("1 pinned version", "holds") if len(unread) == 1 else (f"{len(unread):,} pinned versions", "hold")
    span = "1 day" if days == 1 else f"{days} days"
    text = f"{count} unread for {span} {verb} {human_bytes(nbytes)} on the device: unpin what is not needed."
    return [Advice("pinned-unread", "device", text, nbytes, unread)]


def of_tiers(tiers: Sequence[TierReport]) -> list[Advice]:
    """Returns the advice that the counts of both budgets lead to."""
    found = []
    for tier in tiers:
        name, setting = _NAMES[tier.name]
        lookups = tier.hits + tier.misses
        if lookups >= _ENOUGH and tier.evictions and tier.hits < _LOW * lookups:
            text = (
                f"Only {tier.hits / lookups:.0%} of the lookups in {name} found what they asked for, and "
                f"{tier.evictions:,} evictions made room: a larger {setting} would save loads."
            )
            found.append(Advice("low-hit-ratio", tier.name, text))
    return found
