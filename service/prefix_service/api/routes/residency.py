"""Residency: what is in memory, one version of it, and all at a glance."""

import os
import re
from typing import Final

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from prefix_service.api.dependencies.authority import Actor
from prefix_service.api.dependencies.bodies import has_body, read_model
from prefix_service.api.dependencies.pagination import AskedPage, Places, cursor_of
from prefix_service.api.http.negotiation import require_media_type
from prefix_service.api.http.paths import RefPath
from prefix_service.api.middleware.auth import PlatformReader, ReadableTenant, WritableTenant
from prefix_service.api.routes.documentation import json_body
from prefix_service.api.routes.schemas import ResidencyState
from prefix_service.api.state import StateOf
from prefix_service.catalog.records import VersionName
from prefix_service.library.advice import Advice
from prefix_service.library.request_model import RequestModel
from prefix_service.library.residency import Overview, ResidentPlace
from prefix_service.prefix.references import parse_reference
from prefix_service.registry.report import EvictionReport, ResidentReport, ShareReport, TierReport

router = APIRouter(tags=["residency"])

_PLACE: Final = re.compile(r"[0-9]{1,18} [a-z0-9._-]{1,64} [a-z0-9._-]{1,64} [0-9]{1,18} sha256:[0-9a-f]{64}")
_UNREAD_DAYS: Final = 7
_PATH: Final = "/v1/tenants/{tenant}/adapters/{ref}/residency"


class ResidencyRequest(RequestModel):
    """Whether the version stays until it is unloaded."""

    pinned: bool = False


class Residency(BaseModel):
    """The memory of this process: its budgets, the tenants with the most bytes in each of them, the latest evictions,
    the newest first, and a page of the resident versions, the largest first. `next` is the cursor of the following
    page, or null. `process` is the worker process that answered; the service has so many `processes`, each with its own
    memory and pins."""

    tiers: list[TierReport]
    tenants: list[ShareReport]
    evicted: list[EvictionReport]
    resident: list[ResidentReport]
    next: str | None
    process: int
    processes: int


class AdviceList(BaseModel):
    """Advice on the memory of this process; none if nothing needs to be done."""

    items: list[Advice]


def _place_in(text: str) -> ResidentPlace | None:
    """Returns the bytes and the version that a cursor's text holds, or None."""
    if _PLACE.fullmatch(text) is None:
        return None
    nbytes, tenant, adapter, number, digest = text.split(" ")
    return int(nbytes), VersionName(tenant, adapter, int(number), digest)


def _text(place: ResidentPlace) -> str:
    nbytes, version = place
    return f"{nbytes} {version.tenant} {version.adapter} {version.number} {version.digest}"


_PLACES: Final = Places(_place_in, _text)


@router.get("/v1/residency", response_model=Residency)
async def overview(_caller: PlatformReader, asked: AskedPage, state: StateOf) -> Response:
    """Return what the answering process has in memory, where and why: the largest versions and tenants first, and
    what it evicted lately, at most `limit` of each. A version whose bytes change between two pages may be on both,
    or on none."""

    def write(found: Overview) -> Response:
        following = None if found.last is None else cursor_of(found.last, _PLACES)
        shown = Residency(
            tiers=found.tiers,
            tenants=found.shares,
            evicted=found.evicted,
            resident=found.resident,
            next=following,
            process=os.getpid(),
            processes=state.settings.workers,
        )
        return asked.respond(shown.model_dump_json().encode(), following)

    return await state.residency.overview(asked.limit, asked.after(_PLACES), write)


@router.get("/v1/residency/advice")
async def advise(_caller: PlatformReader, state: StateOf) -> AdviceList:
    """Return what an operator may do about the memory of the answering process, in words: pinned versions that no
    process has handed out for 7 days (the 200 largest are examined), and budgets with a low hit ratio. Reads are known
    by the hour, for as many days as usage is kept."""
    days = min(_UNREAD_DAYS, state.settings.usage_days)
    return AdviceList(items=await state.residency.advice(days))


@router.put(_PATH, openapi_extra=json_body(ResidencyRequest, required=False))
async def load(request: Request, tenant: WritableTenant, ref: RefPath, by: Actor, state: StateOf) -> ResidencyState:
    """Load a version into the memory of the answering process now, and wait; `pinned` keeps it there."""
    wanted = ResidencyRequest()
    if has_body(request.headers):
        require_media_type(request.headers, "application/json")
        wanted = await read_model(request, ResidencyRequest)
    await state.tenancy.require_authority(by)
    version = await state.library.resolve(tenant, parse_reference(ref))
    await state.residency.pin(version, by, pinned=wanted.pinned)
    return ResidencyState.of(state.residency.state(version), state.settings.workers)


@router.get(_PATH)
async def residency(tenant: ReadableTenant, ref: RefPath, state: StateOf) -> ResidencyState:
    """Whether a version is in the memory of the answering process."""
    version = await state.library.resolve(tenant, parse_reference(ref))
    return ResidencyState.of(state.residency.state(version), state.settings.workers)


@router.delete(_PATH, status_code=204)
async def unload(tenant: WritableTenant, ref: RefPath, by: Actor, state: StateOf) -> None:
    """Take a version out of the memory of the answering process; the next request loads it again."""
    await state.residency.unload(await state.library.resolve(tenant, parse_reference(ref)), by)
