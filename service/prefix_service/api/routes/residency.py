"""Residency: what is in memory, one version of it, and all at a glance."""

import re
from typing import Final

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from prefix_service.api.dependencies.authority import Actor
from prefix_service.api.dependencies.bodies import has_body
from prefix_service.api.dependencies.json_bodies import read_model
from prefix_service.api.dependencies.pagination import Cursor, HeldPage, Limit, decode_cursor, encode_cursor, json_page
from prefix_service.api.http.negotiation import require_media_type
from prefix_service.api.http.paths import RefPath
from prefix_service.api.middleware.auth import PlatformReader, ReadableTenant, WritableTenant
from prefix_service.api.routes.documentation import json_body
from prefix_service.api.routes.schemas import ResidencyRequest, ResidencyState
from prefix_service.api.state import LibraryOf, StateOf
from prefix_service.prefix.references import parse_reference
from prefix_service.registry.admission import PLATFORM
from prefix_service.registry.keys import VersionKey
from prefix_service.registry.report import EvictionReport, ResidentReport, ShareReport, TierReport
from prefix_service.registry.snapshot import Place, place_of

router = APIRouter(tags=["residency"])

_PLACE: Final = re.compile(r"[0-9]{1,18} [a-z0-9._-]{1,64} [a-z0-9._-]{1,64} [0-9]{1,18} sha256:[0-9a-f]{64}")
_PATH: Final = "/v1/tenants/{tenant}/adapters/{ref}/residency"


class Residency(BaseModel):
    """The memory of this process: its budgets, the tenants with the most bytes in each of them, the latest evictions,
    the newest first, and a page of the resident versions, the largest first. `next` is the cursor of the following
    page, or null."""

    tiers: list[TierReport]
    tenants: list[ShareReport]
    evicted: list[EvictionReport]
    resident: list[ResidentReport]
    next: str | None


@router.get("/v1/residency", response_model=Residency)
async def overview(
    request: Request,
    _caller: PlatformReader,
    _memory: HeldPage,
    state: StateOf,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Response:
    """Return what the answering process has in memory, where and why: the largest versions and tenants first, and
    what it evicted lately, at most `limit` of each. A version whose bytes change between two pages may be on both,
    or on none."""
    place = _place(decode_cursor(cursor, _PLACE.fullmatch))
    registry = state.library.registry
    tiers, snapshot = registry.tiers(), registry.snapshot()

    def make() -> Response:
        found = snapshot.resident(limit + 1, place)
        following = encode_cursor(_named(place_of(found[limit - 1]))) if len(found) > limit else None
        shown = Residency(
            tiers=tiers,
            tenants=snapshot.shares(limit),
            evicted=snapshot.evicted(limit),
            resident=found[:limit],
            next=following,
        )
        return json_page(request, shown.model_dump_json().encode(), following)

    return await state.admission.run(PLATFORM, make)


def _place(text: str) -> Place | None:
    if not text:
        return None
    nbytes, tenant, adapter, version, digest = text.split(" ")
    return -int(nbytes), VersionKey(tenant, adapter, int(version), digest)


def _named(place: Place) -> str:
    nbytes, key = place
    return f"{-nbytes} {key.tenant} {key.adapter} {key.version} {key.digest}"


@router.put(_PATH, openapi_extra=json_body(ResidencyRequest, required=False))
async def load(request: Request, tenant: WritableTenant, ref: RefPath, by: Actor, library: LibraryOf) -> ResidencyState:
    """Load a version into memory now, and wait; `pinned` keeps it there."""
    wanted = ResidencyRequest()
    if has_body(request.headers):
        require_media_type(request.headers, "application/json")
        wanted = await read_model(request, ResidencyRequest)
    await library.require_authority(by)
    version = await library.resolve(tenant, parse_reference(ref))
    await library.pin(version, by, pinned=wanted.pinned)
    return ResidencyState.model_validate(library.residency(version))


@router.get(_PATH)
async def residency(tenant: ReadableTenant, ref: RefPath, library: LibraryOf) -> ResidencyState:
    """Whether a version is in memory."""
    version = await library.resolve(tenant, parse_reference(ref))
    return ResidencyState.model_validate(library.residency(version))


@router.delete(_PATH, status_code=204)
async def unload(tenant: WritableTenant, ref: RefPath, by: Actor, library: LibraryOf) -> None:
    """Take a version out of memory; the next request loads it again."""
    await library.unload(await library.resolve(tenant, parse_reference(ref)), by)
