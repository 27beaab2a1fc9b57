"""Listings over HTTP: the page that a caller asks for, and opaque cursors."""

import base64
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, Final, Generic, TypeVar
from urllib.parse import urlencode

import orjson
from fastapi import Depends, Query, Request, Response
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema

from prefix_service.api.dependencies.memory import reserved
from prefix_service.errors import InvalidReference, InvalidRequest
from prefix_service.library.pages import PAGE_BYTES, Page, WantedPage
from prefix_service.logs import redacted
from prefix_service.prefix.references import check_name

Row = TypeVar("Row")
Place = TypeVar("Place")

_NUMBER: Final = re.compile(r"[0-9]{1,18}")

_Limit = Annotated[int, Query(ge=1, le=1000, description="the most items of a page, which may have fewer")]
_Cursor = Annotated[
    str | SkipJsonSchema[None],
    Query(
        min_length=1, max_length=1000, description="`next` of the page before", json_schema_extra={"format": "cursor"}
    ),
]


@dataclass(frozen=True, slots=True)
class Places(Generic[Place]):
    """The two directions of a listing's cursors: `read` returns the place that a text holds, or None; `text` returns
    the text of a place."""

    read: Callable[[str], Place | None]
    text: Callable[[Place], str]


def number_in(text: str) -> int | None:
    """Returns the number that a cursor's text holds, or None."""
    return int(text) if _NUMBER.fullmatch(text) else None


def name_in(text: str) -> str | None:
    """Returns the name of a tenant or an adapter that a cursor's text holds, or None."""
    with contextlib.suppress(InvalidReference):
        return check_name("cursor", text)
    return None


NUMBERS: Final = Places(number_in, str)
NAMES: Final = Places(name_in, str)


@dataclass(frozen=True, slots=True)
class Asked:
    """The page of a listing that a request asks for: at most `limit` items behind the place in a cursor."""

    request: Request
    limit: int
    cursor: str | None

    def after(self, places: Places[Place]) -> Place | None:
        """Returns the place behind which the page begins; None for the first page.

        Raises:
            InvalidRequest: the cursor is not of this listing.
        """
        if self.cursor is None:
            return None
        text = _decoded(self.cursor)
        place = None if text is None or _encoded(text) != self.cursor else places.read(text)
        if place is None:
            raise InvalidRequest(f"cursor {self.cursor!r:.80} is not one that this listing gave")
        return place

    def wanted(self, places: Places[Place], item: Callable[[Row], BaseModel]) -> WantedPage[Row, Place]:
        """Returns the page as the library takes it: `item` is what the listing shows of a row.

        Raises:
            InvalidRequest: the cursor is not of this listing.
        """
        return WantedPage(self.after(places), self.limit, lambda row: item(row).model_dump_json().encode())

    def answer(self, page: Page[Place], places: Places[Place]) -> Response:
        """Returns the response with a page, with the Link header (RFC 8288) of the following one."""
        cursor = None if page.last is None else cursor_of(page.last, places)
        return self.respond(b'{"items":[%b],"next":%b}' % (page.items, orjson.dumps(cursor)), cursor)

    def respond(self, body: bytes, cursor: str | None) -> Response:
        """Returns the response with a written page, with the Link header of the page behind `cursor`."""
        headers = {} if cursor is None else {"Link": self._next_link(cursor)}
        return Response(body, media_type="application/json", headers=headers)

    def _next_link(self, cursor: str) -> str:
        query = redacted(urlencode({**self.request.query_params, "cursor": cursor}))
        return f'<{self.request.scope["path"]}?{query}>; rel="next"'


async def _asked(request: Request, limit: _Limit = 100, cursor: _Cursor = None) -> AsyncIterator[Asked]:
    """Reserves memory for the page until it has left: whoever leaves many unread must not fill the process."""
    async with reserved(request, PAGE_BYTES):
        yield Asked(request, limit, cursor)


AskedPage = Annotated[Asked, Depends(_asked)]
"""The page that the request asks for; declared after whatever says whether the caller may see it."""


def cursor_of(place: Place, places: Places[Place]) -> str:
    """Returns the cursor of the page behind a place."""
    return _encoded(places.text(place))


def _encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decoded(cursor: str) -> str | None:
    padded = cursor + "=" * (-len(cursor) % 4)
    with contextlib.suppress(ValueError):
        return base64.b64decode(padded.encode(), b"-_", validate=True).decode()
    return None
