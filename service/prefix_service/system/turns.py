"""Threads for a few calls at a time; tenants take turns."""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final, TypeVar

from anyio import CancelScope, CapacityLimiter, to_thread

T = TypeVar("T")

ASKING: Final = ContextVar("prefix_service tenant in whose turn a request reads and writes the catalog", default="")
"""The empty text, which is no tenant's name, is the turn of platform admins and of background work."""


class Turns:
    """Threads of its own for `places` calls in parallel, so that waiting calls do not delay SQL or files.

    A place that becomes free goes to the next tenant that waits, not to the next call: five hundred loads of one
    tenant delay the one load of another by one at most, for each place. A tenant takes `most` places at most: by
    default all but the last, unless there is only one, so a long call of one tenant does not delay another's.
    """

    def __init__(self, places: int, most: int | None = None) -> None:
        self._free = places
        self._most = max(places - 1, 1) if most is None else most  # calls of one tenant
        self._threads = CapacityLimiter(places)
        self._running: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def run(self, tenant: str, call: Callable[[], T], *, abandons: bool = False) -> T:
        """Runs `call` in a thread once it is the tenant's turn; returns its result.

        The turn ends with the call, even if the caller is cancelled before. With `abandons` the turn ends with the
        cancellation, and the thread finishes a call that nobody waits for.
        """
        await self._begin(tenant)
        try:
            if abandons:
                return await to_thread.run_sync(call, limiter=self._threads, abandon_on_cancel=True)
            return await in_thread(call, self._threads)
        finally:
            self._end(tenant)

    async def _begin(self, tenant: str) -> None:
        if self._free and self._running[tenant] < self._most:
            self._take(tenant)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the turn had begun already
                self._end(tenant)
            raise

    def _take(self, tenant: str) -> None:
        self._free -= 1
        self._running[tenant] += 1

    def _end(self, tenant: str) -> None:
        """Ends a turn, and gives the place to the tenant that has waited longest; that tenant then goes to the end."""
        self._free += 1
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        while self._free and (found := self._next()) is not None:
            following, turn = found
            if not turn.done():
                self._take(following)
                turn.set_result(None)

    def _next(self) -> tuple[str, "asyncio.Future[None]"] | None:
        tenant = next((name for name in self._waiting if self._running[name] < self._most), None)
        if tenant is None:
            return None
        turns = self._waiting.pop(tenant)
        turn = turns.popleft()
        if turns:
            self._waiting[tenant] = turns
        return tenant, turn


async def in_thread(call: Callable[[], T], limiter: CapacityLimiter | None = None) -> T:
    """Runs `call` in a thread; returns its result.

    A thread cannot be stopped: a caller that is cancelled waits until the call has ended, so that nothing is freed that
    the call still uses.
    """
    running = asyncio.ensure_future(to_thread.run_sync(call, limiter=limiter))
    cancelled: asyncio.CancelledError | None = None
    with CancelScope(shield=True):  # against anyio's scopes, which cancel repeatedly
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        running.exception()  # retrieved, so that asyncio does not log it
        raise cancelled
    return running.result()
