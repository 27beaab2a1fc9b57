"""A cache of fetched prefixes in memory, under a byte budget; the least recently used is dropped first."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefix_service.system.forks import renew_in_child

if TYPE_CHECKING:
    from prefix_service.client.cache.memory import MemoryFile
    from prefix_service.client.prefixes.prefix import Prefix


Stamp = tuple[int, int]
"""A moment of a watch: how many changes it had told of, and how many writes of this client were answered."""


@dataclass(frozen=True, slots=True)
class Cached:
    """A prefix that nobody may write to, with the entity tag that revalidates it.

    `file` is the file that its tensor is in, of which each caller gets a private mapping; without one, each gets a
    copy. `catalog` is the one that the service named with it, if any. `stamp` is the moment when it was last asked for,
    if a watch was there to judge it by. `has_base_model` is whether the service said then that it has a fingerprint of
    the version's base model.
    """

    prefix: "Prefix"
    etag: str
    file: "MemoryFile | None" = None
    catalog: str | None = None
    stamp: Stamp | None = None
    has_base_model: bool = False


class LocalCache:
    """A cache bounded by bytes; safe to share between threads. Deletions and revoked keys do not affect it."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._used = 0
        self._entries: OrderedDict[Hashable, Cached] = OrderedDict()
        self._lock = threading.Lock()
        renew_in_child(self)

    def renew(self) -> None:
        """Keeps the entries in a forked child, whatever a thread of the parent was doing with them."""
        self._lock = threading.Lock()
        self._used = sum(cached.prefix.kv.nbytes for cached in self._entries.values())

    def get(self, key: Hashable) -> Cached | None:
        """Returns the cached prefix of a key, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def keys_of(self, start: tuple[str, ...]) -> list[tuple[Any, ...]]:
        """Returns the keys that begin with some names."""
        with self._lock:
            return [key for key in self._entries if isinstance(key, tuple) and key[: len(start)] == start]

    def keeps(self, cached: Cached) -> bool:
        """Returns whether a prefix fits the budget."""
        return cached.prefix.kv.nbytes <= self._budget

    def put(self, key: Hashable, cached: Cached) -> None:
        """Caches a prefix; one that exceeds the budget alone is not kept."""
        with self._lock:
            self._drop(key)
            if not self.keeps(cached):
                return
            self._entries[key] = cached
            self._used += cached.prefix.kv.nbytes
            while self._used > self._budget:
                self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Drops every entry."""
        with self._lock:
            self._entries.clear()
            self._used = 0

    def _drop(self, key: Hashable) -> None:
        dropped = self._entries.pop(key, None)
        if dropped is not None:
            self._used -= dropped.prefix.kv.nbytes
