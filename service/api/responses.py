"""A planned prefix as an HTTP response: conditions, ranges, and buffers that go out one after another."""

import base64
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.negotiation import matches, requested_range
from service.library import Library
from service.plan import Plan
from service.prefix.wire import MEDIA_TYPE

_IMMUTABLE: Final = "private, max-age=31536000, immutable"
_REVALIDATE: Final = "private, no-cache"


class PrefixResponse(Response):
    """Sends a plan's bytes with backpressure; its rendering stays pinned until the last byte left."""

    def __init__(self, library: Library, plan: Plan, *, immutable: bool) -> None:
        self.background = None
        self._library, self._plan = library, plan
        self._fields = {
            "ETag": plan.etag,
            "Cache-Control": _IMMUTABLE if immutable else _REVALIDATE,
            "Prefix-Version": str(plan.version.number),
            "Prefix-Digest": plan.version.digest,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 304, 200 or 206; what goes wrong before the first byte is raised as this project's error."""
        headers = Headers(scope=scope)
        reading = scope["method"] in ("GET", "HEAD")
        if reading and matches(headers.get("if-none-match"), self._plan.etag):
            await send(_start(304, self._fields))
            await send({"type": "http.response.body"})
            return
        length = self._plan.message.content_length
        found = requested_range(headers, self._plan.etag, length) if reading else None
        start, stop = found or (0, length)
        self._fields |= {
            "Content-Type": MEDIA_TYPE,
            "Content-Length": str(stop - start),
            "Accept-Ranges": "bytes",
            "X-Content-Type-Options": "nosniff",
        }
        if found:
            self._fields["Content-Range"] = f"bytes {start}-{stop - 1}/{length}"
        status = 206 if found else 200
        wants_digest = self._plan.is_one_rendering or "sha-256" in headers.get("want-repr-digest", "")
        if scope["method"] == "HEAD" and not wants_digest:
            await send(_start(status, self._fields))
            await send({"type": "http.response.body"})
            return
        async with self._library.rendering(self._plan) as rendering:
            if wants_digest:
                digest = base64.b64encode(await self._library.body_digest(self._plan, rendering)).decode()
                self._fields["Repr-Digest"] = f"sha-256=:{digest}:"
            await send(_start(status, self._fields))
            if scope["method"] != "HEAD":
                for chunk in self._plan.message.chunks(rendering, start, stop):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body"})


def _start(status: int, headers: dict[str, str]) -> dict[str, object]:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}
