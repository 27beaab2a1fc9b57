"""Publishing, listing, inspecting and deleting adapters."""

from typing import Annotated, Any, Final

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response

from service.api.auth import Caller, Reading, Writing
from service.api.bodies import BASE_CONFIG, CONFIG, WEIGHTS, read_upload
from service.api.json_bodies import read_json, validated
from service.api.negotiation import require_media_type
from service.api.pagination import decode_cursor, encode_cursor, next_link
from service.api.paths import NamePath, RefPath
from service.api.schemas import (
    AdapterItem,
    AdapterPage,
    ComposedVersion,
    FreshVersion,
    VersionDetail,
    VersionPage,
    VersionSummary,
)
from service.api.state import LibraryOf
from service.catalog.records import Principal, Version
from service.library import Library, Target
from service.prefix.config import parse_config, parse_config_json
from service.prefix.references import check_name, parse_qualified, parse_reference

router = APIRouter(tags=["adapters"])

_FILE: Final = {"type": "string", "format": "binary"}
_UPLOAD: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {CONFIG: _FILE, BASE_CONFIG: _FILE, WEIGHTS: _FILE},
                    "required": [CONFIG, WEIGHTS],
                },
            },
            "application/json": {
                "schema": {"anyOf": [FreshVersion.model_json_schema(), ComposedVersion.model_json_schema()]}
            },
        },
    }
}


@router.post(
    "/v1/tenants/{tenant}/adapters/{name}/versions",
    status_code=201,
    openapi_extra=_UPLOAD,
    responses={200: {"description": "The same content is a version already", "model": VersionDetail}},
)
async def publish(
    request: Request,
    response: Response,
    tenant: Writing,
    name: NamePath,
    by: Caller,
    library: LibraryOf,
) -> VersionDetail:
    """Publish a version: a multipart upload of trained weights, or JSON for an untrained prefix, or for the
    concatenation of others."""
    check_name("adapter", name)
    media_type = require_media_type(request.headers, "multipart/form-data", "application/json")
    target = await _target(library, tenant, name, by)
    if media_type == "application/json":
        wanted = await read_json(request, _fresh_or_composed)
        if isinstance(wanted, ComposedVersion):
            version, is_new = await _publish_composed(wanted, library, target)
        else:
            version, is_new = await _publish_fresh(wanted, library, target)
    else:
        version, is_new = await _publish_upload(request, library, target)
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/v1/tenants/{tenant}/adapters/{name}@{version.number}"
    return await _detail(library, version)


def _fresh_or_composed(values: dict[str, Any]) -> FreshVersion | ComposedVersion:
    return validated(ComposedVersion, values) if "compose" in values else validated(FreshVersion, values)


async def _publish_fresh(wanted: FreshVersion, library: Library, target: Target) -> tuple[Version, bool]:
    return await library.publish_fresh(target, parse_config(wanted.config), wanted.init_weights, wanted.seed)


async def _publish_composed(wanted: ComposedVersion, library: Library, target: Target) -> tuple[Version, bool]:
    """From all that the caller may read."""
    named = [(name, *parse_qualified(name)) for name in wanted.compose]
    sources = [(name, await library.resolve_for(target.by, tenant, reference)) for name, tenant, reference in named]
    return await library.publish_composed(target, sources)


async def _publish_upload(request: Request, library: Library, target: Target) -> tuple[Version, bool]:
    weights = await library.stage()
    try:
        config_json, base_json = await read_upload(request, weights, library.limits.upload_bytes)
        config = parse_config(parse_config_json(config_json, CONFIG), from_file=True)
        if base_json is not None:
            config = config.filled(parse_config_json(base_json, BASE_CONFIG))
        return await library.publish(target, config, weights)
    finally:
        await to_thread.run_sync(weights.discard)


async def _target(library: Library, tenant: str, name: str, by: Principal) -> Target:
    """A platform admin's first upload makes the tenant; for everybody else it must exist."""
    makes_tenants = by.tenant is None and by.has("admin")
    if not makes_tenants:
        await to_thread.run_sync(library.tenants.require, tenant)
    return Target(tenant, name, by, makes_tenants)


@router.get("/v1/tenants/{tenant}/adapters")
async def list_adapters(
    request: Request,
    response: Response,
    tenant: Reading,
    library: LibraryOf,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: str | None = None,
    base_model: Annotated[str | None, Query(max_length=1000)] = None,
) -> AdapterPage:
    """The adapters of a tenant, in the order of their names."""
    after = decode_cursor(cursor)
    await to_thread.run_sync(library.tenants.require, tenant)

    def load() -> list[AdapterItem]:
        found = library.catalog.list_adapters(tenant, after=after, limit=limit + 1, base_model=base_model)
        return [AdapterItem.of(adapter) for adapter in found]

    items = await to_thread.run_sync(load)
    following = encode_cursor(items[limit - 1].adapter) if len(items) > limit else None
    if following is not None:
        response.headers["Link"] = next_link(request, following)
    return AdapterPage(items=items[:limit], next=following)


@router.get("/v1/tenants/{tenant}/adapters/{ref}")
async def inspect(tenant: Reading, ref: RefPath, library: LibraryOf) -> VersionDetail:
    """A version: its config, shapes, parameter counts, digest, size, aliases and residency."""
    return await _detail(library, await library.resolve(tenant, parse_reference(ref)))


@router.get("/v1/tenants/{tenant}/adapters/{name}/versions")
async def list_versions(tenant: Reading, name: NamePath, library: LibraryOf) -> VersionPage:
    """Every version of an adapter, newest first."""
    check_name("adapter", name)
    versions = await to_thread.run_sync(library.catalog.versions_of, tenant, name)
    aliases = await to_thread.run_sync(library.catalog.aliases_of, tenant, name)
    return VersionPage(items=[VersionSummary.of(version, aliases) for version in versions])


@router.delete("/v1/tenants/{tenant}/adapters/{ref}", status_code=204)
async def delete(tenant: Writing, ref: RefPath, by: Caller, library: LibraryOf) -> None:
    """Delete an adapter, or the version that a number or digest names."""
    await library.delete(tenant, parse_reference(ref), by)


async def _detail(library: Library, version: Version) -> VersionDetail:
    aliases = await to_thread.run_sync(library.catalog.aliases_of, version.tenant, version.adapter)
    return VersionDetail.about(library, version, aliases)
