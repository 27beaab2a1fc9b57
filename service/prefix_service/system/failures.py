"""Failed loads, remembered for a moment, so that many requests for a broken version read its bytes once."""

import copy
import threading
import time
from collections.abc import Callable
from typing import Final, Generic

from prefix_service.errors import CorruptBlob, InvalidInput, PrefixServiceError, StorageFailed
from prefix_service.system.bounded import K, put_last

REMEMBERED_SECONDS: Final = 3.0
_REMEMBERED_KEYS: Final = 1_000
_LASTING: Final = (CorruptBlob, StorageFailed, InvalidInput)


class Failures(Generic[K]):
    """The errors of keys that cannot be loaded, for any number of threads. A lack of memory is not remembered: the next
    attempt may find some.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._errors: dict[K, tuple[float, PrefixServiceError]] = {}  # in order of expiry

    def remember(self, key: K, error: BaseException) -> None:
        """Remembers a lasting error; a key that is remembered already keeps its expiry."""
        if not isinstance(error, _LASTING):
            return
        with self._lock:
            if self._known(key) is None:
                put_last(self._errors, key, (self._clock() + REMEMBERED_SECONDS, _fresh(error)), _REMEMBERED_KEYS)

    def check(self, key: K) -> None:
        """Raises the error that is remembered for a key, if any."""
        with self._lock:
            error = self._known(key)
        if error is not None:
            raise _fresh(error)

    def _known(self, key: K) -> PrefixServiceError | None:
        until, error = self._errors.get(key, (0.0, None))
        if error is not None and until <= self._clock():
            del self._errors[key]
            return None
        return error

    def forget(self, matches: Callable[[K], bool]) -> None:
        """Forgets the errors of all keys that match, since their cause may be repaired."""
        with self._lock:
            for key in [key for key in self._errors if matches(key)]:
                del self._errors[key]


def _fresh(error: PrefixServiceError) -> PrefixServiceError:
    """Returns a copy of the error without its traceback, which would grow with each raise and keep its frames alive."""
    return copy.copy(error)
