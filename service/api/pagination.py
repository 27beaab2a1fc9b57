"""Opaque cursors: the name behind which the next page begins."""

import base64
import contextlib
from urllib.parse import urlencode

from fastapi import Request

from service.errors import InvalidReference, InvalidRequest
from service.logs import redacted
from service.prefix.references import check_name


def encode_cursor(name: str) -> str:
    """The cursor of the page behind `name`."""
    return base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> str:
    """The name behind which a page begins; empty for the first.

    Raises:
        InvalidRequest: it is no cursor of this service.
    """
    if cursor is None:
        return ""
    name = _decoded(cursor)
    if name is None or encode_cursor(name) != cursor:
        raise InvalidRequest(f"cursor {cursor!r:.80} is not one that a listing gave")
    return name


def _decoded(cursor: str) -> str | None:
    padded = cursor + "=" * (-len(cursor) % 4)
    with contextlib.suppress(ValueError, InvalidReference):
        return check_name("cursor", base64.b64decode(padded.encode(), b"-_", validate=True).decode())
    return None


def next_link(request: Request, cursor: str) -> str:
    """The Link header (RFC 8288) of the following page."""
    query = redacted(urlencode({**request.query_params, "cursor": cursor}))
    return f'<{request.scope["path"]}?{query}>; rel="next"'
