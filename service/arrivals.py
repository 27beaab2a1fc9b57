"""Bytes of versions that are being made, counted as used by their tenants."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from service.catalog.records import Room
from service.errors import QuotaExceeded


class Arrivals:
    """Versions of this process that are being made. Pure state: the catalog's transaction decides in the end."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()

    def of(self, tenant: str) -> int:
        """Returns the bytes of a tenant's versions that are being made."""
        return self._bytes[tenant]

    @contextlib.contextmanager
    def begin(self, tenant: str, room: Room, nbytes: int) -> Iterator["Arrival"]:
        """Counts a version of at least so many bytes as used by its tenant while the block runs.

        Raises:
            QuotaExceeded: the quota leaves less.
        """
        arrival = Arrival(tenant, room, self._bytes)
        arrival.hold(nbytes)
        try:
            yield arrival
        finally:
            arrival.end()


class Arrival:
    """A version that is being made."""

    def __init__(self, tenant: str, room: Room, of_tenants: Counter[str]) -> None:
        self._tenant, self._room, self._of_tenants = tenant, room, of_tenants
        self._held = 0

    def hold(self, nbytes: int) -> None:
        """Counts at least so many bytes.

        A version that is no larger than the largest of its adapter needs no room while the tenant makes no other: its
        content may be known.

        Raises:
            QuotaExceeded: with the tenant's other versions that are being made, this is more than the quota leaves.
        """
        if nbytes <= self._held:
            return
        room, others = self._room, self._of_tenants[self._tenant] - self._held
        may_be_known = not others and nbytes <= room.largest
        if room.left is not None and others + nbytes > room.left and not may_be_known:
            coming = f" and makes other versions of {others} bytes" if others else ""
            raise QuotaExceeded(
                f"tenant {self._tenant!r} has {room.quota - room.left} of {room.quota} bytes{coming}, and this version "
                f"takes at least {nbytes}: delete versions, or ask the platform for more"
            )
        self._of_tenants[self._tenant] = others + nbytes
        self._held = nbytes

    def end(self) -> None:
        """Counts nothing any more."""
        self._of_tenants[self._tenant] -= self._held
        if not self._of_tenants[self._tenant]:
            del self._of_tenants[self._tenant]
        self._held = 0
