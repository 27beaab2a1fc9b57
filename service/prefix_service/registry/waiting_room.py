"""Requests that wait for memory, in a queue of each tenant."""

import asyncio
import time
from collections import deque
from collections.abc import Hashable


class Waiter:
    """A request's waiter in a queue. It keeps the waiter until it leaves."""

    __slots__ = ("_may_try", "queue")

    def __init__(self, queue: Hashable) -> None:
        self.queue = queue
        self._may_try = asyncio.Event()

    async def may_try_before(self, until: float) -> bool:
        """Waits until the request may look for memory again. Returns False if the time `until` came first."""
        self._may_try.clear()
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await self._may_try.wait()
        except TimeoutError:
            return False
        return True

    def wake(self) -> None:
        """Lets the request look again."""
        self._may_try.set()


class WaitingRoom:
    """Wakes the first request of each queue whenever bytes were freed, and the next one when the first has left.

    Hundreds of requests of one tenant that cannot have memory cost every release one try, not hundreds.
    """

    def __init__(self) -> None:
        self._queues: dict[Hashable, deque[Waiter]] = {}

    def enter(self, queue: Hashable) -> Waiter:
        """Returns a waiter at the end of a queue."""
        waiter = Waiter(queue)
        self._queues.setdefault(queue, deque()).append(waiter)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Gives a waiter up: the request has what it needs, or waits no longer."""
        waiters = self._queues[waiter.queue]
        waiters.remove(waiter)
        if waiters:
            waiters[0].wake()
        else:
            del self._queues[waiter.queue]

    def announce(self) -> None:
        """Bytes were freed."""
        for waiters in self._queues.values():
            waiters[0].wake()
