"""What may stay in memory under a budget of bytes that tenants share: pure state."""

import heapq
from collections.abc import Iterator
from typing import Generic

from service.errors import OutOfSpace, Unavailable
from service.registry.tenants import CREDIT, Entry, K, Tenant


class Residency(Generic[K]):
    """Which keys are resident, and which must leave for another to come.

    No I/O and no locks: the owner calls it from one thread, and frees what `admit` returns. Bytes are reserved
    before they are allocated. What is leased or pinned is never evicted.

    The fair share of a tenant is the budget divided by the tenants that have something resident. Room comes from the
    tenant with the most bytes above it; one that asks for things that nobody asked for lately makes room itself
    (`Tenant.on_probation_above`), so a scan takes a tenth of its share. Who is within its share loses nothing to who
    is above: that one evicts its own, all of it if a single entry is larger than the share, before anybody else's.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self.held = 0
        self.pinned = 0
        self._entries: dict[K, Entry[K]] = {}
        self._tenants: dict[str, Tenant[K]] = {}
        self._uses = 0
        self._most: list[tuple[int, int, str]] = []  # a heap of (-used, used_at, tenant), corrected when it is read

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> Iterator[tuple[K, Entry[K]]]:
        """All that is resident."""
        return iter(self._entries.items())

    def entry(self, key: K) -> Entry[K]:
        """That of a resident key."""
        return self._entries[key]

    @property
    def share(self) -> int:
        """The fair share of each tenant that has something resident, in bytes."""
        return self.budget // max(1, len(self._tenants))

    def tenants(self) -> Iterator[Tenant[K]]:
        """All that have something resident."""
        return iter(self._tenants.values())

    def admit(self, key: K, nbytes: int, tenant: str) -> list[K]:
        """Reserve a tenant's `nbytes` for a key that is not resident; the keys that had to leave, already removed.

        Raises:
            OutOfSpace: it would not fit even alone.
            Unavailable: what could leave is not enough, because the rest is in use, pinned, or others' fair share.
        """
        if nbytes > self.budget:
            raise OutOfSpace(f"{nbytes} bytes do not fit the memory budget of {self.budget} bytes")
        owner = self._tenants.get(tenant) or Tenant(tenant)
        victims = self._make_room(owner, nbytes)
        self._tenants[tenant] = owner
        entry = self._entries[key] = Entry(nbytes, owner)
        owner.entries += 1
        self._used_by(owner)
        owner.recall(key, entry)
        owner.enqueue(key, entry)
        self._count(owner, nbytes)
        return victims

    def spare(self, tenant: str) -> list[K]:
        """The keys that may leave for a tenant, already removed: memory itself is exhausted, whatever the budget."""
        owner = self._tenants.get(tenant) or Tenant(tenant)
        share = self._share_with(owner)
        leaving: list[tuple[K, Entry[K]]] = []
        while (loser := self._loser(owner, share)) is not None:
            leaving.append(self._take(loser, share))
        return self._gone(leaving, share)

    def _make_room(self, owner: Tenant[K], nbytes: int) -> list[K]:
        share = self._share_with(owner)
        leaving: list[tuple[K, Entry[K]]] = []
        while self.budget - self.used < nbytes:
            loser = self._loser(owner, share)
            if loser is None:
                for key, entry in reversed(leaving):
                    self._return(key, entry)
                raise Unavailable(self._why_not(nbytes), 1)
            leaving.append(self._take(loser, share))
        return self._gone(leaving, share)

    def _share_with(self, owner: Tenant[K]) -> int:
        return self.budget // (len(self._tenants) + (owner.name not in self._tenants))

    def _loser(self, owner: Tenant[K], share: int) -> Tenant[K] | None:
        """Whose entry leaves for one of `owner`."""
        if owner.evictable and owner.on_probation_above(share):
            return owner
        if (most := self._with_most(share)) is not None:
            return most
        if owner.evictable:
            return owner
        return self._with_most(0) if owner.used <= share else None

    def _with_most(self, above: int) -> Tenant[K] | None:
        """The tenant with the most bytes, more than `above`, that has something to give; of several with as many the
        one that used none for the longest time."""
        found, passed = None, []
        while self._most and found is None and -self._most[0][0] > above:
            used, used_at, name = self._most[0]
            tenant = self._tenants.get(name)
            if tenant is None or tenant.used != -used:
                heapq.heappop(self._most)
            elif tenant.used_at != used_at:
                heapq.heapreplace(self._most, (used, tenant.used_at, name))
            elif tenant.evictable:
                found = tenant
            else:
                passed.append(heapq.heappop(self._most))
        for item in passed:
            heapq.heappush(self._most, item)
        return found

    def _take(self, loser: Tenant[K], share: int) -> tuple[K, Entry[K]]:
        key, entry = loser.victim(share)
        self._count(loser, -entry.nbytes)
        return key, entry

    def _return(self, key: K, entry: Entry[K]) -> None:
        entry.owner.enqueue(key, entry, first=True)
        self._count(entry.owner, entry.nbytes)

    def _gone(self, leaving: list[tuple[K, Entry[K]]], share: int) -> list[K]:
        for key, entry in leaving:
            entry.owner.remember(key, entry.nbytes, share)
            self._drop(key, entry)
        return [key for key, _ in leaving]

    def _count(self, tenant: Tenant[K], change: int) -> None:
        self.used += change
        tenant.used += change
        heapq.heappush(self._most, (-tenant.used, tenant.used_at, tenant.name))
        if len(self._most) > 2 * len(self._tenants) + 64:
            self._most = [(-tenant.used, tenant.used_at, name) for name, tenant in self._tenants.items()]
            heapq.heapify(self._most)

    def _drop(self, key: K, entry: Entry[K]) -> None:
        entry.resident = False
        del self._entries[key]
        entry.owner.entries -= 1
        if not entry.owner.entries:
            del self._tenants[entry.owner.name]

    def _why_not(self, nbytes: int) -> str:
        return (
            f"{nbytes} bytes are needed and no more can leave: of {self.budget} bytes {self.pinned} are pinned, "
            f"{self.held - self.pinned} in use, and the rest is not enough or other tenants' fair share"
        )

    def touch(self, key: K) -> None:
        """Note a use."""
        entry = self._entries[key]
        entry.uses += 1
        entry.credit = min(entry.credit + 1, CREDIT)
        self._used_by(entry.owner)

    def _used_by(self, tenant: Tenant[K]) -> None:
        self._uses += 1
        tenant.used_at = self._uses

    def lease(self, key: K) -> Entry[K]:
        """Keep a resident key while it is being used; give what this returns to `release`."""
        entry = self._entries[key]
        if not entry.held:
            self._hold(entry, entry.nbytes)
        entry.leases += 1
        return entry

    def release(self, entry: Entry[K]) -> None:
        """The end of a lease, also of a key that was removed in the meantime."""
        entry.leases -= 1
        if entry.resident and not entry.held:
            self._hold(entry, -entry.nbytes)

    def _hold(self, entry: Entry[K], change: int) -> None:
        entry.owner.held += change
        self.held += change

    def holds(self, key: K, entry: Entry[K]) -> bool:
        """Whether this very entry is resident: a key may have been removed and admitted again."""
        return self._entries.get(key) is entry

    def pin(self, key: K, *, pinned: bool) -> None:
        """Keep a resident key until it is unpinned; it counts as used again then."""
        entry = self._entries[key]
        if entry.pinned == pinned:
            return
        if pinned:
            entry.owner.dequeue(key, entry)
        held, entry.pinned = entry.held, pinned
        if held != entry.held:
            self._hold(entry, entry.nbytes if pinned else -entry.nbytes)
        self.pinned += entry.nbytes if pinned else -entry.nbytes
        if not pinned:
            entry.proven = True
            entry.owner.enqueue(key, entry)

    def is_pinned(self, key: K) -> bool:
        """Whether a key is resident and pinned."""
        return key in self._entries and self._entries[key].pinned

    def remove(self, key: K) -> None:
        """Forget a key; harmless if it is not resident."""
        if (entry := self._entries.get(key)) is None:
            return
        if entry.held:
            self._hold(entry, -entry.nbytes)
        if entry.pinned:
            self.pinned -= entry.nbytes
        else:
            entry.owner.dequeue(key, entry)
        self._count(entry.owner, -entry.nbytes)
        self._drop(key, entry)
