"""Decides whose input is parsed next: a few connections per turn of the event loop, callers in rotation."""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

_LONG: Final = 0.002
"""Seconds of an event-loop turn above which fewer connections get the next one."""

_FIRST, _MOST = 4, 32
"""Connections whose input is parsed in one turn; each begins at most one request."""


class InputTurns:
    """Lets the connections that have input take turns.

    An event loop delivers the input of all readable connections before it runs anything else: six hundred that send at
    the same time would delay every other request until theirs have begun. Here only a few connections are parsed per
    turn, and a caller with one connection does not wait behind the hundreds of another caller.
    """

    def __init__(self) -> None:
        self._most = self._left = _FIRST
        self._waiting: OrderedDict[str, deque[Callable[[], None]]] = OrderedDict()
        self._is_counting = False
        self._began: float | None = None  # of the previous turn, if connections waited then

    def take(self, caller: str, parse: Callable[[], None]) -> bool:
        """Returns whether a connection may parse now. If not, `parse` is called in a later turn."""
        if self._left and not self._waiting:
            self._left -= 1
            self._count_on()
            return True
        self.wait(caller, parse)
        return False

    def wait(self, caller: str, parse: Callable[[], None]) -> None:
        """Calls `parse` in a later turn."""
        self._waiting.setdefault(caller, deque()).append(parse)
        self._count_on()

    def _count_on(self) -> None:
        if not self._is_counting:
            self._is_counting = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        """Begins a turn with waiting connections: one of each caller, then the next of each."""
        self._adapt()
        self._left, self._is_counting = self._most, False
        chosen = []
        while self._waiting and self._left:
            self._left -= 1
            caller, queue = self._waiting.popitem(last=False)
            chosen.append(queue.popleft())
            if queue:
                self._waiting[caller] = queue
        if chosen:
            self._count_on()
        for parse in chosen:
            parse()

    def _adapt(self) -> None:
        """Takes fewer connections after a long turn, and more after a short
        one, since the cost of a request is unknown.
        """
        now = time.monotonic()
        if self._began is not None:
            self._most = max(self._most // 2, 1) if now - self._began > _LONG else min(self._most + 1, _MOST)
        self._began = now if self._waiting else None
