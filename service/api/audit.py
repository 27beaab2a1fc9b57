"""The audit: every change, readable by the tenant's admin, and all of them by the platform's."""

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service.api.auth import Administering, PlatformAdmin
from service.api.pagination import NUMBER, Limit, Listing, answer_page, decode_cursor
from service.api.schemas import Moment
from service.api.state import LibraryOf
from service.catalog.records import AuditEntry
from service.library import Library

router = APIRouter(tags=["audit"])


class AuditItem(BaseModel):
    """One change: when, whose resource (null: the platform's), who (a tenant, or `platform`) with which key, what."""

    id: int
    at: Moment
    tenant: str | None
    actor: str
    key_id: str
    action: str
    target: str
    details: dict[str, Any]


class AuditPage(BaseModel):
    """Changes, newest first; `next` is the cursor of older ones, or null."""

    items: list[AuditItem]
    next: str | None


@router.get("/v1/tenants/{tenant}/audit", response_model=AuditPage)
async def tenant_audit(
    request: Request, tenant: Administering, library: LibraryOf, limit: Limit = 100, cursor: str | None = None
) -> Response:
    """Every change of a tenant's resources, newest first."""
    return await _page(request, library, tenant, limit, cursor)


@router.get("/v1/audit", response_model=AuditPage)
async def audit(
    request: Request, _caller: PlatformAdmin, library: LibraryOf, limit: Limit = 100, cursor: str | None = None
) -> Response:
    """Every change, newest first."""
    return await _page(request, library, None, limit, cursor)


async def _page(request: Request, library: Library, tenant: str | None, limit: int, cursor: str | None) -> Response:
    def load(place: str, limit: int) -> list[AuditEntry]:
        return library.audit.listed(tenant, before=int(place) if place else None, limit=limit)

    listing = Listing(
        load, lambda entry: str(entry.id), lambda entry: AuditItem.model_validate(entry, from_attributes=True)
    )
    return await answer_page(request, tenant, listing, decode_cursor(cursor, NUMBER), limit)
