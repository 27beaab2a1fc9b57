"""The audit: every change, readable by the tenant's admin, and all of them by the platform's."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from prefix_service.api.dependencies.pagination import Cursor, HeldPage, Limit, Listing, answer_page, decode_cursor
from prefix_service.api.middleware.auth import AdministeredTenant, PlatformAdmin
from prefix_service.api.routes.schemas import Moment
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.records import AuditEntry

router = APIRouter(tags=["audit"])


class AuditItem(BaseModel):
    """One change: when, whose resource (null: the platform's), who (a tenant, or `platform`) with which key, what.
    `key_name` is what that key is called, or was before it was revoked; null if there was none. The id is opaque:
    neither order nor gaps of ids say what others do."""

    id: str
    at: Moment
    tenant: str | None
    actor: str
    key_id: str
    key_name: str | None
    action: str
    target: str
    details: dict[str, Any]


class AuditPage(BaseModel):
    """Changes, newest first; `next` is the cursor of older ones, or null."""

    items: list[AuditItem]
    next: str | None


@router.get("/v1/tenants/{tenant}/audit", response_model=AuditPage)
async def tenant_audit(
    request: Request,
    tenant: AdministeredTenant,
    _memory: HeldPage,
    state: StateOf,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Response:
    """Every change of a tenant's resources, newest first."""
    return await _page(request, state, tenant, limit, cursor)


@router.get("/v1/audit", response_model=AuditPage)
async def audit(
    request: Request,
    _caller: PlatformAdmin,
    _memory: HeldPage,
    state: StateOf,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Response:
    """Every change, newest first."""
    return await _page(request, state, None, limit, cursor)


async def _page(request: Request, state: State, tenant: str | None, limit: int, cursor: str | None) -> Response:
    ids, audit = state.audit_ids, state.library.audit

    def load(place: str, limit: int) -> list[AuditEntry]:
        return audit.listed(tenant, before=ids.number(place) if place else None, limit=limit)

    def item(entry: AuditEntry) -> AuditItem:
        return AuditItem.model_validate({**asdict(entry), "id": ids.text(entry.id)})

    listing = Listing(load, lambda entry: ids.text(entry.id), item)
    return await answer_page(request, tenant, listing, decode_cursor(cursor, ids.holds), limit)
