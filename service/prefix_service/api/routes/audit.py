"""The audit: every change, readable by the tenant's admin, and all of them by the platform's."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel

from prefix_service.api.dependencies.pagination import Asked, AskedPage, Places
from prefix_service.api.http.opaque import OpaqueNumbers
from prefix_service.api.middleware.auth import AdministeredTenant, Caller, PlatformAdmin
from prefix_service.api.routes.schemas import Moment
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.records import PLATFORM, WITHOUT_KEY, AuditEntry, Principal

router = APIRouter(tags=["audit"])


class AuditItem(BaseModel):
    """One change: when, whose resource (null: the platform's), who (a tenant, or `platform`) with which key, what.
    `key_name` is what that key is called, or was before it was revoked; null if there was none. To a tenant `key_id` is
    `platform` for each key of the platform. The id is opaque: neither order nor gaps of ids say what others do."""

    id: str
    at: Moment
    tenant: str | None
    actor: str
    key_id: str
    key_name: str | None
    action: str
    target: str
    details: dict[str, Any]

    @classmethod
    def of(cls, entry: AuditEntry, ids: OpaqueNumbers, caller: Principal) -> "AuditItem":
        """From the catalog's entry, as the caller may see it."""
        is_hidden = caller.tenant is not None and entry.actor == PLATFORM and entry.key_id not in WITHOUT_KEY
        key_id = PLATFORM if is_hidden else entry.key_id
        return cls.model_validate({**asdict(entry), "id": ids.text(entry.id), "key_id": key_id})


class AuditPage(BaseModel):
    """Changes, newest first; `next` is the cursor of older ones, or null."""

    items: list[AuditItem]
    next: str | None


@router.get("/v1/tenants/{tenant}/audit", response_model=AuditPage)
async def tenant_audit(tenant: AdministeredTenant, caller: Caller, asked: AskedPage, state: StateOf) -> Response:
    """Every change of a tenant's resources, newest first."""
    return await _page(state, tenant, asked, caller)


@router.get("/v1/audit", response_model=AuditPage)
async def audit(caller: PlatformAdmin, asked: AskedPage, state: StateOf) -> Response:
    """Every change, newest first."""
    return await _page(state, None, asked, caller)


async def _page(state: State, tenant: str | None, asked: Asked, caller: Principal) -> Response:
    ids = state.audit_ids
    places = Places(lambda text: ids.number(text) if ids.holds(text) else None, ids.text)

    def item(entry: AuditEntry) -> AuditItem:
        return AuditItem.of(entry, ids, caller)

    return asked.answer(await state.pages.audit(tenant, asked.wanted(places, item)), places)
