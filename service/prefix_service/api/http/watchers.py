"""Streams that stay open: bounded apart from requests in flight, with a share for each tenant."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Final

from prefix_service.errors import Overloaded

_SHARES: Final = 4


class Watchers:
    """Counts open streams, at most `most`; those of one tenant may be a quarter of them. Pure state."""

    def __init__(self, most: int) -> None:
        self._most, self._share = most, max(1, most // _SHARES)
        self._of: Counter[str | None] = Counter()

    @contextlib.contextmanager
    def watching(self, tenant: str | None) -> Iterator[None]:
        """Counts a stream while the block runs; `tenant` is None for a key of the platform.

        Raises:
            Overloaded: there are too many.
        """
        if (total := self._of.total()) >= self._most:
            raise Overloaded(f"{total} streams are open, the most that this process has: try again", 5)
        if tenant is not None and self._of[tenant] >= self._share:
            raise Overloaded(f"tenant {tenant!r} has {self._share} streams open, the most that one may have", 5)
        self._of[tenant] += 1
        try:
            yield
        finally:
            self._of[tenant] -= 1
            if not self._of[tenant]:
                del self._of[tenant]
