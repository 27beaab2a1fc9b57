"""Prefixes that a worker has fetched, in memory under a budget; least recently used leaves first."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefix_service.system.forks import renew_in_child

if TYPE_CHECKING:
    from prefix_service.client.cache.memory import MemoryFile
    from prefix_service.client.prefixes.prefix import Prefix


@dataclass(frozen=True, slots=True)
class Cached:
    """A prefix that nobody may write to, the entity tag that revalidates it, and the file that its tensor lies in, from
    which each caller gets a private mapping; where it lies in none, each gets a copy."""

    prefix: "Prefix"
    etag: str
    file: "MemoryFile | None" = None


class LocalCache:
    """Bounded by bytes, safe to share between threads. A deletion or a revoked key does not reach into it."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._used = 0
        self._entries: OrderedDict[Hashable, Cached] = OrderedDict()
        self._lock = threading.Lock()
        renew_in_child(self)

    def renew(self) -> None:
        """Keep the entries in a forked child, whatever a thread of the parent was doing with them."""
        self._lock = threading.Lock()
        self._used = sum(cached.prefix.kv.nbytes for cached in self._entries.values())

    def get(self, key: Hashable) -> Cached | None:
        """What is cached under a key."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def keeps(self, cached: Cached) -> bool:
        """Whether the budget has room for a prefix if it is alone."""
        return cached.prefix.kv.nbytes <= self._budget

    def put(self, key: Hashable, cached: Cached) -> None:
        """Cache a prefix; one that exceeds the budget alone is not kept."""
        with self._lock:
            self._drop(key)
            if not self.keeps(cached):
                return
            self._entries[key] = cached
            self._used += cached.prefix.kv.nbytes
            while self._used > self._budget:
                self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._used = 0

    def _drop(self, key: Hashable) -> None:
        dropped = self._entries.pop(key, None)
        if dropped is not None:
            self._used -= dropped.prefix.kv.nbytes
