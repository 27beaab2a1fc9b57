"""Who may load now: a few at a time, tenants in turn."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

T = TypeVar("T")


class Turns:
    """Threads for `places` calls at once, of their own: what waits here does not keep SQL or files waiting.

    A place that becomes free goes to the next tenant that waits, not to the next call: five hundred loads of one
    tenant delay the one load of another by one at most, for each place.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._threads = CapacityLimiter(places)
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def run(self, tenant: str, call: Callable[[], T]) -> T:
        """Call in a thread, once it is the tenant's turn."""
        await self._begin(tenant)
        try:
            return await to_thread.run_sync(call, limiter=self._threads)
        finally:
            self._end()

    async def _begin(self, tenant: str) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had been given already
                self._end()
            raise

    def _end(self) -> None:
        """Give the place to the tenant that has waited longest for one; it goes behind the others then."""
        while self._waiting:
            tenant, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[tenant] = turns
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
