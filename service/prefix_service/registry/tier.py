"""One byte budget and its values, each loaded once for all waiters."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, Protocol, TypeVar

from prefix_service.errors import Overloaded, Unavailable
from prefix_service.registry.accounts import Entry, K
from prefix_service.registry.eviction import Residency
from prefix_service.registry.keys import VersionKey
from prefix_service.registry.report import TierName, TierReport
from prefix_service.registry.snapshot import TierSnapshot
from prefix_service.registry.waiting_room import WaitingRoom
from prefix_service.system.failures import Failures
from prefix_service.system.spans import span


class Sized(Protocol):
    """A value that takes memory."""

    @property
    def nbytes(self) -> int: ...


_SETTINGS: Final[dict[TierName, str]] = {"device": "PREFIX_DEVICE_BYTES", "host": "PREFIX_RENDERING_BYTES"}

V = TypeVar("V", bound=Sized)


class Tier(Generic[K, V]):
    """A byte budget with the values under it.

    Each key is loaded once for all waiters, and a load outlives waiters that give up. Failed loads are remembered for a
    moment. A request that finds no room, or exceeds what its tenant may lease, waits up to `patience` seconds for
    leases to end. Each key belongs to a `group`; the keys of a group are removed together.
    """

    def __init__(
        self, name: TierName, place: str, budget: int, patience: float, group: Callable[[K], VersionKey]
    ) -> None:
        self.residency: Residency[K] = Residency(budget, _SETTINGS[name])
        self._group = group
        self._groups: dict[VersionKey, set[K]] = {}  # of resident keys
        self._name, self._place, self._patience = name, place, patience
        self._waiting_room = WaitingRoom()
        self._values: dict[K, V] = {}
        self._loads: dict[K, asyncio.Task[V]] = {}
        self._failures: Failures[K] = Failures()
        self._readers = self._hits = self._misses = self._waits = self._evictions = 0
        self._loaded = self._failed = 0
        self._load_seconds = 0.0

    async def get(self, key: K, tenant: str, nbytes: int, load: Callable[[], Awaitable[V]]) -> V:
        """Returns the value of a tenant's `key`; its `nbytes` are reserved before `load` allocates them.

        Raises:
            PrefixServiceError: any error of `lease`.
        """
        async with self.lease(key, tenant, nbytes, load) as value:
            return value

    def lease(self, key: K, tenant: str, nbytes: int, load: Callable[[], Awaitable[V]]) -> "Lease[K, V]":
        """Returns a lease of a tenant's `key`, whose value is not evicted until the lease's block ends.

        The block raises:
            OutOfSpace: the value is more than one request may hold.
            Overloaded: other readers of the tenant held its part of the budget for too long.
            Unavailable: too little can be evicted, and that did not change in time.
            PrefixServiceError: the error of `load`, now or a moment ago.
        """
        return Lease(self, key, tenant, nbytes, load)

    async def enter(self, lease: "Lease[K, V]") -> V:
        """Begins a lease, and returns its value."""
        value = self._values.get(lease.key)
        if value is not None:
            try:
                lease.entry = self.residency.lease(lease.key)
            except Overloaded:
                pass
            else:
                self.residency.touch(lease.key)
                self._hits += 1
                self._readers += 1
                return value
        (value,) = await self.enter_all([lease])
        return value

    async def enter_all(self, leases: Sequence["Lease[K, V]"]) -> list[V]:
        """Begins leases of different keys, all or none; missing values are loaded in parallel.

        Raises:
            OutOfSpace: together they are more than one request may hold.
            Overloaded: other readers of a tenant held its part of the budget for too long.
            Unavailable: too little can be evicted, and that did not change in time.
            PrefixServiceError: the error of a `load`, now or a moment ago.
        """
        self.residency.holdings.require_size(sum(lease.nbytes for lease in leases))
        for lease in leases:
            known = lease.key in self._values
            self._hits += known
            self._waits += lease.key in self._loads
            self._misses += not known and lease.key not in self._loads
        await self._begin(leases)
        try:
            # The load is shielded: a waiter that is cancelled must not cancel it for the others.
            loads = [asyncio.shield(self._loads[lease.key]) for lease in leases if lease.key in self._loads]
            found = [self._values.get(lease.key) for lease in leases]
            # Waits for all loads, so that the error that is raised does not depend on their order.
            await asyncio.gather(*loads, return_exceptions=True)
            loaded = iter(loads)
            return [next(loaded).result() if value is None else value for value in found]
        except BaseException:
            for lease in leases:
                self.leave(lease)
            raise

    async def _begin(self, leases: Sequence["Lease[K, V]"]) -> None:
        """Begins leases once there is room for all of them; until then they hold nothing."""
        until = time.monotonic() + self._patience
        waiter = None
        try:
            while True:
                for lease in leases:
                    if lease.key not in self.residency:
                        self._failures.check(lease.key)
                try:
                    self._take(leases)
                except Unavailable:
                    waiter = waiter or self._waiting_room.enter(tuple(dict.fromkeys(lease.tenant for lease in leases)))
                    if not await waiter.may_try_before(until):
                        raise
                else:
                    return
        finally:
            if waiter is not None:
                self._waiting_room.leave(waiter)

    def _take(self, leases: Sequence["Lease[K, V]"]) -> None:
        """Begins leases, and loads of values that are not resident.

        Raises:
            OutOfSpace, Overloaded, Unavailable: there is no room for one of them; none has begun.
        """
        taken: list[Lease[K, V]] = []
        new: set[Lease[K, V]] = set()
        own: Counter[str] = Counter()
        try:
            for lease in leases:
                key, tenant = lease.key, lease.tenant
                if key not in self.residency:
                    self._free(self.residency.admit(key, lease.nbytes, tenant, own[tenant]))
                    new.add(lease)
                lease.entry = self.residency.lease(key, own[tenant])
                taken.append(lease)
                own[tenant] += lease.entry.nbytes
        except Unavailable:
            for lease in taken:
                self.residency.release(lease.entry)
            for lease in new:
                self.residency.remove(lease.key)
            raise
        self._readers += len(leases)
        for lease in leases:
            if lease not in new:
                self.residency.touch(lease.key)
                continue
            self._groups.setdefault(self._group(lease.key), set()).add(lease.key)
            self._loads[lease.key] = asyncio.create_task(
                self._load(lease.key, self.residency.lease(lease.key), lease.load)
            )

    def leave(self, lease: "Lease[K, V]") -> None:
        """Ends a lease."""
        self._readers -= 1
        self._release(lease.entry)

    def _release(self, entry: Entry[K]) -> None:
        self.residency.release(entry)
        self._waiting_room.announce()

    async def _load(self, key: K, reservation: Entry[K], load: Callable[[], Awaitable[V]]) -> V:
        began = time.monotonic()
        try:
            with span(f"load into {self._name} memory", {"prefix.bytes": reservation.nbytes}):
                value = await load()
        except BaseException as error:
            self._failed += 1
            if self.residency.holds(key, reservation):
                self.residency.remove(key)
                self._leave(key)
                self._failures.remember(key, error)
            raise
        finally:
            self._load_seconds += time.monotonic() - began
            self._release(reservation)
            if self._loads.get(key) is asyncio.current_task():
                del self._loads[key]
        self._loaded += 1
        if self.residency.holds(key, reservation):
            self._values[key] = value
        return value

    def evict_all_for(self, tenant: str) -> None:
        """Evicts everything that may be evicted for a tenant, because memory itself is exhausted."""
        self._free(self.residency.evict_all_for(tenant))

    def _free(self, victims: list[K]) -> None:
        self._evictions += len(victims)
        for victim in victims:
            del self._values[victim]
            self._leave(victim)

    def _leave(self, key: K) -> None:
        group = self._group(key)
        self._groups[group].discard(key)
        if not self._groups[group]:
            del self._groups[group]

    def members(self, group: VersionKey) -> frozenset[K]:
        """Returns the keys of a group that are resident or being loaded."""
        return frozenset(self._groups.get(group, ()))

    def pin(self, key: K, *, pinned: bool) -> None:
        """Pins a resident key, or unpins it.

        Raises:
            OutOfSpace: the tenant would pin more than it may.
        """
        self.residency.pin(key, pinned=pinned)
        self._waiting_room.announce()

    def clear_failures(self, group: VersionKey) -> None:
        """Forgets that loads of a group failed, because their cause was repaired."""
        self._failures.forget(lambda key: self._group(key) == group)

    def remove(self, group: VersionKey) -> None:
        """Removes the values, loads and failures of a group.

        A value that is being sent stays alive until its last byte left.
        """
        self.clear_failures(group)
        for key in self._groups.pop(group, ()):
            self._values.pop(key, None)
            self._loads.pop(key, None)
            self.residency.remove(key)
        self._waiting_room.announce()

    def remove_where(self, matches: Callable[[VersionKey], bool]) -> None:
        """Removes the values, loads and failures of all groups that match."""
        self._failures.forget(lambda key: matches(self._group(key)))
        for group in [group for group in self._groups if matches(group)]:
            self.remove(group)

    def report(self) -> TierReport:
        """Returns the state of the budget, and the counts since the start."""
        return TierReport(
            name=self._name,
            place=self._place,
            budget=self.residency.budget,
            used=self.residency.used,
            pinned=self.residency.holdings.pinned,
            entries=len(self.residency),
            loading=len(self._loads),
            readers=self._readers,
            hits=self._hits,
            misses=self._misses,
            waits=self._waits,
            evictions=self._evictions,
            loads=self._loaded,
            failures=self._failed,
            load_seconds=self._load_seconds,
        )

    def snapshot(self) -> TierSnapshot[K]:
        """Returns a copy of the current entries."""
        residency = self.residency
        tenants = [(tenant.name, tenant.used) for tenant in residency.tenants()]
        return TierSnapshot(
            name=self._name,
            entries=list(residency.items()),
            loading=frozenset(self._loads),
            tenants=tenants,
            share=residency.share,
            evicted=list(residency.evicted),
        )


class Lease(Generic[K, V]):
    """A lease as an async context manager; see `Tier.lease`. It is a class because a generator would cost more than all
    the rest of it.
    """

    __slots__ = ("entry", "key", "load", "nbytes", "tenant", "tier")

    entry: Entry[K]

    def __init__(self, tier: Tier[K, V], key: K, tenant: str, nbytes: int, load: Callable[[], Awaitable[V]]) -> None:
        self.tier, self.key, self.tenant, self.nbytes, self.load = tier, key, tenant, nbytes, load

    async def __aenter__(self) -> V:
        return await self.tier.enter(self)

    async def __aexit__(self, *_error: object) -> None:
        self.tier.leave(self)


class Leases(Generic[K, V]):
    """An async context manager of leases that begin and end together; yields their values in order. See
    `Tier.enter_all`.
    """

    def __init__(self, leases: Sequence[Lease[K, V]]) -> None:
        self._leases = leases

    async def __aenter__(self) -> list[V]:
        return await self._leases[0].tier.enter_all(self._leases)

    async def __aexit__(self, *_error: object) -> None:
        for lease in self._leases:
            lease.tier.leave(lease)
