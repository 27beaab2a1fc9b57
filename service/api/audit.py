"""The audit: every change, readable by the tenant's admin, and all of them by the platform's."""

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from service.api.auth import Administering, PlatformAdmin
from service.api.pagination import decode_cursor, encode_cursor, next_link
from service.api.schemas import Moment
from service.api.state import LibraryOf
from service.errors import InvalidRequest
from service.library import Library

router = APIRouter(tags=["audit"])

Limit = Annotated[int, Query(ge=1, le=1000)]


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


@router.get("/v1/tenants/{tenant}/audit")
async def tenant_audit(
    request: Request,
    response: Response,
    tenant: Administering,
    library: LibraryOf,
    limit: Limit = 100,
    cursor: str | None = None,
) -> AuditPage:
    """Every change of a tenant's resources, newest first."""
    return await _page(request, response, library, tenant, limit, cursor)


@router.get("/v1/audit")
async def audit(
    request: Request,
    response: Response,
    _caller: PlatformAdmin,
    library: LibraryOf,
    limit: Limit = 100,
    cursor: str | None = None,
) -> AuditPage:
    """Every change, newest first."""
    return await _page(request, response, library, None, limit, cursor)


async def _page(
    request: Request, response: Response, library: Library, tenant: str | None, limit: int, cursor: str | None
) -> AuditPage:
    name = decode_cursor(cursor)
    if name and not (name.isdigit() and len(name) <= 18):
        raise InvalidRequest(f"cursor {cursor!r:.80} is not one that this listing gave")
    before = int(name) if name else None
    found = await to_thread.run_sync(lambda: library.audit.listed(tenant, before=before, limit=limit + 1))
    items = [AuditItem.model_validate(entry, from_attributes=True) for entry in found[:limit]]
    following = encode_cursor(str(items[-1].id)) if len(found) > limit else None
    if following is not None:
        response.headers["Link"] = next_link(request, following)
    return AuditPage(items=items, next=following)
