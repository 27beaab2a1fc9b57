"""The limit on lookups of keys and sessions that a process does not know, as wrong ones are."""

from typing import Final

from limits import RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from prefix_service.errors import Overloaded

_MOST: Final = RateLimitItemPerSecond(50)


class UnknownIds:
    """Bounds the lookups of unknown ids to 50 in a second, whoever sends them: a wrong key or session has such an id, a
    right key only for the quarter of a second until the change feed reports that another process created it."""

    def __init__(self) -> None:
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())

    def admit(self) -> None:
        """Counts one lookup.

        Raises:
            Overloaded: as many ids were looked up within a second as may be.
        """
        if not self._window.hit(_MOST, "unknown ids"):
            raise Overloaded("too many unknown keys are tried at the moment: check the key, or try again in a second")
