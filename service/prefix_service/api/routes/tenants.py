"""Tenants and their quotas."""

from fastapi import APIRouter, Request, Response

from prefix_service.api.dependencies.authority import Actor, Founder
from prefix_service.api.dependencies.bodies import has_body, read_model
from prefix_service.api.dependencies.pagination import NAMES, AskedPage
from prefix_service.api.http.negotiation import require_media_type
from prefix_service.api.middleware.auth import PlatformAdmin, ReadableTenant
from prefix_service.api.routes.documentation import json_body
from prefix_service.api.routes.schemas import TenantItem, TenantPage, TenantQuotas
from prefix_service.api.state import StateOf

router = APIRouter(tags=["tenants"])


@router.get("/v1/tenants", response_model=TenantPage)
async def list_tenants(_caller: PlatformAdmin, asked: AskedPage, state: StateOf) -> Response:
    """Every tenant, in the order of their names."""
    return asked.answer(await state.pages.tenants(asked.wanted(NAMES, TenantItem.of)), NAMES)


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
    is_new = await state.tenancy.put(tenant, by, quotas)
    response.status_code = 201 if is_new else 200
    return TenantItem.of(await state.tenancy.tenant(tenant))


@router.get("/v1/tenants/{tenant}")
async def get_tenant(tenant: ReadableTenant, state: StateOf) -> TenantItem:
    """A tenant, its quotas, and what it has."""
    return TenantItem.of(await state.tenancy.tenant(tenant))


@router.delete("/v1/tenants/{tenant}", status_code=204)
async def delete_tenant(tenant: ReadableTenant, _caller: PlatformAdmin, by: Actor, state: StateOf) -> None:
    """Delete a tenant with its keys, adapters and versions."""
    await state.tenancy.delete(tenant, by)
