"""Checks the path and query of every request before a route sees it."""

import re
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from prefix_service.api.http.problems import problem
from prefix_service.errors import NotFound, UriTooLong

_MODEL: Final = re.compile(rb"(/v2/(?:repository/)?models/[^/]*?)%2f", re.IGNORECASE)


_MOST_BYTES: Final = 8000
"""The most bytes of path and query: what RFC 9110, section 4.1, asks every recipient to support."""


class StrictPathMiddleware:
    """Bounds path and query, and rejects hidden slashes and double encoding: `%2F` and `%25` are 404.

    The one slash of a model's name under `/v2` may be encoded.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Checks the path as it was sent, before percent-decoding."""
        if scope["type"] == "http" and (size := len(scope["raw_path"]) + len(scope["query_string"])) > _MOST_BYTES:
            too_long = UriTooLong(f"path and query have {size} bytes, more than {_MOST_BYTES}")
            await problem(too_long)(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"].startswith(("/v1", "/v2")):
            raw = _MODEL.sub(rb"\1/", scope.get("raw_path", b"")).lower()
            if b"%2f" in raw or b"%25" in raw:
                await problem(NotFound("there is no such resource"))(scope, receive, send)
                return
        await self._app(scope, receive, send)
