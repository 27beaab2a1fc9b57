"""Requests that wait for memory, in one queue per tenant."""

import asyncio
import time
from collections import deque
from collections.abc import Hashable


class Waiter:
    """A waiting request. It keeps its position in the queue until it leaves."""

    __slots__ = ("_may_try", "queue")

    def __init__(self, queue: Hashable) -> None:
        self.queue = queue
        self._may_try = asyncio.Event()

    async def may_try_before(self, until: float) -> bool:
        """Waits until the request may look for memory again.

        Returns False if the time `until` (monotonic) came first.
        """
        self._may_try.clear()
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await self._may_try.wait()
        except TimeoutError:
            return False
        return True

    def wake(self) -> None:
        """Lets the request look for memory again."""
        self._may_try.set()


class WaitingRoom:
    """Wakes the first request of each queue whenever bytes are freed, and the next one when the first has left.

    If hundreds of requests of one tenant cannot have memory, each release costs one attempt, not hundreds.
    """

    def __init__(self) -> None:
        self._queues: dict[Hashable, deque[Waiter]] = {}

    def enter(self, queue: Hashable) -> Waiter:
        """Adds a request to the end of a queue, and returns it."""
        waiter = Waiter(queue)
        self._queues.setdefault(queue, deque()).append(waiter)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Removes a request that has memory, or gives up; wakes the next one of its queue."""
        waiters = self._queues[waiter.queue]
        waiters.remove(waiter)
        if waiters:
            waiters[0].wake()
        else:
            del self._queues[waiter.queue]

    def announce(self) -> None:
        """Wakes the first request of each queue, since bytes were freed."""
        for waiters in self._queues.values():
            waiters[0].wake()
