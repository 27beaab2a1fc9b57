"""What one tenant has in memory, and in which order it leaves: S3-FIFO, by bytes.

Yang, Zhang, Qiu, Yue and Vigfusson, "FIFO queues are all you need for cache eviction" (SOSP 2023): what is new stands
on probation, a tenth of the bytes; what was used again there, or comes back soon after it left, moves to the main
queue. So what is read once passes through the tenth and leaves the rest alone.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_PROBATION: Final = 0.1
_GHOSTS: Final = 0.9
_PROMOTED: Final = 2  # uses on probation that lead to the main queue
CREDIT: Final = 3  # rounds in the main queue that uses may earn


@dataclass(slots=True, eq=False)
class Entry(Generic[K]):
    """A resident key's bytes, whose they are, and why it may not leave."""

    nbytes: int
    owner: "Tenant[K]"
    leases: int = 0
    pinned: bool = False
    uses: int = 0
    credit: int = 0
    proven: bool = False
    resident: bool = True

    @property
    def held(self) -> bool:
        """Whether it may not leave now."""
        return self.pinned or self.leases > 0


class Tenant(Generic[K]):
    """`used` bytes, of which `held` may not leave now. What is pinned stands in no queue; what is leased is passed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries = 0
        self.used = 0
        self.held = 0
        self.used_at = 0  # the residency's count of uses at the last one
        self._probation: OrderedDict[K, Entry[K]] = OrderedDict()
        self._main: OrderedDict[K, Entry[K]] = OrderedDict()
        self._probation_bytes = 0
        self._ghosts: OrderedDict[K, int] = OrderedDict()
        self._ghost_bytes = 0

    @property
    def evictable(self) -> int:
        """Bytes that may leave now."""
        return self.used - self.held

    def on_probation_above(self, share: int) -> bool:
        """Whether more stands on probation than its part of the tenant's bytes, or of its share if that is more."""
        return self._probation_bytes > _PROBATION * max(share, self.used)

    def recall(self, key: K, entry: Entry[K]) -> None:
        """A new entry is proven if it left only lately."""
        if (nbytes := self._ghosts.pop(key, None)) is not None:
            self._ghost_bytes -= nbytes
            entry.proven = True

    def enqueue(self, key: K, entry: Entry[K], *, first: bool = False) -> None:
        """Let an entry stand in its queue, at the end or at the exit."""
        queue = self._main if entry.proven else self._probation
        queue[key] = entry
        queue.move_to_end(key, last=not first)
        self._probation_bytes += 0 if entry.proven else entry.nbytes

    def dequeue(self, key: K, entry: Entry[K]) -> None:
        """Take an entry out of its queue."""
        (self._main if entry.proven else self._probation).pop(key)
        self._probation_bytes -= 0 if entry.proven else entry.nbytes

    def victim(self, share: int) -> tuple[K, Entry[K]]:
        """What leaves next, out of its queue already; there must be something that may."""
        while True:
            key, entry = self._next(share)
            self.dequeue(key, entry)
            if not entry.proven and entry.credit >= _PROMOTED:
                entry.proven, entry.credit = True, 0
            elif entry.proven and entry.credit:
                entry.credit -= 1
            else:
                return key, entry
            self.enqueue(key, entry)

    def _next(self, share: int) -> tuple[K, Entry[K]]:
        queues = (self._main, self._probation)
        if self.on_probation_above(share):
            queues = (self._probation, self._main)
        return next((key, entry) for queue in queues for key, entry in queue.items() if not entry.leases)

    def remember(self, key: K, nbytes: int, share: int) -> None:
        """Note what left, so that it is known when it comes back soon."""
        self._ghosts[key] = nbytes
        self._ghost_bytes += nbytes
        while self._ghost_bytes > _GHOSTS * max(share, self.used):
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]
