"""Usage by hour, readable by the tenant's admin, and all of it by the platform's."""

import contextlib
import re
from datetime import UTC, datetime
from typing import Annotated, Final

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, BeforeValidator
from pydantic.json_schema import SkipJsonSchema

from prefix_service.api.dependencies.pagination import Asked, AskedPage, Places
from prefix_service.api.middleware.auth import AdministeredTenant, PlatformAdmin
from prefix_service.api.routes.schemas import Moment
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.records import OF_PLATFORM, Dimension, Use
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.references import NAME_PATTERN, check_name

router = APIRouter(tags=["usage"])

_PLACE: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:00:00 [a-z0-9._-]+ [a-z0-9._-]* \d{1,9} [a-z0-9:-]*", re.ASCII)
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_DIMENSIONS: Final[tuple[Dimension, ...]] = ("adapter", "version", "key")

By = Annotated[
    str,
    Query(
        max_length=40,
        description="what is counted apart, with commas between: adapter, version (of its adapter), key",
        json_schema_extra={"pattern": "^((adapter|version|key)(,(adapter|version|key)){0,2})?$"},
    ),
]


def _written_as_a_date(value: object) -> object:
    """pydantic would take a number for seconds since 1970."""
    if isinstance(value, str) and not _DATE.match(value):
        raise ValueError(f"a moment is written as 2026-11-26T05:00:00Z, got {value!r:.80}")
    return value


Since = Annotated[
    datetime | SkipJsonSchema[None],
    BeforeValidator(_written_as_a_date),
    Query(description="from the hour of this moment on"),
]
Until = Annotated[
    datetime | SkipJsonSchema[None],
    BeforeValidator(_written_as_a_date),
    Query(description="hours that begin before this moment"),
]


OfAdapter = Annotated[
    str | SkipJsonSchema[None],
    Query(description="of this adapter alone", json_schema_extra={"pattern": NAME_PATTERN}),
]


class UsageItem(BaseModel):
    """The usage of one hour, which is named by its beginning. `adapter`, `version` and `key` are null where `by` does
    not name them, and for what a tenant used beyond 16,384 pairs of version and key in an hour."""

    hour: Moment
    tenant: str
    adapter: str | None
    version: int | None
    key: str | None
    requests: int
    bytes: int
    cold_loads: int
    prefix_tokens: int

    @classmethod
    def of(cls, use: Use) -> "UsageItem":
        """From the catalog's sums."""
        return cls(
            hour=use.hour,
            tenant=use.tenant,
            adapter=use.adapter or None,
            version=use.version or None,
            key=use.key.removeprefix(OF_PLATFORM) or None,
            requests=use.requests,
            bytes=use.bytes,
            cold_loads=use.cold_loads,
            prefix_tokens=use.prefix_tokens,
        )


class UsagePage(BaseModel):
    """Usage, oldest hour first; `next` is the cursor of what follows, or null."""

    items: list[UsageItem]
    next: str | None


@router.get("/v1/tenants/{tenant}/usage", response_model=UsagePage)
async def tenant_usage(
    tenant: AdministeredTenant,
    asked: AskedPage,
    state: StateOf,
    by: By = "",
    adapter: OfAdapter = None,
    since: Since = None,
    until: Until = None,
) -> Response:
    """Requests for a tenant's prefixes by hour, the bytes that were sent, the loads that they began, and the prefix
    tokens of all rows. What happened is written within a minute. All keys of the platform appear as `platform`."""
    return await _page(state, tenant, by, (since, until), asked, adapter)


@router.get("/v1/usage", response_model=UsagePage)
async def usage(
    _caller: PlatformAdmin,
    asked: AskedPage,
    state: StateOf,
    by: By = "",
    since: Since = None,
    until: Until = None,
) -> Response:
    """Requests for the prefixes of every tenant by hour, as a tenant's usage, with each key of the platform apart."""
    return await _page(state, None, by, (since, until), asked)


async def _page(
    state: State,
    tenant: str | None,
    by: str,
    when: tuple[datetime | None, datetime | None],
    asked: Asked,
    adapter: str | None = None,
) -> Response:
    if adapter is not None:
        check_name("adapter", adapter)
    dimensions = _dimensions(by)
    since, until = (_utc(name, moment) for name, moment in zip(("since", "until"), when, strict=True))
    first = None if since is None else since.replace(minute=0, second=0, microsecond=0)
    wanted = asked.wanted(_PLACES, UsageItem.of)
    found = await state.pages.usage(tenant, dimensions, wanted, adapter=adapter, since=first, until=until)
    return asked.answer(found, _PLACES)


def _dimensions(by: str) -> frozenset[Dimension]:
    named = by.split(",") if by else []
    unknown = [name for name in named if name not in _DIMENSIONS]
    if unknown:
        raise InvalidRequest(f"by names {', '.join(_DIMENSIONS)}, with commas between, got {unknown[0]!r:.80}")
    found = frozenset(name for name in _DIMENSIONS if name in named)
    return found | {"adapter"} if "version" in found else found


def _utc(name: str, moment: datetime | None) -> datetime | None:
    """Returns a moment, naive and in UTC; without an offset it is in UTC already."""
    if moment is None or moment.tzinfo is None:
        return moment
    try:
        return moment.astimezone(UTC).replace(tzinfo=None)
    except OverflowError as error:
        raise InvalidRequest(f"{name} lies outside the years 1 to 9999: {moment.isoformat()}") from error


def _text(use: Use) -> str:
    hour, *rest = use.place
    return " ".join((hour.isoformat(), *map(str, rest)))


def _place_in(text: str) -> Use | None:
    """Returns the hour, and what is counted in it, that a cursor's text names, or None."""
    if _PLACE.fullmatch(text) is None:
        return None
    hour, tenant, adapter, version, key = text.split(" ")
    with contextlib.suppress(ValueError):
        use = Use(datetime.fromisoformat(hour), tenant, adapter, int(version), key)
        return use if _text(use) == text else None
    return None


_PLACES: Final = Places(_place_in, _text)
