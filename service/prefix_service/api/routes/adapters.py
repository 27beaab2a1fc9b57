"""Listing, inspecting and deleting adapters."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic.json_schema import SkipJsonSchema

from prefix_service.api.dependencies.authority import Actor
from prefix_service.api.dependencies.memory import payer
from prefix_service.api.dependencies.pagination import NUMBERS, AskedPage, Places, name_in, number_in
from prefix_service.api.http.paths import DeletablePath, NamePath, RefPath
from prefix_service.api.http.responses import base_model_header
from prefix_service.api.middleware.auth import ReadableTenant, WritableTenant
from prefix_service.api.routes.schemas import (
    AdapterItem,
    AdapterPage,
    ResidencyState,
    VersionDetail,
    VersionPage,
    VersionSummary,
)
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.records import AdapterOrder, AdapterPlace, Version
from prefix_service.prefix.references import check_name, parse_reference

router = APIRouter(tags=["adapters"])

Search = Annotated[
    str | SkipJsonSchema[None],
    Query(max_length=64, description="a part of the adapter's name; every character means itself"),
]
Sort = Annotated[
    AdapterOrder,
    Query(
        description="`name`; `-created`: the latest publication first; `-bytes`: the most bytes of all versions first; "
        "`-used`: the most requests for prefixes first, as usage counts them within a minute"
    ),
]


@dataclass(frozen=True, slots=True)
class _Sought:
    """The filters and the order of a listing of adapters."""

    search: str | None
    base_model: str | None
    order: AdapterOrder


async def _sought(
    search: Search = None, base_model: Annotated[str | None, Query(max_length=1000)] = None, sort: Sort = "name"
) -> _Sought:
    return _Sought(search, base_model, sort)


@router.get("/v1/tenants/{tenant}/adapters", response_model=AdapterPage)
async def list_adapters(
    tenant: ReadableTenant, asked: AskedPage, state: StateOf, sought: Annotated[_Sought, Depends(_sought)]
) -> Response:
    """The adapters of a tenant, sorted by name, by the moment of the latest publication, by bytes, or by use."""
    places = _PLACES[sought.order]
    wanted = asked.wanted(places, AdapterItem.of)
    page = await state.pages.adapters(
        tenant, wanted, order=sought.order, search=sought.search, base_model=sought.base_model
    )
    return asked.answer(page, places)


def _text(place: AdapterPlace) -> str:
    """Returns a place as a cursor holds it: the name, behind the key that the listing is sorted by."""
    if place.key is None:
        return place.name
    key = place.key.isoformat() if isinstance(place.key, datetime) else place.key
    return f"{key} {place.name}"


def _by_name(text: str) -> AdapterPlace | None:
    name = name_in(text)
    return None if name is None else AdapterPlace(None, name)


def _by_number(text: str) -> AdapterPlace | None:
    key, _, name = text.rpartition(" ")
    number = number_in(key)
    return None if number is None or name_in(name) is None else AdapterPlace(number, name)


def _by_moment(text: str) -> AdapterPlace | None:
    key, _, name = text.rpartition(" ")
    with contextlib.suppress(ValueError):
        moment = datetime.fromisoformat(key)
        if moment.isoformat() == key and moment.tzinfo is None and name_in(name) is not None:
            return AdapterPlace(moment, name)
    return None


_PLACES: Final[dict[AdapterOrder, Places[AdapterPlace]]] = {
    "name": Places(_by_name, _text),
    "-created": Places(_by_moment, _text),
    "-bytes": Places(_by_number, _text),
    "-used": Places(_by_number, _text),
}


@router.get("/v1/tenants/{tenant}/adapters/{ref}", response_model=VersionDetail)
async def inspect(request: Request, tenant: ReadableTenant, ref: RefPath, state: StateOf) -> Response:
    """A version: its config, shapes, parameter counts, digest, size, aliases and residency."""
    return await answer_version(request, state, await state.library.resolve(tenant, parse_reference(ref)))


@router.get("/v1/tenants/{tenant}/adapters/{name}/versions", response_model=VersionPage)
async def list_versions(tenant: ReadableTenant, asked: AskedPage, name: NamePath, state: StateOf) -> Response:
    """The versions of an adapter, newest first."""
    check_name("adapter", name)
    aliases = await state.adapters.aliases(tenant, name)

    def item(version: Version) -> VersionSummary:
        return VersionSummary.of(version, aliases)

    wanted = asked.wanted(NUMBERS, item)
    return asked.answer(await state.pages.versions(tenant, name, wanted), NUMBERS)


@router.delete("/v1/tenants/{tenant}/adapters/{ref}", status_code=204)
async def delete(tenant: WritableTenant, ref: DeletablePath, by: Actor, state: StateOf) -> None:
    """Delete an adapter, or the version that a number or digest names."""
    await state.adapters.delete(tenant, parse_reference(ref), by)


async def answer_version(
    request: Request, state: State, version: Version, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Returns a version as JSON, written in a thread in its tenant's turn: a config of 60 KB takes milliseconds."""
    aliases = await state.adapters.aliases(version.tenant, version.adapter)
    residency = ResidencyState.of(state.residency.state(version), state.settings.workers)

    def write() -> Response:
        body = VersionDetail.about(version, aliases, residency).model_dump_json()
        return Response(body, status, {**(headers or {}), **base_model_header(version)}, "application/json")

    return await state.admission.run(payer(request), write)
