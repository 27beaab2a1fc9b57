"""When a request is sent to a second address because the first is slow, and how often that may happen.

Tail latencies of one address are cut by asking another (Dean and Barroso, "The Tail at Scale", 2013). The delay follows
from the answers before, and a budget keeps the second requests from becoming the load that made the first ones slow.
"""

from collections import deque
from typing import Final

_KEPT: Final = 128
_FEWEST: Final = 16
_QUANTILE: Final = 0.95
_MARGIN: Final = 1.5
_SHORTEST: Final = 0.02  # seconds; below it the delay would follow the noise of schedulers
_UNKNOWN: Final = 1.0  # seconds, before there are answers to derive it from
_SHARE: Final = 0.05
_MOST_SAVED: Final = 4.0


class Hedging:
    """The latencies of first bytes, and the budget of second requests: one in twenty requests, and four at a time.

    Threads share it without a lock: a lost update changes an estimate.
    """

    def __init__(self) -> None:
        self._latencies: deque[float] = deque(maxlen=_KEPT)
        self._delay = _UNKNOWN
        self._observed = 0
        self._unused = _MOST_SAVED

    @property
    def delay(self) -> float:
        """The seconds after which a second request is worth sending."""
        return self._delay

    def observe(self, seconds: float) -> None:
        """Notes how long a first byte took, and with it that there was a request."""
        self._unused = min(self._unused + _SHARE, _MOST_SAVED)
        self._latencies.append(seconds)
        self._observed += 1
        if self._observed % _FEWEST == 0:
            ordered = sorted(self._latencies)
            self._delay = max(_MARGIN * ordered[int(_QUANTILE * len(ordered))], _SHORTEST)

    def take(self) -> bool:
        """Returns whether the budget allows a second request, and deducts it."""
        if self._unused < 1:
            return False
        self._unused -= 1
        return True
