"""Decides whether a failed request is sent again, and when."""

import time
from typing import Final

import httpx

from prefix_service.client.protocol import Request
from prefix_service.client.transport.connection import NotConnected
from prefix_service.errors import (
    ConnectionFailed,
    CorruptBlob,
    NotFound,
    PrefixServiceError,
    RateLimited,
    Unavailable,
)

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 2.0
_NEVER_SENT: Final = (NotConnected, httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class Attempts:
    """The attempts of one request: its deadline, the growing pauses, and whether an attempt may have succeeded."""

    def __init__(self, request: Request, until: float) -> None:
        self._request, self._until = request, until
        self._may_be_done = False
        self._pause = _FIRST_PAUSE

    def pause_after(self, error: PrefixServiceError) -> float | None:
        """Returns the seconds to wait before another attempt; None if that cannot help or there is no time for it."""
        if not isinstance(error, ConnectionFailed | Unavailable) or isinstance(error, CorruptBlob):
            return None
        if not _was_refused(error):
            if not self._request.is_idempotent:
                return None
            self._may_be_done = True
        pause = max(self._pause, error.retry_after if isinstance(error, Unavailable) else 0)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return pause if time.monotonic() + pause < self._until else None

    def found_done(self, error: PrefixServiceError) -> bool:
        """Returns whether a deletion finds nothing because an earlier attempt, whose answer was lost, succeeded."""
        return self._may_be_done and self._request.method == "DELETE" and isinstance(error, NotFound)


def named(error: PrefixServiceError, request: Request) -> PrefixServiceError:
    """Returns an error with the id of its request, also if no answer had one; without it if nothing was sent."""
    return error if isinstance(error.__cause__, _NEVER_SENT) else error.met_by(request.request_id)


def _was_refused(error: PrefixServiceError) -> bool:
    """Returns whether the request was certainly not carried out."""
    return isinstance(error, RateLimited) or isinstance(error.__cause__, _NEVER_SENT)
