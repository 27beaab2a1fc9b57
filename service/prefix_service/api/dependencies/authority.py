"""The caller of a route that changes a tenant's resources, bound to the id that the path's tenant has at the start."""

from dataclasses import replace
from typing import Annotated

from fastapi import Depends, Request

from prefix_service.api.http.paths import TenantPath
from prefix_service.api.middleware.auth import Caller
from prefix_service.api.state import state_of
from prefix_service.catalog.records import Principal
from prefix_service.errors import NotFound


async def _actor(request: Request, tenant: TenantPath, caller: Caller) -> Principal:
    if caller.tenant is not None:
        return replace(caller, acts_on=caller.tenant_id)
    return replace(caller, acts_on=await state_of(request).tenancy.tenant_id(tenant))


async def _founder(request: Request, tenant: TenantPath, caller: Caller) -> Principal:
    try:
        return await _actor(request, tenant, caller)
    except NotFound:
        return caller


Actor = Annotated[Principal, Depends(_actor)]
"""Who changes things of the path's tenant, which must exist; declared after the tenant, so that it may be seen."""
Founder = Annotated[Principal, Depends(_founder)]
"""Who changes things of the path's tenant, or makes it."""
