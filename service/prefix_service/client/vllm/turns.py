"""How tenants share what there is one of: equal turns, and room that no tenant can take whole. Pure state."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Share:
    """An amount (of slots, of bytes) that tenants take and give back.

    A tenant that has some may take more only while it then has at most what is left, so that one alone gets half of the
    total, two a third each, and there is always room for another (dynamic thresholds, Choudhury and Hahne 1998).
    """

    def __init__(self, total: int) -> None:
        self._total, self.taken = total, 0
        self._of: dict[str, int] = {}

    def has_room(self, tenant: str, amount: int) -> bool:
        """Whether a tenant may take an amount now."""
        own, left = self.of(tenant), self._total - self.taken - amount
        return left >= 0 and (own == 0 or own + amount <= left)

    def of(self, tenant: str) -> int:
        """Returns what a tenant has."""
        return self._of.get(tenant, 0)

    def take(self, tenant: str, amount: int) -> None:
        """Count an amount as the tenant's."""
        self.taken += amount
        self._of[tenant] = self.of(tenant) + amount

    def give(self, tenant: str, amount: int) -> None:
        """Count an amount as the tenant's no longer."""
        self.taken -= amount
        self._of[tenant] -= amount
        if not self._of[tenant]:
            del self._of[tenant]


class Turns(Generic[T]):
    """What waits: of each tenant in the order of arrival, and the tenants in turn."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()

    def add(self, tenant: str, item: T) -> None:
        """Let an item wait, behind the others of its tenant."""
        self._waiting.setdefault(tenant, deque()).append(item)

    def discard(self, tenant: str, item: T) -> None:
        """Let an item wait no longer, if it does."""
        items = self._waiting.get(tenant)
        if items is not None and item in items:
            items.remove(item)
            if not items:
                del self._waiting[tenant]

    def take(self, may_begin: Callable[[T], bool]) -> Iterator[T]:
        """Yield the items that may begin, each of which must have begun before the next is asked for.

        A tenant whose first item may not begin is passed over, and the others go on.
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
