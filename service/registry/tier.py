"""One budget of bytes and the values under it, loaded once for all who wait."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from service.errors import OutOfSpace, Unavailable
from service.registry.failures import Failures
from service.registry.report import TierName, TierReport
from service.registry.residency import Residency
from service.registry.snapshot import TierSnapshot
from service.registry.tenants import Entry, K


class Sized(Protocol):
    """Something that takes memory."""

    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)
G = TypeVar("G", bound=Hashable)


class Tier(Generic[K, V, G]):
    """Loads are single-flight and outlive the waiters that give up; those that failed are remembered for a moment.
    What finds no room waits up to `patience` seconds for somebody else's lease to end. Each key belongs to a `group`,
    with which it is forgotten."""

    def __init__(self, name: TierName, place: str, budget: int, patience: float, group: Callable[[K], G]) -> None:
        self.residency: Residency[K] = Residency(budget)
        self._group = group
        self._groups: dict[G, set[K]] = {}  # of what is resident
        self._name, self._place, self._patience = name, place, patience
        self._room: asyncio.Event | None = None  # of those who wait now
        self._collecting = asyncio.Lock()  # two who collect leases could wait for each other's
        self._values: dict[K, V] = {}
        self._loads: dict[K, asyncio.Task[V]] = {}
        self._failures: Failures[K] = Failures()
        self._readers = self._hits = self._misses = self._waits = self._evictions = 0
        self._loaded = self._failed = 0
        self._load_seconds = 0.0

    async def get(self, key: K, tenant: str, nbytes: int, load: Callable[[], Awaitable[V]]) -> V:
        """The value of a tenant's `key`; its bytes are reserved before `load` allocates them."""
        async with self.lease(key, tenant, nbytes, load) as value:
            return value

    def lease(self, key: K, tenant: str, nbytes: int, load: Callable[[], Awaitable[V]]) -> "Lease[K, V, G]":
        """The value of a tenant's `key`, not evicted from the reservation of its bytes until the block ends.

        The block raises:
            OutOfSpace: it does not fit the budget.
            Unavailable: what may leave is not enough, and did not become so in time.
            PrefixServiceError: what `load` raised, now or a moment ago.
        """
        return Lease(self, key, tenant, nbytes, load)

    async def enter(self, lease: "Lease[K, V, G]") -> V:
        """Begin a lease."""
        key = lease.key
        if (value := self._values.get(key)) is not None:
            self._hits += 1
        elif key in self._loads:
            self._waits += 1
        else:
            self._misses += 1
            await self._begin(key, lease.tenant, lease.nbytes, lease.load)
            return await self._lent(lease)
        self.residency.touch(key)
        if value is None:
            return await self._lent(lease)
        self._lend(lease)
        return value

    async def enter_all(self, leases: Sequence["Lease[K, V, G]"]) -> list[V]:
        """Begin leases of different keys together: all or none; what has to be loaded is loaded side by side.

        Raises:
            OutOfSpace: they do not fit the budget together.
            Unavailable, PrefixServiceError: as for one.
        """
        if (needed := sum(lease.nbytes for lease in leases)) > self.residency.budget:
            raise OutOfSpace(
                f"{needed} bytes are needed at once, and the memory budget has {self.residency.budget}: ask for less "
                "in one request"
            )
        lent: list[asyncio.Future[V]] = []
        try:
            if all(lease.key in self._values for lease in leases):
                lent += map(self._promised, leases)
            else:
                await self._collect(leases, lent)
            # Failures wait for each other: which one is told does not hang on the order of loads.
            await asyncio.gather(*lent, return_exceptions=True)
            return [promise.result() for promise in lent]
        except BaseException:
            for lease, promise in zip(leases, lent, strict=False):
                promise.cancel()
                self.leave(lease)
            raise

    async def _collect(self, leases: Sequence["Lease[K, V, G]"], lent: list["asyncio.Future[V]"]) -> None:
        """Reserve one after the other, and wait for room while holding the first: so only one may at a time."""
        until = time.monotonic() + self._patience
        try:
            async with asyncio.timeout(self._patience):
                await self._collecting.acquire()
        except TimeoutError as error:
            raise Unavailable("others wait for room for several prefixes at once: try again") from error
        try:
            for lease in leases:
                is_new = lease.key not in self._values and lease.key not in self._loads
                if is_new:
                    self._misses += 1
                    await self._begin(lease.key, lease.tenant, lease.nbytes, lease.load, until)
                lent.append(self._promised(lease, is_new=is_new))
        finally:
            self._collecting.release()

    def _promised(self, lease: "Lease[K, V, G]", *, is_new: bool = False) -> "asyncio.Future[V]":
        """The value of a lease that begins now, once it is there."""
        value = self._values.get(lease.key)
        if not is_new:
            self.residency.touch(lease.key)
            self._hits += value is not None
            self._waits += value is None
        self._lend(lease)
        if value is None:
            return asyncio.shield(self._loads[lease.key])
        promise: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        promise.set_result(value)
        return promise

    def _lend(self, lease: "Lease[K, V, G]") -> None:
        lease.entry = self.residency.lease(lease.key)
        self._readers += 1

    async def _lent(self, lease: "Lease[K, V, G]") -> V:
        """The value, once its load has ended; leased meanwhile."""
        key = lease.key
        self._lend(lease)
        try:
            value = self._values.get(key)
            # A waiter that is cancelled must not take the load away from the others.
            return await asyncio.shield(self._loads[key]) if value is None else value
        except BaseException:
            self.leave(lease)
            raise

    def leave(self, lease: "Lease[K, V, G]") -> None:
        """End a lease."""
        self._readers -= 1
        self._release(lease.entry)

    async def _begin(
        self, key: K, tenant: str, nbytes: int, load: Callable[[], Awaitable[V]], until: float | None = None
    ) -> None:
        """Reserve and begin to load, unless somebody else does while there is no room yet."""
        until = time.monotonic() + self._patience if until is None else until
        while key not in self._values and key not in self._loads:
            self._failures.check(key)
            try:
                self._free(self.residency.admit(key, nbytes, tenant))
            except Unavailable:
                if not await self._room_before(until):
                    raise
            else:
                self._groups.setdefault(self._group(key), set()).add(key)
                self._loads[key] = asyncio.create_task(self._load(key, self.residency.lease(key), load))

    async def _room_before(self, until: float) -> bool:
        """Whether something may have become free in time."""
        room = self._room = self._room or asyncio.Event()
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await room.wait()
        except TimeoutError:
            return False
        return True

    def _release(self, entry: Entry[K]) -> None:
        self.residency.release(entry)
        self._make_known()

    def _make_known(self) -> None:
        """Those who wait now look again; who comes later waits for the next time."""
        if self._room is not None:
            self._room.set()
            self._room = None

    async def _load(self, key: K, reservation: Entry[K], load: Callable[[], Awaitable[V]]) -> V:
        began = time.monotonic()
        try:
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

    def spare(self, tenant: str) -> None:
        """Let go what may leave for a tenant: the memory itself is exhausted."""
        self._free(self.residency.spare(tenant))

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

    def pin(self, key: K, *, pinned: bool) -> None:
        """Keep a resident key, or let it go again."""
        self.residency.pin(key, pinned=pinned)
        self._make_known()

    def forgive(self, group: G) -> None:
        """Forget that loads failed: what was wrong has been put right."""
        self._failures.forget(lambda key: self._group(key) == group)

    def remove(self, group: G) -> None:
        """Forget values, loads and failures; what is being sent stays alive until its last byte has left."""
        self.forgive(group)
        for key in self._groups.pop(group, ()):
            self._values.pop(key, None)
            self._loads.pop(key, None)
            self.residency.remove(key)
        self._make_known()

    def remove_where(self, matches: Callable[[G], bool]) -> None:
        """The same for all groups that match."""
        self._failures.forget(lambda key: matches(self._group(key)))
        for group in [group for group in self._groups if matches(group)]:
            self.remove(group)

    def report(self) -> TierReport:
        """The budget, what is under it, and the counts since the start."""
        return TierReport(
            name=self._name,
            place=self._place,
            budget=self.residency.budget,
            used=self.residency.used,
            pinned=self.residency.pinned,
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
        """What is under the budget at this moment."""
        residency = self.residency
        tenants = [(tenant.name, tenant.used) for tenant in residency.tenants()]
        return TierSnapshot(self._name, list(residency.items()), frozenset(self._loads), tenants, residency.share)


class Lease(Generic[K, V, G]):
    """`async with` it; see `Tier.lease`. A class, since a generator takes longer than all it does here."""

    __slots__ = ("entry", "key", "load", "nbytes", "tenant", "tier")

    entry: Entry[K]

    def __init__(self, tier: Tier[K, V, G], key: K, tenant: str, nbytes: int, load: Callable[[], Awaitable[V]]) -> None:
        self.tier, self.key, self.tenant, self.nbytes, self.load = tier, key, tenant, nbytes, load

    async def __aenter__(self) -> V:
        return await self.tier.enter(self)

    async def __aexit__(self, *_error: object) -> None:
        self.tier.leave(self)


class Leases(Generic[K, V, G]):
    """`async with` it for the values of leases that begin and end together, in their order; see `Tier.enter_all`."""

    def __init__(self, leases: Sequence[Lease[K, V, G]]) -> None:
        self._leases = leases

    async def __aenter__(self) -> list[V]:
        return await self._leases[0].tier.enter_all(self._leases)

    async def __aexit__(self, *_error: object) -> None:
        for lease in self._leases:
            lease.tier.leave(lease)
