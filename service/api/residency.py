"""Residency: what is in memory, one version of it, and all at a glance."""

from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request

from service.api.auth import Caller, PlatformReader, Reading, Writing
from service.api.bodies import has_body
from service.api.documentation import json_body
from service.api.json_bodies import read_model
from service.api.negotiation import require_media_type
from service.api.paths import RefPath
from service.api.schemas import ResidencyRequest, ResidencyState
from service.api.state import LibraryOf
from service.prefix.references import parse_reference
from service.registry.report import ResidentReport, ShareReport, TierReport

router = APIRouter(tags=["residency"])

_PATH: Final = "/v1/tenants/{tenant}/adapters/{ref}/residency"


@dataclass(frozen=True, slots=True)
class Residency:
    """What this process has in memory: its budgets, each tenant's part of them, and the largest versions."""

    tiers: list[TierReport]
    tenants: list[ShareReport]
    resident: list[ResidentReport]


@router.get("/v1/residency")
async def overview(
    _caller: PlatformReader, library: LibraryOf, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> Residency:
    """What is in memory, where and why, of the process that answers; the largest versions first, at most `limit`."""
    registry = library.registry
    return Residency(registry.tiers(), registry.shares(), registry.resident()[:limit])


@router.put(_PATH, openapi_extra=json_body(ResidencyRequest, required=False))
async def load(request: Request, tenant: Writing, ref: RefPath, by: Caller, library: LibraryOf) -> ResidencyState:
    """Load a version into memory now, and wait; `pinned` keeps it there."""
    wanted = ResidencyRequest()
    if has_body(request.headers):
        require_media_type(request.headers, "application/json")
        wanted = await read_model(request, ResidencyRequest)
    version = await library.resolve(tenant, parse_reference(ref))
    await library.pin(version, by, pinned=wanted.pinned)
    return ResidencyState.model_validate(library.residency(version))


@router.get(_PATH)
async def residency(tenant: Reading, ref: RefPath, library: LibraryOf) -> ResidencyState:
    """Whether a version is in memory."""
    version = await library.resolve(tenant, parse_reference(ref))
    return ResidencyState.model_validate(library.residency(version))


@router.delete(_PATH, status_code=204)
async def unload(tenant: Writing, ref: RefPath, by: Caller, library: LibraryOf) -> None:
    """Take a version out of memory; the next request loads it again."""
    await library.unload(await library.resolve(tenant, parse_reference(ref)), by)
