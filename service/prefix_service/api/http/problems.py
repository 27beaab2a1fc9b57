"""Every failure as `application/problem+json` (RFC 9457), with the one table from errors to HTTP statuses."""

import json
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from prefix_service import errors
from prefix_service.logs import redacted
from prefix_service.prefix.json_text import shown
from prefix_service.registry.allocation import exhausted

log: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("prefix_service")

STATUSES: Final[dict[type[errors.PrefixServiceError], int]] = {
    errors.InvalidInput: 422,
    errors.NotFound: 404,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.Conflict: 409,
    errors.Gone: 410,
    errors.PreconditionFailed: 412,
    errors.TooLarge: 413,
    errors.RequestTimeout: 408,
    errors.MalformedRequest: 400,
    errors.HeaderFieldsTooLarge: 431,
    errors.UriTooLong: 414,
    errors.NotAcceptable: 406,
    errors.UnsupportedMediaType: 415,
    errors.RangeNotSatisfiable: 416,
    errors.OutOfSpace: 507,
    errors.RateLimited: 429,
    errors.Unavailable: 503,
    errors.Internal: 500,
}
"""HTTP statuses by error class.

The most specific class decides. Under `/v2`, 422 becomes 400, as its protocol requires.
"""

_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

_LAST: Final = (errors.RequestTimeout, errors.MalformedRequest, errors.HeaderFieldsTooLarge)
"""Errors after which the connection is closed, since its next bytes would belong to the refused request."""


_MOST_DETAIL: Final = 4096
"""The most bytes of an error message, any part of which a caller may have sent."""


def status_of(error: errors.PrefixServiceError) -> int:
    """Returns the HTTP status of an error."""
    return next(STATUSES[cls] for cls in type(error).__mro__ if cls in STATUSES)


def problem(error: errors.PrefixServiceError) -> Response:
    """Returns the response to an error; it contains nothing beyond the error's message."""
    headers = {}
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="prefix-service"'
    if isinstance(error, errors.Unavailable):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, errors.RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.length}"
    if isinstance(error, _LAST):
        headers["Connection"] = "close"
    return _ProblemResponse(status_of(error), error.code, error.message, headers)


class _ProblemResponse(Response):
    """A problem document; the log line of the request gets its code.

    Under `/v2` it also has the member `error`, the only one that clients of the Open Inference Protocol read.
    """

    def __init__(self, status: int, code: str, detail: str, headers: dict[str, str]) -> None:
        title = code.replace("-", " ").capitalize()
        body = {"type": f"urn:prefix-service:{code}", "title": title, "status": status, "detail": _bounded(detail)}
        self._document = {**body, "code": code}
        content = json.dumps(self._document).encode()
        super().__init__(content, status, {"Cache-Control": "no-store", **headers}, "application/problem+json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["problem"] = self._document["code"]
        if scope["path"].startswith("/v2"):
            self._speak_open_inference()
        await super().__call__(scope, receive, send)

    def _speak_open_inference(self) -> None:
        self.status_code = 400 if self.status_code == 422 else self.status_code
        document = {**self._document, "status": self.status_code, "error": self._document["detail"]}
        self.body = json.dumps(document).encode()
        self.headers["Content-Length"] = str(len(self.body))


def _bounded(detail: str) -> str:
    """Returns a message without secrets, cut at `_MOST_DETAIL` bytes of UTF-8."""
    # Twice as many characters are searched, since half a key at the end would not be recognised.
    data = redacted(detail[: 2 * _MOST_DETAIL]).encode("utf-8", "replace")
    if len(data) <= _MOST_DETAIL:
        return data.decode()
    return data[: _MOST_DETAIL - 3].decode("utf-8", "ignore") + "…"


def install(app: FastAPI) -> None:
    """Makes this app answer every failure with a problem document."""
    app.add_exception_handler(errors.PrefixServiceError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _routing)
    app.add_exception_handler(Exception, _defect)


async def _known(_request: Request, error: Exception) -> Response:
    if not isinstance(error, errors.PrefixServiceError):
        raise TypeError(type(error))
    return problem(error)


async def _invalid(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise TypeError(type(error))
    return problem(invalid_request(error.errors()))


def invalid_request(found: Any) -> errors.InvalidRequest:
    """Returns the first of pydantic's errors as an InvalidRequest of one sentence."""
    first = found[0]
    where = ".".join(str(part)[:80] for part in first["loc"] if part not in ("query", "path", "body"))
    return errors.InvalidRequest(f"{where or 'the request'}: {first['msg']}, got {shown(first.get('input'))}")


async def _routing(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise TypeError(type(error))
    if error.status_code == 404:
        return problem(errors.NotFound("there is no such resource"))
    if error.status_code == 405:
        allowed = ", ".join(_allowed_methods(request))
        detail = f"this resource has no {request.method:.40}: send one of {allowed}"
        return _ProblemResponse(405, "method-not-allowed", detail, {"Allow": allowed})
    return _ProblemResponse(error.status_code, "http-error", str(error.detail), dict(error.headers or {}))


def _allowed_methods(request: Request) -> list[str]:
    """Returns the methods of a path in all its routes; Starlette only returns those of the first route."""
    routes = request.app.routes
    scopes = {method: {**request.scope, "method": method} for method in _METHODS}
    return [
        method for method, scope in scopes.items() if any(route.matches(scope)[0] is Match.FULL for route in routes)
    ]


async def _defect(_request: Request, error: Exception) -> Response:
    return defect(error)


def defect(error: Exception) -> Response:
    """Returns the response to an unexpected exception, and logs it; the status is 507 if memory itself ran out."""
    if exhausted(error):
        log.warning("a request ran out of memory", reason=str(error)[:200])
        return problem(errors.OutOfSpace("this machine has no memory left for the request: send less, or try again"))
    log.error("a request met a defect of the service", exc_info=error)
    return problem(errors.Internal("a defect of the service; its log says more"))
