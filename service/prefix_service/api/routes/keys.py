"""The keys of tenants and of the platform, and the one that asks."""

import contextlib
import re
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, Field

from prefix_service.api.dependencies.authority import Actor
from prefix_service.api.dependencies.bodies import read_model
from prefix_service.api.dependencies.pagination import Asked, AskedPage, Places
from prefix_service.api.http.negotiation import require_media_type
from prefix_service.api.http.paths import KeyPath
from prefix_service.api.middleware.auth import AdministeredTenant, Caller, PlatformAdmin
from prefix_service.api.routes.documentation import json_body
from prefix_service.api.routes.schemas import Moment
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.records import Key, Principal, Scope
from prefix_service.errors import NotFound, Unauthenticated
from prefix_service.library.request_model import RequestModel

router = APIRouter(tags=["keys"])

_KEY_ID: Final = re.compile(r"[0-9a-f]{16}")


def _no_number(value: Any) -> Any:
    if not isinstance(value, str) or len(value) > 64:
        raise ValueError("a moment is written as text, as in 2027-01-31T12:00:00Z")
    return value


_Expires = Annotated[datetime, BeforeValidator(_no_number), Field(strict=False)]


class _NewKey(RequestModel):
    name: str = Field(default="", max_length=200, json_schema_extra={"pattern": "^[^\\u0000-\\u001f\\u007f-\\u009f]*$"})
    expires: _Expires | None = None


class NewTenantKey(_NewKey):
    """A key of a tenant to make; `expires` is in the future."""

    scope: Literal["read", "write", "admin"]


class NewPlatformKey(_NewKey):
    """A key of the platform to make; `expires` is in the future."""

    scope: Scope


class KeyEnd(RequestModel):
    """An end for a key: in the future, and not later than the end that it has."""

    expires: _Expires


class Identity(BaseModel):
    """The key that asks; `tenant` is null for a key of the platform."""

    id: str
    name: str
    tenant: str | None
    scope: Scope
    expires: Moment | None


class Asking(Identity):
    """The key that asks, and the largest weights file that it can publish here, in bytes."""

    max_upload_bytes: int


class KeyItem(BaseModel):
    """A key without its secret; `tenant` is null for a key of the platform."""

    id: str
    tenant: str | None
    scope: Scope
    name: str
    created: Moment
    expires: Moment | None
    last_used: Moment | None


class CreatedKey(KeyItem):
    """A new key with its text, which no later answer contains."""

    key: str


class KeyPage(BaseModel):
    """Keys, oldest first; `next` is the cursor of younger ones, or null."""

    items: list[KeyItem]
    next: str | None


@router.get("/v1/whoami")
async def whoami(caller: Caller, state: StateOf) -> Asking:
    """The key that asks: whose it is, what it may do, and until when; and the largest weights file that the service
    accepts."""
    found = await identity(state, caller)
    return Asking(**found.model_dump(), max_upload_bytes=state.settings.max_upload_bytes)


async def identity(state: State, caller: Principal) -> Identity:
    """Returns what a caller may know of the key that it asks with.

    Raises:
        Unauthenticated: the key was revoked meanwhile.
    """
    if not caller.has_key:
        return Identity(id=caller.key_id, name="", tenant=None, scope=caller.scope, expires=None)
    try:
        key = await state.tenancy.key(caller.tenant, caller.key_id)
    except NotFound as error:
        raise Unauthenticated("the key was revoked while the request was under way") from error
    return Identity.model_validate(key, from_attributes=True)


@router.post("/v1/tenants/{tenant}/keys", status_code=201, openapi_extra=json_body(NewTenantKey))
async def create_tenant_key(request: Request, tenant: AdministeredTenant, by: Actor, state: StateOf) -> CreatedKey:
    """Create another key of a tenant. Only this answer contains the key."""
    return await _create(request, state, tenant, by)


@router.get("/v1/tenants/{tenant}/keys", response_model=KeyPage)
async def list_tenant_keys(tenant: AdministeredTenant, asked: AskedPage, state: StateOf) -> Response:
    """The keys of a tenant, oldest first, without their secrets."""
    return await _list(state, tenant, asked)


@router.get("/v1/tenants/{tenant}/keys/{key_id}")
async def get_tenant_key(tenant: AdministeredTenant, key_id: KeyPath, state: StateOf) -> KeyItem:
    """A key of a tenant, without its secret."""
    return _item(await state.tenancy.key(tenant, key_id))


@router.put("/v1/tenants/{tenant}/keys/{key_id}", openapi_extra=json_body(KeyEnd))
async def shorten_tenant_key(
    request: Request, tenant: AdministeredTenant, key_id: KeyPath, by: Actor, state: StateOf
) -> KeyItem:
    """Give a key an end, or an earlier one than it has: with a second key this is a rotation."""
    return await _shorten(request, state, tenant, key_id, by)


@router.delete("/v1/tenants/{tenant}/keys/{key_id}", status_code=204)
async def revoke_tenant_key(tenant: AdministeredTenant, key_id: KeyPath, by: Actor, state: StateOf) -> None:
    """Revoke a key: at once here, within seconds in other processes."""
    await state.tenancy.revoke_key(tenant, key_id, by)


@router.post("/v1/keys", status_code=201, openapi_extra=json_body(NewPlatformKey))
async def create_platform_key(request: Request, by: PlatformAdmin, state: StateOf) -> CreatedKey:
    """Create another key of the platform. Only this answer contains the key."""
    return await _create(request, state, None, by)


@router.get("/v1/keys", response_model=KeyPage)
async def list_platform_keys(_caller: PlatformAdmin, asked: AskedPage, state: StateOf) -> Response:
    """The keys of the platform, oldest first, without their secrets."""
    return await _list(state, None, asked)


@router.get("/v1/keys/{key_id}")
async def get_platform_key(_caller: PlatformAdmin, key_id: KeyPath, state: StateOf) -> KeyItem:
    """A key of the platform, without its secret."""
    return _item(await state.tenancy.key(None, key_id))


@router.put("/v1/keys/{key_id}", openapi_extra=json_body(KeyEnd))
async def shorten_platform_key(request: Request, by: PlatformAdmin, key_id: KeyPath, state: StateOf) -> KeyItem:
    """Give a key an end, or an earlier one than it has: with a second key this is a rotation."""
    return await _shorten(request, state, None, key_id, by)


@router.delete("/v1/keys/{key_id}", status_code=204)
async def revoke_platform_key(by: PlatformAdmin, key_id: KeyPath, state: StateOf) -> None:
    """Revoke a key: at once here, within seconds in other processes."""
    await state.tenancy.revoke_key(None, key_id, by)


async def _create(request: Request, state: State, tenant: str | None, by: Principal) -> CreatedKey:
    require_media_type(request.headers, "application/json")
    model: type[NewPlatformKey] | type[NewTenantKey] = NewPlatformKey if tenant is None else NewTenantKey
    wanted = await read_model(request, model)
    key, text = await state.tenancy.create_key(tenant, wanted.scope, wanted.name, by, wanted.expires)
    return CreatedKey(**_item(key).model_dump(), key=text)


async def _shorten(request: Request, state: State, tenant: str | None, key_id: str, by: Principal) -> KeyItem:
    require_media_type(request.headers, "application/json")
    wanted = await read_model(request, KeyEnd)
    return _item(await state.tenancy.shorten_key(tenant, key_id, wanted.expires, by))


async def _list(state: State, tenant: str | None, asked: Asked) -> Response:
    return asked.answer(await state.pages.keys(tenant, asked.wanted(_PLACES, _item)), _PLACES)


def _place_in(text: str) -> tuple[datetime, str] | None:
    """Returns the moment and the key's id that a cursor's text holds, or None."""
    created, _, key_id = text.partition(" ")
    with contextlib.suppress(ValueError):
        moment = datetime.fromisoformat(created)
        if moment.isoformat() == created and _KEY_ID.fullmatch(key_id):
            return moment, key_id
    return None


_PLACES: Final = Places(_place_in, lambda place: f"{place[0].isoformat()} {place[1]}")


def _item(key: Key) -> KeyItem:
    return KeyItem.model_validate(key, from_attributes=True)
