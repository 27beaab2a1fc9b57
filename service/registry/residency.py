"""What may stay in memory under a budget of bytes: pure state, least recently used leaves first."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from service.errors import OutOfSpace, Unavailable

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True, eq=False)
class Entry:
    """A resident key's bytes, and why it may not leave."""

    nbytes: int
    leases: int = 0
    pinned: bool = False


class Residency(Generic[K]):
    """Which keys are resident, and which must leave for another to come.

    No I/O and no locks: the owner calls it from one thread, and frees what `admit` returns. Bytes are reserved
    before they are allocated. What is leased or pinned is never evicted.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._entries: OrderedDict[K, Entry] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def admit(self, key: K, nbytes: int) -> list[K]:
        """Reserve `nbytes` for a key that is not resident; the keys that had to leave, already removed here.

        Raises:
            OutOfSpace: it would not fit even alone.
            Unavailable: what could leave is not enough, because the rest is in use or pinned.
        """
        if nbytes > self.budget:
            raise OutOfSpace(f"{nbytes} bytes do not fit the memory budget of {self.budget} bytes")
        victims, free = [], self.budget - self.used
        for candidate, entry in self._entries.items():
            if free >= nbytes:
                break
            if not entry.leases and not entry.pinned:
                victims.append(candidate)
                free += entry.nbytes
        if free < nbytes:
            raise Unavailable(f"{nbytes} bytes are needed, and all but {free} of {self.budget} are in use", 1)
        for victim in victims:
            self.remove(victim)
        self._entries[key] = Entry(nbytes)
        self.used += nbytes
        return victims

    def touch(self, key: K) -> None:
        """Note a use."""
        self._entries.move_to_end(key)

    def lease(self, key: K) -> Entry:
        """Keep a resident key while it is being used; give what this returns to `release`."""
        entry = self._entries[key]
        entry.leases += 1
        return entry

    @staticmethod
    def release(entry: Entry) -> None:
        """The end of a lease, also of a key that was removed in the meantime."""
        entry.leases -= 1

    def holds(self, key: K, entry: Entry) -> bool:
        """Whether this very entry is resident: a key may have been removed and admitted again."""
        return self._entries.get(key) is entry

    def pin(self, key: K, *, pinned: bool) -> None:
        """Keep a resident key until it is unpinned."""
        self._entries[key].pinned = pinned

    def is_pinned(self, key: K) -> bool:
        """Whether a key is resident and pinned."""
        return key in self._entries and self._entries[key].pinned

    def remove(self, key: K) -> None:
        """Forget a key; harmless if it is not resident."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.used -= entry.nbytes
