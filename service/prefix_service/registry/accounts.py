"""What one tenant has in memory: its bytes, its part of what stands on probation, and what left it only lately."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_GHOSTS: Final = 0.9
_CREDIT: Final = 3  # rounds in the main queue that uses may earn


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

    def use(self) -> None:
        """Note a use."""
        self.uses += 1
        self.credit = min(self.credit + 1, _CREDIT)


class Tenant(Generic[K]):
    """`used` bytes in memory, of which `leased` are read and `pinned` are pinned; `seen` is when it last asked for
    something. `entries` counts what is resident, or was removed and is still read."""

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
        """What has stood there longest and is not leased."""
        return next(((key, entry) for key, entry in self.probation.items() if not entry.leases), None)

    def remember(self, key: K, nbytes: int, part: int) -> None:
        """Note what left, so that it is known when it comes back soon."""
        self._ghosts[key] = nbytes
        self._ghost_bytes += nbytes
        while self._ghost_bytes > _GHOSTS * max(part, self.used):
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    def recalls(self, key: K) -> bool:
        """Whether a key left only lately; asked once, when it comes back."""
        if (nbytes := self._ghosts.pop(key, None)) is None:
            return False
        self._ghost_bytes -= nbytes
        return True
