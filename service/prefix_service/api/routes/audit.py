"""The audit: every change, readable by the tenant's admin, and all of them by the platform's."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema

from prefix_service.api.dependencies.pagination import Asked, AskedPage, Places
from prefix_service.api.http.opaque import OpaqueNumbers
from prefix_service.api.middleware.auth import AdministeredTenant, Caller, PlatformAdmin
from prefix_service.api.routes.schemas import Moment
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.records import PLATFORM, WITHOUT_KEY, AuditEntry, AuditFilter, Principal

router = APIRouter(tags=["audit"])


class AuditItem(BaseModel):
    """One change: when, whose resource (null: the platform's), who (a tenant, or `platform`) with which key, what.
    `key_name` is what that key is called, or was before it was revoked; null if there was none. To a tenant each key of
    the platform is `platform`, without a name. The id is opaque: neither order nor gaps of ids say what others do."""

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
        hidden = {"key_id": PLATFORM, "key_name": None} if is_hidden else {}
        return cls.model_validate({**asdict(entry), "id": ids.text(entry.id), **hidden})


class AuditPage(BaseModel):
    """Changes, newest first; `next` is the cursor of older ones, or null."""

    items: list[AuditItem]
    next: str | None


Action = Annotated[
    str | SkipJsonSchema[None],
    Query(max_length=64, description="changes of this action alone, such as `version.published`"),
]
Search = Annotated[
    str | SkipJsonSchema[None],
    Query(
        max_length=64,
        description="changes with this text in their target, tenant, actor, or their key's id or name; in capitals "
        "or not, every character means itself",
    ),
]


async def _wanted(caller: Caller, action: Action = None, search: Search = None) -> AuditFilter:
    return AuditFilter(action, search, hides_platform=caller.tenant is not None)


Wanted = Annotated[AuditFilter, Depends(_wanted)]


@router.get("/v1/tenants/{tenant}/audit", response_model=AuditPage)
async def tenant_audit(
    tenant: AdministeredTenant, caller: Caller, asked: AskedPage, state: StateOf, wanted: Wanted
) -> Response:
    """Every change of a tenant's resources, newest first. With `action` or `search` those that match, of the latest
    100,000."""
    return await _page(state, tenant, asked, caller, wanted)


@router.get("/v1/audit", response_model=AuditPage)
async def audit(caller: PlatformAdmin, asked: AskedPage, state: StateOf, wanted: Wanted) -> Response:
    """Every change, newest first. With `action` or `search` those that match, of the latest 100,000."""
    return await _page(state, None, asked, caller, wanted)


async def _page(state: State, tenant: str | None, asked: Asked, caller: Principal, wanted: AuditFilter) -> Response:
    ids = state.audit_ids
    places = Places(lambda text: ids.number(text) if ids.holds(text) else None, ids.text)

    def item(entry: AuditEntry) -> AuditItem:
        return AuditItem.of(entry, ids, caller)

    return asked.answer(await state.pages.audit(tenant, asked.wanted(places, item), wanted=wanted), places)
