"""Shares slots and bytes between tenants: equal turns, and room that no tenant can take whole. Pure state."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Share:
    """An amount (of slots, of bytes) that tenants take and give back.

    A tenant that already has some may take more only if its new amount is at most the rest. One tenant alone gets half
    of the total, two get a third each, and there is always room for another (dynamic thresholds, Choudhury and Hahne
    1998).
    """

    def __init__(self, total: int) -> None:
        self._total, self.taken = total, 0
        self._of: dict[str, int] = {}

    def has_room(self, tenant: str, amount: int) -> bool:
        """Returns whether a tenant may take an amount now."""
        own, left = self.of(tenant), self._total - self.taken - amount
        return left >= 0 and (own == 0 or own + amount <= left)

    def of(self, tenant: str) -> int:
        """Returns the amount that a tenant has."""
        return self._of.get(tenant, 0)

    def take(self, tenant: str, amount: int) -> None:
        """Gives a tenant an amount."""
        self.taken += amount
        self._of[tenant] = self.of(tenant) + amount

    def give(self, tenant: str, amount: int) -> None:
        """Takes an amount back from a tenant."""
        self.taken -= amount
        self._of[tenant] -= amount
        if not self._of[tenant]:
            del self._of[tenant]


class Turns(Generic[T]):
    """A queue for each tenant, in order of arrival; the tenants take turns."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()

    def add(self, tenant: str, item: T) -> None:
        """Adds an item to the end of its tenant's queue."""
        self._waiting.setdefault(tenant, deque()).append(item)

    def discard(self, tenant: str, item: T) -> None:
        """Removes an item, if it waits."""
        items = self._waiting.get(tenant)
        if items is not None and item in items:
            items.remove(item)
            if not items:
                del self._waiting[tenant]

    def take(self, may_begin: Callable[[T], bool]) -> Iterator[T]:
        """Yields the items that may begin; the caller begins each one before it asks for the next.

        A tenant whose first item may not begin is passed over.
        """
        passed_over = 0
        while passed_over < len(self._waiting):
            tenant, items = next(iter(self._waiting.items()))
            self._waiting.move_to_end(tenant)
            if not may_begin(items[0]):
                passed_over += 1
                continue
            passed_over = 0
            item = items.popleft()
            if not items:
                del self._waiting[tenant]
            yield item
