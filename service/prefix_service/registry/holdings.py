"""How much of a byte budget may be held: leased or pinned, so that it cannot be evicted. Pure state."""

from typing import Final, Generic

from prefix_service.errors import OutOfSpace, Overloaded
from prefix_service.registry.accounts import Entry, K, Tenant

_PART: Final = 2  # one request, and all pins together, may hold one half


class Holdings(Generic[K]):
    """Counts the held bytes, and refuses leases and pins that would starve other tenants.

    Dynamic thresholds (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998):
    a tenant may lease as many bytes as remain unheld afterwards. The readers of one tenant, however slowly they read,
    thus hold at most half of the budget, and those of the next tenant half of the rest. A tenant without leases may
    lease the bytes of one request, if that many are not held. Pins of all tenants stay within half of the budget, by
    the same rule; they do not count towards the leases of their owner.
    """

    def __init__(self, budget: int, setting: str) -> None:
        self.budget = budget
        self.most = budget // _PART
        self.held = 0
        self.pinned = 0
        self._setting = setting

    def require_size(self, nbytes: int) -> None:
        """Checks the bytes that one request would hold.

        Raises:
            OutOfSpace: they are more than one request may hold.
        """
        if nbytes > self.most:
            raise OutOfSpace(
                f"{nbytes} bytes are needed in memory, and one request may hold {self.most}: ask for less, or "
                f"raise {self._setting} (the limit is half of it)"
            )

    def require_lease(self, owner: Tenant[K], nbytes: int, *, held: bool, own: int) -> None:
        """Checks a lease of an entry without leases. `held` is whether the entry is pinned; the request that asks
        already leases `own` bytes of this tenant.

        Raises:
            Overloaded: the tenant's readers would hold more bytes than remain unheld.
        """
        free = self.budget - self.held - (0 if held else nbytes)
        if free < (owner.leased + nbytes if owner.leased > own else 0):
            raise Overloaded(
                f"{nbytes} bytes are needed in memory, where answers of tenant {owner.name!r} that are loaded or sent "
                f"hold {owner.leased} of {self.budget} bytes, and others need the rest: try again, or read faster"
            )

    def require_pin(self, entry: Entry[K]) -> None:
        """Checks a pin of an entry that is not pinned.

        Raises:
            OutOfSpace: the tenant would have pinned more bytes than remain unpinned of the half that may be pinned.
        """
        owner = entry.owner
        if owner.pinned + entry.nbytes > self.most - self.pinned - entry.nbytes:
            raise OutOfSpace(
                f"tenant {owner.name!r} has pinned {owner.pinned} bytes, and {entry.nbytes} more would leave too "
                f"little to others, of {self.most} bytes that all may pin: unpin some, or raise {self._setting} "
                "(the limit is half of it)"
            )

    def lease(self, entry: Entry[K], own: int) -> None:
        """Counts the first lease of an entry; the request that asks already leases `own` bytes of this tenant.

        Raises:
            Overloaded: the tenant's readers would hold more bytes than remain unheld.
        """
        owner, nbytes = entry.owner, entry.nbytes
        self.require_lease(owner, nbytes, held=entry.pinned, own=own)
        owner.leased += nbytes
        if not entry.pinned:
            self.held += nbytes

    def release(self, entry: Entry[K]) -> None:
        """Counts the end of an entry's last lease."""
        entry.owner.leased -= entry.nbytes
        if not entry.pinned:
            self.held -= entry.nbytes

    def pin(self, entry: Entry[K], *, pinned: bool) -> None:
        """Pins an entry that is not pinned, or unpins one that is."""
        change = entry.nbytes if pinned else -entry.nbytes
        entry.pinned = pinned
        entry.owner.pinned += change
        self.pinned += change
        if not entry.leases:
            self.held += change
