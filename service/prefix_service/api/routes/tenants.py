"""Tenants and their quotas."""

from fastapi import APIRouter, Request, Response

from prefix_service.api.dependencies.authority import Actor, Founder
from prefix_service.api.dependencies.bodies import has_body
from prefix_service.api.dependencies.json_bodies import read_model
from prefix_service.api.dependencies.pagination import Cursor, HeldPage, Limit, Listing, answer_page, decode_cursor
from prefix_service.api.http.negotiation import require_media_type
from prefix_service.api.middleware.auth import PlatformAdmin, ReadableTenant
from prefix_service.api.routes.documentation import json_body
from prefix_service.api.routes.schemas import TenantItem, TenantPage, TenantQuotas
from prefix_service.api.state import LibraryOf, StateOf
from prefix_service.catalog.reads import read_catalog, write_catalog

router = APIRouter(tags=["tenants"])


@router.get("/v1/tenants", response_model=TenantPage)
async def list_tenants(
    request: Request,
    _caller: PlatformAdmin,
    _memory: HeldPage,
    library: LibraryOf,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Response:
    """Every tenant, in the order of their names."""
    listing = Listing(library.tenants.listed, lambda row: row.name, TenantItem.of)
    return await answer_page(request, None, listing, decode_cursor(cursor), limit)


@router.put(
    "/v1/tenants/{tenant}",
    responses={201: {"model": TenantItem, "description": "It is new"}},
    openapi_extra=json_body(TenantQuotas, required=False),
)
async def put_tenant(
    request: Request, response: Response, tenant: ReadableTenant, _caller: PlatformAdmin, by: Founder, state: StateOf
) -> TenantItem:
    """Make a tenant, or give one other quotas: a body sets them all, without one they stay as they are."""
    quotas = None
    if has_body(request.headers):
        require_media_type(request.headers, "application/json")
        quotas = (await read_model(request, TenantQuotas)).quotas()
    tenants = state.library.tenants
    is_new = await write_catalog(tenants.put, tenant, by, quotas)
    response.status_code = 201 if is_new else 200
    return TenantItem.of(await read_catalog(tenants.get, tenant))


@router.get("/v1/tenants/{tenant}")
async def get_tenant(tenant: ReadableTenant, library: LibraryOf) -> TenantItem:
    """A tenant, its quotas, and what it has."""
    return TenantItem.of(await read_catalog(library.tenants.get, tenant))


@router.delete("/v1/tenants/{tenant}", status_code=204)
async def delete_tenant(tenant: ReadableTenant, _caller: PlatformAdmin, by: Actor, state: StateOf) -> None:
    """Delete a tenant with its keys, adapters and versions."""
    await state.library.delete_tenant(tenant, by)
