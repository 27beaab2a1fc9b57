"""Versions that are being published: where to, the weights that have arrived, and the bytes that count as used."""

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from anyio import to_thread

from prefix_service.blobs.port import StagedBlob
from prefix_service.catalog.quotas import Room
from prefix_service.catalog.records import Principal
from prefix_service.errors import NotFound, PrefixServiceError, Unauthenticated


class Arrivals:
    """The versions that this process is publishing.

    Pure state: in the end, the catalog's transaction decides on quotas.
    """

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()
        self._arriving: set[Arrival] = set()

    def of(self, tenant: str) -> int:
        """Returns the bytes of a tenant's versions that are being published."""
        return self._bytes[tenant]

    @contextlib.contextmanager
    def begin(self, tenant: str, by: Principal, room: Room, nbytes: int) -> Iterator["Arrival"]:
        """Counts a version of at least `nbytes` bytes as used by its tenant while the block runs.

        Raises:
            QuotaExceeded: the quota leaves less.
        """
        arrival = Arrival(tenant, by, room, self._bytes)
        arrival.hold(nbytes)
        self._arriving.add(arrival)
        try:
            yield arrival
        finally:
            self._arriving.discard(arrival)
            arrival.end()

    def refuse(self, tenants: Collection[str], keys: Collection[str]) -> None:
        """Ends publications for tenants that were deleted, or by keys that were revoked.

        A new tenant of the same name therefore has its whole quota.
        """
        for arrival in self._arriving:
            if arrival.tenant in tenants and arrival.by.tenant is None:
                arrival.refuse(NotFound("the tenant was deleted while the request was under way"))
            elif arrival.tenant in tenants or arrival.by.key_id in keys:
                arrival.refuse(Unauthenticated("the key was revoked while the request was under way"))


class Arrival:
    """A version that is being published."""

    def __init__(self, tenant: str, by: Principal, room: Room, of_tenants: Counter[str]) -> None:
        self.tenant, self.by = tenant, by
        self._room, self._of_tenants = room, of_tenants
        self.is_stored = False  # whether blobs of the version are visible on the disk
        self._held = 0
        self._refusal: PrefixServiceError | None = None

    def refuse(self, error: PrefixServiceError) -> None:
        """Stops counting bytes, and raises `error` at the next `hold`."""
        self.end()
        self._refusal = error

    def hold(self, nbytes: int) -> None:
        """Counts at least `nbytes` bytes.

        Raises:
            QuotaExceeded: this version and the tenant's other publications exceed what the quota leaves.
            Unauthenticated, NotFound: the publisher's key was revoked, or the tenant was deleted.
        """
        if self._refusal is not None:
            raise self._refusal
        if nbytes <= self._held:
            return
        others = self._of_tenants[self.tenant] - self._held
        self._room.require(self.tenant, nbytes, others)
        self._of_tenants[self.tenant] = others + nbytes
        self._held = nbytes

    def end(self) -> None:
        """Stops counting bytes."""
        self._of_tenants[self.tenant] -= self._held
        if not self._of_tenants[self.tenant]:
            del self._of_tenants[self.tenant]
        self._held = 0


@dataclass(frozen=True, slots=True)
class Target:
    """The adapter that a version is published to, and its publisher.

    `make_tenant` creates the tenant with the version.
    """

    tenant: str
    adapter: str
    by: Principal
    make_tenant: bool = False


@dataclass(frozen=True, slots=True)
class Upload:
    """A version that is being uploaded: its target, its weights while they are written, and its bytes that count as
    used."""

    target: Target
    weights: StagedBlob
    arrival: Arrival

    @property
    def size(self) -> int:
        """The bytes of weights that were written."""
        return self.weights.size

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Appends to the weights. Blocking: call it in `take`.

        Raises:
            OutOfSpace, StorageFailed: the disk refused.
        """
        self.weights.write(data)

    async def take(self, write: Callable[[], object]) -> None:
        """Calls `write` in a thread; it writes what has arrived.

        Raises:
            OutOfSpace, StorageFailed: the disk refused.
        """
        await to_thread.run_sync(write)

    def hold(self) -> None:
        """Counts all weights that were written as used.

        Raises:
            QuotaExceeded: the quota leaves less.
            Unauthenticated, NotFound: the publisher's key was revoked, or the tenant was deleted.
        """
        self.arrival.hold(self.weights.size)
