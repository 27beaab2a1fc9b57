"""A bounded cache in which no tenant displaces another tenant's equal share."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Shares(Generic[K, V]):
    """Values by key, each with the tenant that pays for it and its size. Pure state.

    All values together have at most the size `most`. If an addition exceeds it, the tenant that adds loses its oldest
    values if it has more than an equal share; otherwise the tenant with the most loses its oldest.
    """

    def __init__(self, most: int) -> None:
        self.size = 0
        self._most = most
        self._known: dict[K, tuple[V, str, int]] = {}
        self._of: dict[str, OrderedDict[K, int]] = {}
        self._sizes: dict[str, int] = {}

    def get(self, key: K) -> V | None:
        """Returns a value, or None if it is not cached."""
        found = self._known.get(key)
        return None if found is None else found[0]

    def put(self, tenant: str, key: K, value: V, size: int = 1) -> None:
        """Adds or replaces a value. A value larger than the whole cache is not kept."""
        self.pop(key)
        if size > self._most:
            return
        self._known[key] = value, tenant, size
        self._of.setdefault(tenant, OrderedDict())[key] = size
        self._sizes[tenant] = self._sizes.get(tenant, 0) + size
        self.size += size
        while self.size > self._most:
            self.pop(next(iter(self._of[self._loser(tenant)])))

    def pop(self, key: K) -> None:
        """Removes a value, if it is cached."""
        if (found := self._known.pop(key, None)) is None:
            return
        _, tenant, size = found
        del self._of[tenant][key]
        self._sizes[tenant] -= size
        self.size -= size
        if not self._of[tenant]:
            del self._of[tenant], self._sizes[tenant]

    def pop_tenant(self, tenant: str) -> None:
        """Removes all values of a tenant."""
        for key in list(self._of.get(tenant, ())):
            self.pop(key)

    def clear(self) -> None:
        """Forgets all values."""
        self._known.clear()
        self._of.clear()
        self._sizes.clear()
        self.size = 0

    def size_of(self, tenant: str) -> int:
        """Returns the size of a tenant's values."""
        return self._sizes.get(tenant, 0)

    def _loser(self, adding: str) -> str:
        if self._sizes[adding] * len(self._sizes) > self._most:
            return adding
        return max(self._sizes, key=self._sizes.__getitem__)
