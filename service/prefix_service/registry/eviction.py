"""Decides which entries stay in memory under a byte budget that tenants share. Pure state.

S3-FIFO by bytes (Yang, Zhang, Qiu, Yue and Vigfusson, "FIFO queues are all you need for cache eviction", SOSP 2023): a
new entry is on probation, in a tenth of the bytes. An entry that is used again there, or is loaded again soon after it
was evicted, moves to the main queue, and stays for as many rounds as it was used. Entries that are read once therefore
pass through that tenth and displace nothing else.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Generic

from prefix_service.errors import Unavailable
from prefix_service.registry.accounts import Entry, K, Tenant
from prefix_service.registry.holdings import Holdings
from prefix_service.registry.report import EvictionReason

_PROBATION: Final = 0.1
_PROMOTED: Final = 2  # uses on probation that move an entry to the main queue
_ROUNDS: Final = 4  # after which every entry of the main queue has lost its credit
_GUARANTEED: Final = 2  # half of the budget is divided among the tenants
_LATELY: Final = 100  # evictions that are kept to be shown


@dataclass(frozen=True, slots=True)
class Eviction(Generic[K]):
    """An entry that was evicted for a tenant: when, its bytes and uses, and why it was the one."""

    at: datetime
    key: K
    nbytes: int
    uses: int
    for_tenant: str
    reason: EvictionReason


class Residency(Generic[K]):
    """The resident keys, and the choice of those that are evicted for another.

    There is no I/O and no lock: the owner calls it from one thread, and frees the keys that `admit` returns. Bytes are
    reserved before they are allocated. Leased and pinned entries are never evicted; `Holdings` bounds them for each
    tenant. An entry that is removed while it is leased counts until its last lease ends.

    Half of the budget is divided equally among the tenants that have resident entries: a tenant within that share loses
    nothing to others, unless it used nothing while as many bytes as the whole budget were admitted. The other half is
    for entries that are used, whichever tenant they belong to: all tenants share one order. Probation space is
    reclaimed first from the tenant that asks, if it exceeds its tenth, then from the tenant with the most bytes there.
    A scan therefore displaces at most a tenth of one equal share.
    """

    def __init__(self, budget: int, setting: str = "the budget") -> None:
        self.budget = budget
        self.used = 0
        self.holdings: Holdings[K] = Holdings(budget, setting)
        self.evicted: deque[Eviction[K]] = deque(maxlen=_LATELY)
        self._entries: dict[K, Entry[K]] = {}
        self._tenants: dict[str, Tenant[K]] = {}
        self._main: OrderedDict[K, Entry[K]] = OrderedDict()
        self._on_probation = 0
        self._most: list[tuple[int, str]] = []  # a heap of (-bytes on probation, tenant); outdated items are skipped
        self._admitted = 0  # bytes since the start: the clock of `Tenant.seen`

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> Iterator[tuple[K, Entry[K]]]:
        """Returns all resident keys and their entries."""
        return iter(self._entries.items())

    def entry(self, key: K) -> Entry[K]:
        """Returns the entry of a resident key."""
        return self._entries[key]

    @property
    def share(self) -> int:
        """The bytes that are guaranteed to each tenant with resident entries."""
        return self.budget // (_GUARANTEED * max(1, len(self._tenants)))

    def tenants(self) -> Iterator[Tenant[K]]:
        """Returns all tenants with resident entries."""
        return iter(self._tenants.values())

    def admit(self, key: K, nbytes: int, tenant: str, own: int = 0) -> list[K]:
        """Reserves `nbytes` of a tenant for a key that is not resident; returns the evicted keys, which are already
        removed.

        The request that will lease the key already leases `own` bytes of this tenant.

        Raises:
            OutOfSpace: the bytes are more than one request may hold.
            Overloaded: the tenant's leases would exceed what `Holdings` allows.
            Unavailable: too little can be evicted, because the rest is in use, pinned, or guaranteed to others.
        """
        self.holdings.require_size(nbytes)
        owner = self._tenants.get(tenant) or Tenant(tenant)
        self.holdings.require_lease(owner, nbytes, held=False, own=own)
        victims = self._make_room(owner, nbytes)
        self._tenants[tenant] = owner
        self._admitted += nbytes
        owner.seen = self._admitted
        entry = self._entries[key] = Entry(nbytes, owner, proven=owner.recalls(key))
        owner.entries += 1
        self._enqueue(key, entry)
        self._count(entry, nbytes)
        return victims

    def evict_all_for(self, tenant: str) -> list[K]:
        """Evicts all entries that may be evicted for a tenant, and returns their keys: memory itself is exhausted."""
        return self._evict(self._tenants.get(tenant) or Tenant(tenant), lambda: True)

    def _make_room(self, owner: Tenant[K], nbytes: int) -> list[K]:
        return self._evict(owner, lambda: self.budget - self.used < nbytes, nbytes)

    def _evict(self, owner: Tenant[K], more: Callable[[], bool], needed: int | None = None) -> list[K]:
        """Evicts entries that may be evicted for `owner` while `more()`; all or nothing if bytes are `needed`.

        Raises:
            Unavailable: the `needed` bytes cannot be freed.
        """
        part = self.budget // (len(self._tenants) + (owner.name not in self._tenants))
        leaving: list[tuple[K, Entry[K]]] = []
        while more():
            victim = self._victim(owner, part)
            if victim is None and needed is not None:
                for key, entry in reversed(leaving):
                    self._enqueue(key, entry, first=True)
                    self._count(entry, entry.nbytes)
                raise Unavailable(self._why_not(needed), 1)
            if victim is None:
                break
            self._dequeue(*victim)
            self._count(victim[1], -victim[1].nbytes)
            leaving.append(victim)
        now = datetime.now(UTC)
        for key, entry in leaving:
            entry.owner.remember(key, entry.nbytes, part)
            self._drop(key, entry)
            reason: EvictionReason = "memory" if needed is None else "idle" if entry.proven else "probation"
            self.evicted.append(Eviction(now, key, entry.nbytes, entry.uses, owner.name, reason))
        return [key for key, _ in leaving]

    def _victim(self, owner: Tenant[K], part: int) -> tuple[K, Entry[K]] | None:
        """Returns the next entry to evict for `owner`, still in its queue; None if there is none.

        `part` is `owner`'s equal part of the budget.
        """
        share = part // _GUARANTEED

        def is_protected(tenant: Tenant[K]) -> bool:
            awake = self._admitted - tenant.seen <= self.budget
            return tenant is not owner and tenant.used <= share and awake

        found = None
        if owner.on_probation > _PROBATION * max(part, owner.used):
            found = self._leaving(owner)
        found = found or self._next(is_protected)
        if found is None and owner.used <= share:
            found = self._next(lambda tenant: False)
        return found

    def _next(self, is_protected: Callable[[Tenant[K]], bool]) -> tuple[K, Entry[K]] | None:
        if self._on_probation > _PROBATION * self.budget:
            return self._from_probation(is_protected) or self._from_main(is_protected)
        # An entry that proved itself on probation moves to the main queue here, and can be evicted from there.
        return self._from_main(is_protected) or self._from_probation(is_protected) or self._from_main(is_protected)

    def _from_main(self, is_protected: Callable[[Tenant[K]], bool]) -> tuple[K, Entry[K]] | None:
        for _ in range(_ROUNDS * len(self._main)):
            key, entry = next(iter(self._main.items()))
            if not (entry.leases or entry.credit or is_protected(entry.owner)):
                return key, entry
            entry.credit = max(entry.credit - 1, 0)
            self._main.move_to_end(key)
        return None

    def _from_probation(self, is_protected: Callable[[Tenant[K]], bool]) -> tuple[K, Entry[K]] | None:
        while (tenant := self._with_most(is_protected)) is not None:
            if (found := self._leaving(tenant)) is not None:
                return found
        return None

    def _leaving(self, tenant: Tenant[K]) -> tuple[K, Entry[K]] | None:
        """Returns the next entry to evict from a tenant's probation.

        Entries that proved themselves move to the main queue.
        """
        while (found := tenant.first_on_probation()) is not None and found[1].credit >= _PROMOTED:
            key, entry = found
            self._dequeue(key, entry)
            entry.proven, entry.credit = True, 0
            self._enqueue(key, entry)
        return found

    def _with_most(self, is_protected: Callable[[Tenant[K]], bool]) -> Tenant[K] | None:
        """Returns the tenant with the most bytes on probation that may lose one of its entries."""
        found, passed = None, []
        while self._most and found is None:
            nbytes, name = self._most[0]
            tenant = self._tenants.get(name)
            if tenant is None or tenant.on_probation != -nbytes:
                heapq.heappop(self._most)
            elif is_protected(tenant) or tenant.first_on_probation() is None:
                passed.append(heapq.heappop(self._most))
            else:
                found = tenant
        for item in set(passed):
            heapq.heappush(self._most, item)
        return found

    def _enqueue(self, key: K, entry: Entry[K], *, first: bool = False) -> None:
        """Adds an entry to its queue, at the end or, if `first`, where the next eviction looks."""
        queue = self._main if entry.proven else entry.owner.probation
        queue[key] = entry
        queue.move_to_end(key, last=not first)
        self._count_probation(entry, entry.nbytes)

    def _dequeue(self, key: K, entry: Entry[K]) -> None:
        (self._main if entry.proven else entry.owner.probation).pop(key)
        self._count_probation(entry, -entry.nbytes)

    def _count_probation(self, entry: Entry[K], change: int) -> None:
        if entry.proven:
            return
        owner = entry.owner
        self._on_probation += change
        owner.on_probation += change
        heapq.heappush(self._most, (-owner.on_probation, owner.name))
        if len(self._most) > 2 * len(self._tenants) + 64:
            self._most = [(-tenant.on_probation, name) for name, tenant in self._tenants.items() if tenant.probation]
            heapq.heapify(self._most)

    def _count(self, entry: Entry[K], change: int) -> None:
        self.used += change
        entry.owner.used += change

    def _drop(self, key: K, entry: Entry[K]) -> None:
        entry.resident = False
        del self._entries[key]
        if not entry.leases:
            self._forget(entry)

    def _forget(self, entry: Entry[K]) -> None:
        entry.owner.entries -= 1
        if not entry.owner.entries:
            del self._tenants[entry.owner.name]

    def _why_not(self, nbytes: int) -> str:
        pinned, held = self.holdings.pinned, self.holdings.held
        return (
            f"{nbytes} bytes are needed and no more can be evicted: of {self.budget} bytes {pinned} are pinned, "
            f"{held - pinned} in use, and the rest is not enough or guaranteed to other tenants"
        )

    def touch(self, key: K) -> None:
        """Counts a use of a resident key."""
        entry = self._entries[key]
        entry.use()
        entry.owner.seen = self._admitted

    def lease(self, key: K, own: int = 0) -> Entry[K]:
        """Leases a resident key, so that it is not evicted; returns its entry, to be passed to `release`.

        The request that asks already leases `own` bytes of this tenant.

        Raises:
            Overloaded: the tenant's leases would exceed what `Holdings` allows.
        """
        entry = self._entries[key]
        if not entry.leases:
            self.holdings.lease(entry, own)
        entry.leases += 1
        return entry

    def release(self, entry: Entry[K]) -> None:
        """Ends a lease. The last one of an entry that was removed in the meantime frees its bytes."""
        entry.leases -= 1
        if entry.leases:
            return
        self.holdings.release(entry)
        if not entry.resident:
            self._count(entry, -entry.nbytes)
            self._forget(entry)

    def holds(self, key: K, entry: Entry[K]) -> bool:
        """Returns whether this very entry is resident; its key may have been removed and admitted again."""
        return self._entries.get(key) is entry

    def pin(self, key: K, *, pinned: bool) -> None:
        """Pins a resident key outside the queues, or unpins it; an unpinned key counts as proven.

        Raises:
            OutOfSpace: the tenant would pin more than `Holdings` allows.
        """
        entry = self._entries[key]
        if entry.pinned == pinned:
            return
        if pinned:
            self.holdings.require_pin(entry)
            self._dequeue(key, entry)
        self.holdings.pin(entry, pinned=pinned)
        if not pinned:
            entry.proven = True
            self._enqueue(key, entry)

    def is_pinned(self, key: K) -> bool:
        """Returns whether a key is resident and pinned."""
        return key in self._entries and self._entries[key].pinned

    def remove(self, key: K) -> None:
        """Removes a key; does nothing if it is not resident."""
        if (entry := self._entries.get(key)) is None:
            return
        if entry.pinned:
            self.holdings.pin(entry, pinned=False)
        else:
            self._dequeue(key, entry)
        if not entry.leases:
            self._count(entry, -entry.nbytes)
        self._drop(key, entry)
