"""Reads listings of the service page by page, within bounds that no such listing reaches."""

from collections.abc import Mapping
from typing import Any, Final

from prefix_service.client.protocol import Answer, Flow, Request, adapter_path, tenant_path
from prefix_service.errors import InvalidResponse

_PAGE: Final = 1000  # the most items of one answer
_MOST_PAGES: Final = 10_000
_MOST_BYTES: Final = 256 << 20
_MOST_CURSOR: Final = 4096

Item = dict[str, Any]


def adapters(tenant: str, asked: Mapping[str, str | None], limit: int | None) -> Flow[list[Item]]:
    """Returns a tenant's adapters, all of them or up to `limit`; options that are None are not sent."""
    params = {name: value for name, value in asked.items() if value is not None}
    return (yield from pages(tenant_path(tenant, "adapters"), params, limit))


def adapters_page(tenant: str, cursor: str | None, limit: int) -> Flow[tuple[list[Item], str | None]]:
    """Returns up to `limit` adapters of a tenant in the order of their names, and the cursor of the next page.

    Raises:
        InvalidResponse: the answer is not a page.
    """
    params = {"limit": str(limit)} if cursor is None else {"limit": str(limit), "cursor": cursor}
    path = tenant_path(tenant, "adapters")
    answer: Answer = yield Request("GET", path, params)
    page = answer.json_object()
    items, following = items_of(page), page.get("next")
    if len(items) > limit or (following is not None and (not _is_cursor(following) or following == cursor)):
        raise InvalidResponse(f"{path} sent {len(items)} items of {limit}, and next is {following!r:.100}")
    return items, following


def versions(tenant: str, adapter: str) -> Flow[list[Item]]:
    """Returns every version of an adapter, newest first."""
    return (yield from pages(adapter_path(tenant, adapter, "versions")))


def residency(limit: int) -> Flow[Item]:
    """Returns the state of the answering process's memory, with up to `limit` of the largest versions.

    Its budgets and tenants are those of the first page.
    """
    first, resident = yield from _walk("/v1/residency", {}, limit, "resident")
    return {**first, "resident": resident, "next": None}


def pages(path: str, params: Mapping[str, str] | None = None, limit: int | None = None) -> Flow[list[Item]]:
    """Returns a listing, all of it or up to `limit` items.

    Raises:
        InvalidResponse: an answer is not a page, or the listing has no end.
    """
    _, items = yield from _walk(path, params or {}, limit, "items")
    return items


def _walk(path: str, params: Mapping[str, str], limit: int | None, name: str) -> Flow[tuple[Item, list[Item]]]:
    """Returns the first page, and the items that all pages have under `name`.

    Raises:
        InvalidResponse: an answer is not a page, or the listing has no end.
    """
    first: Item | None = None
    items: list[Item] = []
    asked = dict(params)
    size = 0
    for _ in range(_MOST_PAGES):
        wanted = _PAGE if limit is None else min(_PAGE, limit - len(items))
        answer: Answer = yield Request("GET", path, {**asked, "limit": str(wanted)})
        page = answer.json_object()
        found, following, size = items_of(page, name), page.get("next"), size + len(answer.body)
        first = first or page
        if len(found) > wanted:
            raise InvalidResponse(f"{path} was asked for {wanted} items, and sent {len(found)}")
        items += found
        if following is None or len(items) == limit:
            return first, items
        if not _is_cursor(following) or following == asked.get("cursor"):
            raise InvalidResponse(f"{path} names no page that could follow: next is {following!r:.100}")
        if size > _MOST_BYTES:
            break
        asked["cursor"] = following
    raise InvalidResponse(f"{path} has no end within {_MOST_PAGES} pages and {_MOST_BYTES} bytes")


def items_of(page: Mapping[str, Any], name: str = "items") -> list[Item]:
    """Returns the items of a page.

    Raises:
        InvalidResponse: they are not a list of objects.
    """
    items = page.get(name)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InvalidResponse(f"a page should have a list of objects as its {name}, got {items!r:.100}")
    return items


def _is_cursor(following: Any) -> bool:
    return isinstance(following, str) and following.isascii() and 0 < len(following) <= _MOST_CURSOR
