"""Notes the versions that an answer hands out in its request's scope, where usage is counted when the request ends."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from starlette.types import Scope

from prefix_service.catalog.records import Version

SERVED: Final = "served"
"""In the scope: a tuple of `Served`, one for each version that the answer is made of."""

FIRST_BYTE: Final = "first byte"
"""In the scope: where in the whole body the answer begins; absent where it is the whole body."""

_LOADED: Final = "loaded"


@dataclass(frozen=True, slots=True)
class Served:
    """A version in an answer, and the prefix tokens of all its rows."""

    tenant: str
    adapter: str
    version: int
    prefix_tokens: int


def served(version: Version, rows: int) -> Served:
    """Returns what an answer with so many rows of a version hands out."""
    tokens = rows * version.prefix_config.num_virtual_tokens
    return Served(version.tenant, version.adapter, version.number, tokens)


def served_together(versions: Iterable[Version]) -> tuple[Served, ...]:
    """Returns what an answer hands out that contains these versions, each as often as it comes."""
    rows = Counter(served(version, 1) for version in versions)
    return tuple(replace(one, prefix_tokens=count * one.prefix_tokens) for one, count in rows.items())


def note_load(scope: Scope, version: Version) -> None:
    """Note that a version is loaded for this request, which is in no memory. May be called in any thread."""
    scope.setdefault(_LOADED, []).append((version.tenant, version.adapter, version.number))


def is_loaded(scope: Scope, part: Served) -> bool:
    """Returns whether a version was loaded for this request."""
    return (part.tenant, part.adapter, part.version) in scope.get(_LOADED, ())


def is_any_loaded(scope: Scope) -> bool:
    """Returns whether any version was loaded for this request."""
    return _LOADED in scope
