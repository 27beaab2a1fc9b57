"""The keys of tenants and of the platform, and the one that asks."""

import contextlib
import re
from datetime import datetime
from functools import partial
from typing import Final

from fastapi import APIRouter, Request, Response

from prefix_service.api.dependencies.authority import Actor
from prefix_service.api.dependencies.json_bodies import read_model
from prefix_service.api.dependencies.pagination import Cursor, HeldPage, Limit, Listing, answer_page, decode_cursor
from prefix_service.api.http.negotiation import require_media_type
from prefix_service.api.http.paths import KeyPath
from prefix_service.api.middleware.auth import AdministeredTenant, Caller, PlatformAdmin
from prefix_service.api.routes.documentation import json_body
from prefix_service.api.routes.schemas import (
    CreatedKey,
    Identity,
    KeyEnd,
    KeyItem,
    KeyPage,
    NewPlatformKey,
    NewTenantKey,
)
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.reads import read_catalog, write_catalog
from prefix_service.catalog.records import Key, Principal
from prefix_service.errors import NotFound, Unauthenticated

router = APIRouter(tags=["keys"])

_KEY_ID: Final = re.compile(r"[0-9a-f]{16}")


@router.get("/v1/whoami")
async def whoami(caller: Caller, state: StateOf) -> Identity:
    """The key that asks: whose it is, what it may do, and until when."""
    return await identity(state, caller)


async def identity(state: State, caller: Principal) -> Identity:
    """Returns what a caller may know of the key that it asks with.

    Raises:
        Unauthenticated: the key was revoked meanwhile.
    """
    if not caller.has_key:
        return Identity(id=caller.key_id, name="", tenant=None, scope=caller.scope, expires=None)
    try:
        key = await read_catalog(state.keyring.get, caller.tenant, caller.key_id)
    except NotFound as error:
        raise Unauthenticated("the key was revoked while the request was under way") from error
    return Identity.model_validate(key, from_attributes=True)


@router.post("/v1/tenants/{tenant}/keys", status_code=201, openapi_extra=json_body(NewTenantKey))
async def create_tenant_key(request: Request, tenant: AdministeredTenant, by: Actor, state: StateOf) -> CreatedKey:
    """Create another key of a tenant. Only this answer contains the key."""
    return await _create(request, state, tenant, by)


@router.get("/v1/tenants/{tenant}/keys", response_model=KeyPage)
async def list_tenant_keys(
    request: Request,
    tenant: AdministeredTenant,
    _memory: HeldPage,
    state: StateOf,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Response:
    """The keys of a tenant, oldest first, without their secrets."""
    return await _list(request, state, tenant, limit, cursor)


@router.get("/v1/tenants/{tenant}/keys/{key_id}")
async def get_tenant_key(tenant: AdministeredTenant, key_id: KeyPath, state: StateOf) -> KeyItem:
    """A key of a tenant, without its secret."""
    return _item(await read_catalog(state.keyring.get, tenant, key_id))


@router.put("/v1/tenants/{tenant}/keys/{key_id}", openapi_extra=json_body(KeyEnd))
async def shorten_tenant_key(
    request: Request, tenant: AdministeredTenant, key_id: KeyPath, by: Actor, state: StateOf
) -> KeyItem:
    """Give a key an end, or an earlier one than it has: with a second key this is a rotation."""
    return await _shorten(request, state, tenant, key_id, by)


@router.delete("/v1/tenants/{tenant}/keys/{key_id}", status_code=204)
async def revoke_tenant_key(tenant: AdministeredTenant, key_id: KeyPath, by: Actor, state: StateOf) -> None:
    """Revoke a key: at once here, within seconds in other processes."""
    await _revoke(state, tenant, key_id, by)


@router.post("/v1/keys", status_code=201, openapi_extra=json_body(NewPlatformKey))
async def create_platform_key(request: Request, by: PlatformAdmin, state: StateOf) -> CreatedKey:
    """Create another key of the platform. Only this answer contains the key."""
    return await _create(request, state, None, by)


@router.get("/v1/keys", response_model=KeyPage)
async def list_platform_keys(
    request: Request,
    _caller: PlatformAdmin,
    _memory: HeldPage,
    state: StateOf,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Response:
    """The keys of the platform, oldest first, without their secrets."""
    return await _list(request, state, None, limit, cursor)


@router.get("/v1/keys/{key_id}")
async def get_platform_key(_caller: PlatformAdmin, key_id: KeyPath, state: StateOf) -> KeyItem:
    """A key of the platform, without its secret."""
    return _item(await read_catalog(state.keyring.get, None, key_id))


@router.put("/v1/keys/{key_id}", openapi_extra=json_body(KeyEnd))
async def shorten_platform_key(request: Request, by: PlatformAdmin, key_id: KeyPath, state: StateOf) -> KeyItem:
    """Give a key an end, or an earlier one than it has: with a second key this is a rotation."""
    return await _shorten(request, state, None, key_id, by)


@router.delete("/v1/keys/{key_id}", status_code=204)
async def revoke_platform_key(by: PlatformAdmin, key_id: KeyPath, state: StateOf) -> None:
    """Revoke a key: at once here, within seconds in other processes."""
    await _revoke(state, None, key_id, by)


async def _create(request: Request, state: State, tenant: str | None, by: Principal) -> CreatedKey:
    require_media_type(request.headers, "application/json")
    model: type[NewPlatformKey] | type[NewTenantKey] = NewPlatformKey if tenant is None else NewTenantKey
    wanted = await read_model(request, model)
    create = partial(state.keyring.create, tenant, wanted.scope, wanted.name, by, wanted.expires)
    key, text = await write_catalog(create)
    return CreatedKey(**_item(key).model_dump(), key=text)


async def _shorten(request: Request, state: State, tenant: str | None, key_id: str, by: Principal) -> KeyItem:
    require_media_type(request.headers, "application/json")
    wanted = await read_model(request, KeyEnd)
    return _item(await write_catalog(state.keyring.shorten, tenant, key_id, wanted.expires, by))


async def _list(request: Request, state: State, tenant: str | None, limit: int, cursor: str | None) -> Response:
    def load(place: str, limit: int) -> list[Key]:
        created, _, key_id = place.partition(" ")
        after = (datetime.fromisoformat(created), key_id) if place else None
        return state.keyring.listed(tenant, after=after, limit=limit)

    listing = Listing(load, lambda key: f"{key.created.isoformat()} {key.id}", _item)
    return await answer_page(request, tenant, listing, decode_cursor(cursor, _is_place), limit)


def _is_place(text: str) -> bool:
    """Returns whether a cursor names a moment and a key's id."""
    created, _, key_id = text.partition(" ")
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(created).isoformat() == created and _KEY_ID.fullmatch(key_id) is not None
    return False


async def _revoke(state: State, tenant: str | None, key_id: str, by: Principal) -> None:
    await write_catalog(state.keyring.revoke, tenant, key_id, by)


def _item(key: Key) -> KeyItem:
    return KeyItem.model_validate(key, from_attributes=True)
