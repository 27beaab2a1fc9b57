"""Listings over HTTP: opaque cursors, and pages that are read and written off the event loop."""

import base64
import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Generic, TypeVar
from urllib.parse import urlencode

import orjson
from fastapi import Query, Request, Response
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema

from prefix_service.api.dependencies.json_bodies import held
from prefix_service.api.state import state_of
from prefix_service.errors import InvalidReference, InvalidRequest
from prefix_service.logs import redacted
from prefix_service.prefix.references import check_name
from prefix_service.registry.admission import PLATFORM

Row = TypeVar("Row")

Limit = Annotated[int, Query(ge=1, le=1000, description="the most items of a page, which may have fewer")]
Cursor = Annotated[
    str | SkipJsonSchema[None],
    Query(
        min_length=1, max_length=1000, description="`next` of the page before", json_schema_extra={"format": "cursor"}
    ),
]

PAGE_BYTES: Final = 2 << 20
"""A page ends with the item that makes it this long, whatever its limit."""

HeldPage = Annotated[None, held(PAGE_BYTES)]
"""Memory for a page until it has left: whoever leaves many unread must not fill the process."""

_TOGETHER: Final = 100  # rows that are in memory together

NUMBER: Final = re.compile(r"[0-9]{1,18}").fullmatch
"""Whether a cursor names a number."""


def is_name(text: str) -> bool:
    """Returns whether a cursor names a tenant or an adapter."""
    with contextlib.suppress(InvalidReference):
        return bool(check_name("cursor", text))
    return False


@dataclass(frozen=True, slots=True)
class Listing(Generic[Row]):
    """How a listing is read and written. `load` returns up to so many rows behind a place, which is empty for the
    first page, `place` names a row's place, and `item` is what the listing shows of a row."""

    load: Callable[[str, int], Sequence[Row]]
    place: Callable[[Row], str]
    item: Callable[[Row], BaseModel]


async def answer_page(request: Request, tenant: str | None, listing: Listing[Row], after: str, limit: int) -> Response:
    """Returns a page, made in a thread in its tenant's turn, with the Link header of the following one.

    Raises:
        NotFound: there is no such listing.
        StorageFailed: the catalog refused.
    """

    def make() -> Response:
        items, following = _page(listing, after, limit)
        cursor = None if following is None else encode_cursor(following)
        body = b'{"items":[%b],"next":%b}' % (b",".join(items), orjson.dumps(cursor))
        return json_page(request, body, cursor)

    return await state_of(request).admission.run(tenant or PLATFORM, make)


def _page(listing: Listing[Row], after: str, limit: int) -> tuple[list[bytes], str | None]:
    """Returns the items, and the place of the last one if there are more."""
    items: list[bytes] = []
    size, place = 0, after
    while True:
        asked = min(_TOGETHER, limit + 1 - len(items))
        rows = listing.load(place, asked)
        for row in rows:
            if len(items) == limit or size >= PAGE_BYTES:
                return items, place
            items.append(listing.item(row).model_dump_json().encode())
            size, place = size + len(items[-1]), listing.place(row)
        if len(rows) < asked:
            return items, None


def json_page(request: Request, body: bytes, cursor: str | None) -> Response:
    """Returns a page that is written already, with the Link header (RFC 8288) of the page behind `cursor`."""
    headers = {} if cursor is None else {"Link": _next_link(request, cursor)}
    return Response(body, media_type="application/json", headers=headers)


def encode_cursor(place: str) -> str:
    """Returns the cursor of the page behind a place."""
    return base64.urlsafe_b64encode(place.encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None, is_place: Callable[[str], object] = is_name) -> str:
    """Returns the place behind which a page begins; empty for the first.

    Raises:
        InvalidRequest: it is no cursor of this listing.
    """
    if cursor is None:
        return ""
    place = _decoded(cursor)
    if place is None or not is_place(place) or encode_cursor(place) != cursor:
        raise InvalidRequest(f"cursor {cursor!r:.80} is not one that this listing gave")
    return place


def _decoded(cursor: str) -> str | None:
    padded = cursor + "=" * (-len(cursor) % 4)
    with contextlib.suppress(ValueError):
        return base64.b64decode(padded.encode(), b"-_", validate=True).decode()
    return None


def _next_link(request: Request, cursor: str) -> str:
    query = redacted(urlencode({**request.query_params, "cursor": cursor}))
    return f'<{request.scope["path"]}?{query}>; rel="next"'
