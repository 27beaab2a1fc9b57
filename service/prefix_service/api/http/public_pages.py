"""Pages that are the same for every caller: made once, compressed, and revalidated by an entity tag."""

import gzip
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Final

from anyio import to_thread
from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from prefix_service.api.http.negotiation import is_current, takes_gzip

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What a browser may load for `/docs` and `/ui`: files of this service alone, no script or style inside a page. Swagger
UI's style sheet has its pictures inside itself, as `data:` addresses."""


class Page(Response):
    """A page with an entity tag, compressed for callers that accept gzip. It answers 200 or 304.

    All answers send the same two objects, so answers that nobody reads hold no copies.
    """

    def __init__(self, made: Response) -> None:
        super().__init__()
        fields = {
            "Cache-Control": "no-cache",
            "Content-Type": made.headers["content-type"],
            "Content-Security-Policy": CONTENT_SECURITY_POLICY,
            "Vary": "Accept-Encoding",
            "X-Content-Type-Options": "nosniff",
        }
        body = bytes(made.body)
        self._plain = self._answers(body, fields)
        self._compressed = self._answers(gzip.compress(body, mtime=0), {**fields, "Content-Encoding": "gzip"})

    @staticmethod
    def _answers(body: bytes, fields: dict[str, str]) -> tuple[str, Response, Response]:
        """Returns the entity tag of a representation, and its answers 200 and 304."""
        etag = f'"{sha256(body).hexdigest()}"'
        not_modified = Response(status_code=304, headers={"ETag": etag, "Vary": fields["Vary"]})
        return etag, Response(body, headers={"ETag": etag, **fields}), not_modified

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        headers = Headers(raw=scope["headers"])
        etag, answer, not_modified = self._compressed if takes_gzip(headers) else self._plain
        await (not_modified if is_current(headers, etag) else answer)(scope, receive, send)


def read_page(file: Path, media_type: str) -> Response:
    """Returns the response with a file of the package."""
    return Response(file.read_bytes(), media_type=media_type)


def page_route(path: str, make: Callable[[], Response]) -> Route:
    """Returns the route of a page, which the first request makes, in a thread. Log and metrics name it by the `route`
    in the scope, as they name FastAPI's own routes."""
    made: list[Page] = []

    async def answer(request: Request) -> Response:
        request.scope["route"] = route
        if not made:
            made.append(await to_thread.run_sync(lambda: Page(make())))
        return made[0]

    route = Route(path, answer, include_in_schema=False)
    return route
