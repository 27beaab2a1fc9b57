"""The audit: every change, readable by the tenant's admin, and all of them by the platform's."""

from dataclasses import asdict
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from service.api.auth import Administering, PlatformAdmin
from service.api.pagination import next_link
from service.api.schemas import Moment
from service.api.state import State, StateOf
from service.catalog.records import AuditEntry

router = APIRouter(tags=["audit"])

Limit = Annotated[int, Query(ge=1, le=1000)]


class AuditItem(BaseModel):
    """One change: when, whose resource (null: the platform's), who (a tenant, or `platform`) with which key, what. The
    id is opaque: neither order nor gaps of ids say what others do."""

    id: str
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
    state: StateOf,
    limit: Limit = 100,
    cursor: str | None = None,
) -> AuditPage:
    """Every change of a tenant's resources, newest first."""
    return await _page(request, response, state, tenant, limit, cursor)


@router.get("/v1/audit")
async def audit(
    request: Request,
    response: Response,
    _caller: PlatformAdmin,
    state: StateOf,
    limit: Limit = 100,
    cursor: str | None = None,
) -> AuditPage:
    """Every change, newest first."""
    return await _page(request, response, state, None, limit, cursor)


async def _page(
    request: Request, response: Response, state: State, tenant: str | None, limit: int, cursor: str | None
) -> AuditPage:
    before = None if cursor is None else state.audit_ids.number(cursor)
    found = await to_thread.run_sync(lambda: state.library.audit.listed(tenant, before=before, limit=limit + 1))
    items = [_item(state, entry) for entry in found[:limit]]
    following = items[-1].id if len(found) > limit else None
    if following is not None:
        response.headers["Link"] = next_link(request, following)
    return AuditPage(items=items, next=following)


def _item(state: State, entry: AuditEntry) -> AuditItem:
    return AuditItem.model_validate({**asdict(entry), "id": state.audit_ids.text(entry.id)})
