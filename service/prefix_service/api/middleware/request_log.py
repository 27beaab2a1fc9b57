"""Every request: its id goes to the caller, its numbers to metrics and usage, and one line to the log."""

import random
import re
import time
from collections.abc import Awaitable
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefix_service.api.http.event_stream import STREAM
from prefix_service.api.http.paths import HEALTH
from prefix_service.api.http.problems import defect, problem
from prefix_service.api.http.served import SERVED, Served, load_seconds
from prefix_service.api.metrics.live import Live
from prefix_service.api.metrics.metrics import Metrics
from prefix_service.api.middleware.usage_counts import UsageCounts
from prefix_service.errors import PrefixServiceError
from prefix_service.logs import LogLevel, RequestLog, request_context

UNROUTED: Final = "none"
"""The route of a request that was answered before routing, or that no route matches."""

_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_QUIET: Final = HEALTH | {"/metrics"}
_MOST_NAMED: Final = 16  # versions of one answer; a batch may have hundreds


class RequestMiddleware:
    """The outermost middleware: keeps a well-formed `X-Request-ID` or makes one, and returns it in every response,
    with the id of the catalog in `Prefix-Catalog`.

    Of what a caller sends, the log has that id alone: templates instead of paths, no query, no header, no body. An
    adapter is named if the caller may read it and the answer is made of it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, usage: UsageCounts, live: Live, catalog_id: str) -> None:
        self._app = app
        self._catalog = b"prefix-catalog", catalog_id.encode()
        self._metrics, self._usage, self._live = metrics, usage, live
        self._log = RequestLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, and records it when it has ended."""
        request_id = _request_id(scope)
        request_context.set({"request_id": request_id.decode()})
        outcome = _Outcome(send, [self._catalog, (b"x-request-id", request_id)])
        started = time.perf_counter()
        self._metrics.in_flight += 1
        try:
            await self._app(scope, receive, outcome)
        except Exception as error:  # noqa: BLE001 - no outer layer could answer
            # An error of a route has been answered and logged; uvicorn would log it again.
            if not outcome.status:
                answer = problem(error) if isinstance(error, PrefixServiceError) else defect(error)
                await answer(scope, receive, outcome)
            elif outcome.status < 500:
                defect(error)  # in the middle of an answer, which ends here: it can only be logged
        finally:
            self._metrics.in_flight -= 1
            self._record(scope, outcome, started, time.perf_counter())

    def _record(self, scope: Scope, outcome: "_Outcome", started: float, ended: float) -> None:
        seconds = ended - started
        route = getattr(scope.get("route"), "path", UNROUTED)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        sent = 0 if method == "HEAD" else outcome.sent
        self._metrics.count(route, method, outcome.status, seconds, sent)
        self._usage.count(scope, outcome.status, sent)
        if route not in _QUIET and STREAM not in scope:
            self._count_live(scope, outcome.status, seconds, sent)
        level = _level(route, outcome.status)
        if not self._log.is_enabled_for(level):
            return
        fields = {
            **request_context.get(),
            "method": method,
            "route": route,
            "status": outcome.status,
            "seconds": round(seconds, 6),
            "bytes": sent,
            "tenant": scope.get("tenant"),
            "code": scope.get("problem"),
        }
        if parts := scope.get(SERVED):
            _name(fields, parts)
            _divide(fields, load_seconds(scope), started, outcome.began or ended, ended)
        self._log.write(level, fields)

    def _count_live(self, scope: Scope, status: int, seconds: float, sent: int) -> None:
        code = scope.get("problem") or ("aborted" if not status else None)
        self._live.count(scope.get("tenant"), code, seconds, sent, is_cold=load_seconds(scope) is not None)


class _Outcome:
    """An answer as it passes: its status and the moment of `time.perf_counter` when it began (both 0 until then), and
    bytes of its body."""

    __slots__ = ("_headers", "_send", "began", "sent", "status")

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = self.sent = 0
        self.began = 0.0
        self._send, self._headers = send, headers

    def __call__(self, message: Message) -> Awaitable[None]:
        """Notes a message, and passes it on."""
        if (body := message.get("body")) is not None:
            self.sent += len(body)
        elif message["type"] == "http.response.start":
            self.status, self.began = message["status"], time.perf_counter()
            message["headers"] = [*message.get("headers", ()), *self._headers]
        return self._send(message)


def _name(fields: dict[str, Any], parts: tuple[Served, ...]) -> None:
    """Add the versions which an answer is made of; the first few, if there are many."""
    if len(parts) == 1:
        part = parts[0]
        fields["tenant"], fields["adapter"], fields["version"] = part.tenant, part.adapter, part.version
    else:
        fields["versions"] = [f"{part.tenant}/{part.adapter}@{part.version}" for part in parts[:_MOST_NAMED]]
        fields["num_versions"] = len(parts)


def _divide(fields: dict[str, Any], load: float | None, started: float, began: float, ended: float) -> None:
    """Adds whether anything was loaded, and the parts of a request's time: loading, sending, and preparing, which is
    everything else until the answer begins: reading the catalog, waiting for turns and memory, planning, converting
    tensors, and hashing the body."""
    fields["cold"] = load is not None
    loading = load or 0.0
    fields["prepare_seconds"] = round(max(0.0, began - started - loading), 6)
    fields["load_seconds"] = round(loading, 6)
    fields["send_seconds"] = round(ended - began, 6)


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
