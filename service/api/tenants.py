"""Tenants, and the keys of tenants and of the platform."""

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response

from service.api.auth import Administering, PlatformAdmin, Reading
from service.api.bodies import read_model
from service.api.documentation import json_body
from service.api.negotiation import require_media_type
from service.api.pagination import decode_cursor, encode_cursor, next_link
from service.api.paths import KeyPath
from service.api.schemas import CreatedKey, KeyItem, KeyPage, NewKey, Tenant, TenantPage
from service.api.state import LibraryOf, State, StateOf
from service.catalog.records import Key
from service.errors import NotFound

router = APIRouter()


@router.get("/v1/tenants", tags=["tenants"])
async def list_tenants(
    request: Request,
    response: Response,
    _caller: PlatformAdmin,
    library: LibraryOf,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: str | None = None,
) -> TenantPage:
    """Every tenant, in the order of their names."""
    after = decode_cursor(cursor)
    names = await to_thread.run_sync(library.catalog.list_tenants, after, limit + 1)
    following = encode_cursor(names[limit - 1]) if len(names) > limit else None
    if following is not None:
        response.headers["Link"] = next_link(request, following)
    return TenantPage(items=[Tenant(tenant=name) for name in names[:limit]], next=following)


@router.put("/v1/tenants/{tenant}", tags=["tenants"], responses={201: {"model": Tenant, "description": "It is new"}})
async def put_tenant(response: Response, tenant: Reading, _caller: PlatformAdmin, library: LibraryOf) -> Tenant:
    """Make a tenant; harmless if it exists."""
    is_new = await to_thread.run_sync(library.catalog.add_tenant, tenant)
    response.status_code = 201 if is_new else 200
    return Tenant(tenant=tenant)


@router.get("/v1/tenants/{tenant}", tags=["tenants"])
async def get_tenant(tenant: Reading, library: LibraryOf) -> Tenant:
    """Whether there is such a tenant."""
    if not await to_thread.run_sync(library.catalog.has_tenant, tenant):
        raise NotFound(f"there is no tenant {tenant!r}")
    return Tenant(tenant=tenant)


@router.post("/v1/tenants/{tenant}/keys", tags=["keys"], status_code=201, openapi_extra=json_body(NewKey))
async def create_tenant_key(request: Request, tenant: Administering, state: StateOf) -> CreatedKey:
    """A new key of a tenant; the answer alone tells it."""
    return await _create(request, state, tenant)


@router.get("/v1/tenants/{tenant}/keys", tags=["keys"])
async def list_tenant_keys(tenant: Administering, state: StateOf) -> KeyPage:
    """The keys of a tenant, without their secrets."""
    return await _list(state, tenant)


@router.get("/v1/tenants/{tenant}/keys/{key_id}", tags=["keys"])
async def get_tenant_key(tenant: Administering, key_id: KeyPath, state: StateOf) -> KeyItem:
    """A key of a tenant, without its secret."""
    return _item(await to_thread.run_sync(state.keyring.get, tenant, key_id))


@router.delete("/v1/tenants/{tenant}/keys/{key_id}", tags=["keys"], status_code=204)
async def revoke_tenant_key(tenant: Administering, key_id: KeyPath, state: StateOf) -> None:
    """Revoke a key: at once here, within seconds in other processes."""
    await _revoke(state, tenant, key_id)


@router.post("/v1/keys", tags=["keys"], status_code=201, openapi_extra=json_body(NewKey))
async def create_platform_key(request: Request, _caller: PlatformAdmin, state: StateOf) -> CreatedKey:
    """A new key of the platform; the answer alone tells it."""
    return await _create(request, state, None)


@router.get("/v1/keys", tags=["keys"])
async def list_platform_keys(_caller: PlatformAdmin, state: StateOf) -> KeyPage:
    """The keys of the platform, without their secrets."""
    return await _list(state, None)


@router.get("/v1/keys/{key_id}", tags=["keys"])
async def get_platform_key(_caller: PlatformAdmin, key_id: KeyPath, state: StateOf) -> KeyItem:
    """A key of the platform, without its secret."""
    return _item(await to_thread.run_sync(state.keyring.get, None, key_id))


@router.delete("/v1/keys/{key_id}", tags=["keys"], status_code=204)
async def revoke_platform_key(_caller: PlatformAdmin, key_id: KeyPath, state: StateOf) -> None:
    """Revoke a key: at once here, within seconds in other processes."""
    await _revoke(state, None, key_id)


async def _create(request: Request, state: State, tenant: str | None) -> CreatedKey:
    require_media_type(request.headers, "application/json")
    wanted = await read_model(request, NewKey, state.settings.max_request_bytes)
    create = state.keyring.create
    key, text = await to_thread.run_sync(create, tenant, wanted.scope, wanted.name, wanted.expires)
    return CreatedKey(**_item(key).model_dump(), key=text)


async def _list(state: State, tenant: str | None) -> KeyPage:
    return KeyPage(items=[_item(key) for key in await to_thread.run_sync(state.keyring.listed, tenant)])


async def _revoke(state: State, tenant: str | None, key_id: KeyPath) -> None:
    await to_thread.run_sync(state.keyring.revoke, tenant, key_id)
    state.authenticator.forget(key_id)


def _item(key: Key) -> KeyItem:
    return KeyItem.model_validate(key, from_attributes=True)
