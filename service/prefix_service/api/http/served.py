"""Notes the versions that an answer hands out in its request's scope, for usage and the log when the request ends."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from starlette.types import Scope

from prefix_service.catalog.records import Version

SERVED: Final = "served"
"""Scope key of a tuple of `Served`, one per version that the answer contains."""

FIRST_BYTE: Final = "first byte"
"""Scope key of the position in the whole body at which the answer begins; missing if it is the whole body."""

_LOADED: Final = "loaded"


@dataclass(frozen=True, slots=True)
class Served:
    """A version in an answer, and the prefix tokens of all its rows."""

    tenant: str
    adapter: str
    version: int
    prefix_tokens: int


def served(version: Version, rows: int) -> Served:
    """Returns the entry of an answer with `rows` rows of a version."""
    tokens = rows * version.prefix_config.num_virtual_tokens
    return Served(version.tenant, version.adapter, version.number, tokens)


def served_together(versions: Iterable[Version]) -> tuple[Served, ...]:
    """Returns the entries of an answer that contains these versions, each as often as it occurs."""
    rows = Counter(served(version, 1) for version in versions)
    return tuple(replace(one, prefix_tokens=count * one.prefix_tokens) for one, count in rows.items())


def note_load(scope: Scope, version: Version, seconds: float) -> None:
    """Note that a version, which was in no memory, was read for this request. May be called in any thread."""
    scope.setdefault(_LOADED, {})[version.tenant, version.adapter, version.number] = seconds


def is_loaded(scope: Scope, part: Served) -> bool:
    """Returns whether a version was loaded for this request."""
    return (part.tenant, part.adapter, part.version) in scope.get(_LOADED, ())


def load_seconds(scope: Scope) -> float | None:
    """Returns how long the longest load for this request took, since loads run in parallel; None if there was none."""
    loads: dict[tuple[str, str, int], float] | None = scope.get(_LOADED)
    return max(list(loads.values())) if loads else None
