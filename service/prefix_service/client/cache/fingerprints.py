"""Fingerprints of base models that were read, for a minute: one may be given, or replaced, later."""

import threading
import time
from typing import Final

from prefix_service.prefix.fingerprint import Fingerprint
from prefix_service.system.bounded import put_last
from prefix_service.system.forks import renew_in_child

_FRESH: Final = 60.0  # seconds
_MOST: Final = 4096


class Fingerprints:
    """By the immutable name of a version. That one has none is remembered too. Safe to share between threads."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, Fingerprint]] = {}
        renew_in_child(self)
        self.renew()

    def renew(self) -> None:
        """Keep what is known in a forked child, whatever a thread of the parent was doing with it."""
        self._lock = threading.Lock()

    def get(self, version: str) -> Fingerprint | None:
        """Returns a fingerprint that was read less than a minute ago; None if there is none."""
        with self._lock:
            read_at, found = self._known.get(version, (0.0, None))
        return found if time.monotonic() - read_at < _FRESH else None

    def put(self, version: str, fingerprint: Fingerprint) -> None:
        """Remember a fingerprint that was read now, instead of the one that was read first if there are many."""
        with self._lock:
            put_last(self._known, version, (time.monotonic(), fingerprint), _MOST)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._known.clear()
