"""How long a peer may keep the service waiting."""

from typing import Final

MINIMUM_RATE: Final = 64 << 10
"""Bytes a second that earn a peer another second: a slow line is served, one byte now and then is not."""


class Patience:
    """Seconds that are left: `timeout` at first and at most. Waiting takes them, bytes that move bring them back.

    As mod_reqtimeout of Apache: a deadline that arriving bytes extend at a minimum rate.
    """

    __slots__ = ("_timeout", "left")

    def __init__(self, timeout: float) -> None:
        self._timeout = self.left = timeout

    def spend(self, seconds: float, nbytes: int) -> None:
        """So long it was waited, and so many bytes moved meanwhile."""
        self.left = min(self._timeout, self.left - seconds + nbytes / MINIMUM_RATE)

    def renew(self) -> None:
        """All of it: nothing is waited for."""
        self.left = self._timeout
