"""Aliases: names that point at one version, and move atomically."""

from typing import Annotated, Final

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from prefix_service.api.dependencies.authority import Actor
from prefix_service.api.dependencies.bodies import read_model
from prefix_service.api.http.negotiation import is_expected, require_media_type
from prefix_service.api.http.paths import AliasPath, NamePath
from prefix_service.api.middleware.auth import ReadableTenant, WritableTenant
from prefix_service.api.routes.documentation import json_body, refusals, request_headers
from prefix_service.api.state import State, StateOf
from prefix_service.errors import PreconditionFailed
from prefix_service.library.request_model import INTEGRAL, RequestModel
from prefix_service.prefix.references import Reference, check_alias, check_name

router = APIRouter(tags=["aliases"])

_PATH: Final = "/v1/tenants/{tenant}/adapters/{name}/aliases/{alias}"
_ANYWHERE: Final = -1
_TAG: Final = '"[1-9][0-9]{0,17}"'
_CONDITIONS: Final = request_headers(
    {"If_Match": rf"^(?:\*|{_TAG}(?:, ?{_TAG})*)$", "If_None_Match": r"^\*$"},
    If_Match="the ETag where the caller saw it",
    If_None_Match="* for one that is new",
)
_REFUSALS: Final = refusals(
    {404: "There is no such adapter, version or alias", 412: "The alias does not point where the condition says"}
)


class AliasTarget(RequestModel):
    """The version that an alias names; with `preload` it moves once the version is resident."""

    version: Annotated[int, Field(ge=1, lt=10**18), INTEGRAL]  # as in references: at most 18 digits
    preload: bool = False


class Alias(BaseModel):
    """An alias of an adapter."""

    alias: str
    version: int


class AliasState(Alias):
    """An alias of an adapter; `previous` is the version that it pointed at before, null if there was none."""

    previous: int | None


@router.put(
    _PATH,
    responses={201: {"model": Alias, "description": "The alias is new"}, **_REFUSALS},
    openapi_extra={**json_body(AliasTarget), **_CONDITIONS},
)
async def put_alias(
    request: Request,
    response: Response,
    tenant: WritableTenant,
    name: NamePath,
    alias: AliasPath,
    by: Actor,
    state: StateOf,
) -> Alias:
    """Point an alias at a version; `If-Match` moves it only from where the caller saw it, `If-None-Match: *` only
    makes it."""
    _check(name, alias)
    require_media_type(request.headers, "application/json")
    target = await read_model(request, AliasTarget)
    expected = await _expected(request, state, tenant, name, alias)
    if target.preload:
        await state.tenancy.require_authority(by)  # before the work; the write proves it itself
        reference = Reference(name, str(target.version), explicit=True)
        await state.library.load(await state.library.resolve(tenant, reference))
    is_new = await state.adapters.put_alias(tenant, name, alias, target.version, by, expected)
    response.status_code = 201 if is_new else 200
    response.headers["ETag"] = _etag(target.version)
    return Alias(alias=alias, version=target.version)


@router.get(_PATH)
async def get_alias(
    response: Response, tenant: ReadableTenant, name: NamePath, alias: AliasPath, state: StateOf
) -> AliasState:
    """Return the version that an alias names, and `previous`, the one that it named before, where a rollback moves
    it."""
    _check(name, alias)
    number, previous = await state.adapters.alias(tenant, name, alias)
    response.headers["ETag"] = _etag(number)
    return AliasState(alias=alias, version=number, previous=previous)


@router.delete(_PATH, status_code=204, responses=_REFUSALS, openapi_extra=_CONDITIONS)
async def delete_alias(
    request: Request, tenant: WritableTenant, name: NamePath, alias: AliasPath, by: Actor, state: StateOf
) -> None:
    """Forget an alias, with `If-Match` only where the caller saw it; its version stays."""
    _check(name, alias)
    expected = await _expected(request, state, tenant, name, alias)
    await state.adapters.delete_alias(tenant, name, alias, by, expected)


async def _expected(request: Request, state: State, tenant: str, name: str, alias: str) -> int | None:
    """Returns the version that the alias must name for the caller's precondition to hold; the catalog compares it again
    in the transaction that writes."""
    if request.headers.get("if-none-match") is not None:
        if request.headers["if-none-match"].strip() != "*":
            raise PreconditionFailed("If-None-Match on an alias takes only *")
        return None
    if request.headers.get("if-match") is None:
        return _ANYWHERE
    current = (await state.adapters.aliases(tenant, name)).get(alias)
    if current is None or not is_expected(request.headers, _etag(current)):
        raise PreconditionFailed(f"alias {alias!r} points at {'nothing' if current is None else current}")
    return current


def _check(name: str, alias: str) -> None:
    check_name("adapter", name)
    check_alias(alias)


def _etag(version: int) -> str:
    return f'"{version}"'
