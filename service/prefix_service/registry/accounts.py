"""The memory of one tenant: its bytes, its entries on probation, and the keys that were evicted recently."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_GHOSTS: Final = 0.9
_CREDIT: Final = 3  # the most rounds in the main queue that uses can earn


@dataclass(slots=True, eq=False)
class Entry(Generic[K]):
    """A resident entry: its bytes, its owner, and its leases, pin and uses, which decide whether it can be evicted."""

    nbytes: int
    owner: "Tenant[K]"
    leases: int = 0
    pinned: bool = False
    uses: int = 0
    credit: int = 0
    proven: bool = False
    resident: bool = True

    def use(self) -> None:
        """Counts a use."""
        self.uses += 1
        self.credit = min(self.credit + 1, _CREDIT)


class Tenant(Generic[K]):
    """A tenant with `used` bytes in memory, of which `leased` are being read and `pinned` are pinned.

    `seen` is the time of its last use, on the clock of admitted bytes. `entries` counts entries that are resident, or
    that were removed and are still leased.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries = 0
        self.used = 0
        self.leased = 0
        self.pinned = 0
        self.seen = 0
        self.probation: OrderedDict[K, Entry[K]] = OrderedDict()
        self.on_probation = 0
        self._ghosts: OrderedDict[K, int] = OrderedDict()
        self._ghost_bytes = 0

    def first_on_probation(self) -> tuple[K, Entry[K]] | None:
        """Returns the oldest entry on probation without a lease; None if there is none."""
        return next(((key, entry) for key, entry in self.probation.items() if not entry.leases), None)

    def remember(self, key: K, nbytes: int, part: int) -> None:
        """Remembers an evicted key, so that it is recognised if it is loaded again soon."""
        self._ghosts[key] = nbytes
        self._ghost_bytes += nbytes
        while self._ghost_bytes > _GHOSTS * max(part, self.used):
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    def recalls(self, key: K) -> bool:
        """Returns whether a key was evicted recently, and forgets it."""
        if (nbytes := self._ghosts.pop(key, None)) is None:
            return False
        self._ghost_bytes -= nbytes
        return True
