"""How long a peer may keep the service waiting."""

from typing import Final

MINIMUM_RATE: Final = 64 << 10
"""Bytes that earn a peer another second of patience: a slow line is served, a byte now and then is not."""


class Patience:
    """The seconds `left` to wait for a peer: `timeout` at first and at most; waiting takes some, progress restores
    some.

    This is Apache's mod_reqtimeout: arriving bytes extend the deadline at a minimum rate.
    """

    __slots__ = ("_timeout", "left")

    def __init__(self, timeout: float) -> None:
        self._timeout = self.left = timeout

    def spend(self, seconds: float, nbytes: int) -> None:
        """Deducts `seconds` of waiting; credits `nbytes` of progress."""
        self.left = min(self._timeout, self.left - seconds + nbytes / MINIMUM_RATE)

    def renew(self) -> None:
        """Restores all of it, since nothing is waited for."""
        self.left = self._timeout
