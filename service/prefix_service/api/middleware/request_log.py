"""What is told of every request: its id to the caller, its numbers to metrics and usage, one line to the log."""

import random
import re
import time
from collections.abc import Awaitable
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefix_service.api.http.event_stream import STREAM
from prefix_service.api.http.paths import HEALTH
from prefix_service.api.http.problems import defect, problem
from prefix_service.api.http.served import is_any_loaded
from prefix_service.api.metrics.live import Live
from prefix_service.api.metrics.metrics import Metrics
from prefix_service.api.middleware.usage_counts import UsageCounts
from prefix_service.errors import PrefixServiceError
from prefix_service.logs import LogLevel, RequestLog, about

UNROUTED: Final = "none"
"""The route of a request that was answered before it had one, or that has none."""

_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_QUIET: Final = HEALTH | {"/metrics"}


class RequestMiddleware:
    """The outermost: `X-Request-ID` is taken over when well-formed, else made, and comes back on every response.

    Nothing that a caller chooses is told but that id: templates instead of paths, no query, no header, no body.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, usage: UsageCounts, live: Live) -> None:
        self._app = app
        self._metrics, self._usage, self._live = metrics, usage, live
        self._log = RequestLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and tell of it when it ended."""
        request_id = _request_id(scope)
        about.set({"request_id": request_id.decode()})
        outcome = _Outcome(send, request_id)
        started = time.perf_counter()
        self._metrics.in_flight += 1
        try:
            await self._app(scope, receive, outcome)
        except Exception as error:  # noqa: BLE001 - the last one who can answer
            # What the routes raise has been answered and logged; uvicorn would log it again.
            if not outcome.status:
                answer = problem(error) if isinstance(error, PrefixServiceError) else defect(error)
                await answer(scope, receive, outcome)
            elif outcome.status < 500:
                defect(error)  # in the middle of an answer, which ends here: all that is left is to tell of it
        finally:
            self._metrics.in_flight -= 1
            self._tell(scope, outcome, time.perf_counter() - started)

    def _tell(self, scope: Scope, outcome: "_Outcome", seconds: float) -> None:
        route = getattr(scope.get("route"), "path", UNROUTED)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        sent = 0 if method == "HEAD" else outcome.sent
        self._metrics.count(route, method, outcome.status, seconds, sent)
        self._usage.count(scope, outcome.status, sent)
        if route not in _QUIET and STREAM not in scope:
            self._count_live(scope, outcome.status, seconds, sent)
        level = _level(route, outcome.status)
        if not self._log.tells(level):
            return
        fields = {
            **about.get(),
            "method": method,
            "route": route,
            "status": outcome.status,
            "seconds": round(seconds, 6),
            "bytes": sent,
            "tenant": scope.get("tenant"),
            "code": scope.get("problem"),
        }
        self._log.line(level, fields)

    def _count_live(self, scope: Scope, status: int, seconds: float, sent: int) -> None:
        code = scope.get("problem") or ("aborted" if not status else None)
        self._live.count(scope.get("tenant"), code, seconds, sent, is_cold=is_any_loaded(scope))


class _Outcome:
    """An answer as it passes: its status (0 until it begins) and bytes of its body."""

    __slots__ = ("_header", "_send", "sent", "status")

    def __init__(self, send: Send, request_id: bytes) -> None:
        self.status = self.sent = 0
        self._send = send
        self._header = (b"x-request-id", request_id)

    def __call__(self, message: Message) -> Awaitable[None]:
        """Note a message, and pass it on."""
        if (body := message.get("body")) is not None:
            self.sent += len(body)
        elif message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), self._header]
        return self._send(message)


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value) and b"pfx_" not in value:
            found: bytes = value
            return found
    return b"%032x" % random.getrandbits(128)


def _level(route: str, status: int) -> LogLevel:
    if route in _QUIET:
        return "debug"
    return "warning" if status >= 500 else "info"
