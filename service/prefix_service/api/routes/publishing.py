"""Publishing: a multipart upload of trained weights, or JSON for a fresh or a composed version."""

from collections.abc import Coroutine, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, Request, Response

from prefix_service.api.dependencies.authority import Founder
from prefix_service.api.dependencies.bodies import declared_bytes, read_json
from prefix_service.api.dependencies.memory import computed, reserved
from prefix_service.api.dependencies.uploads import ANNOTATIONS, BASE_CONFIG, MOST_HELD, declared_weights, read_upload
from prefix_service.api.http.json_objects import json_object, validated
from prefix_service.api.http.negotiation import require_media_type
from prefix_service.api.http.paths import NamePath
from prefix_service.api.http.presence import while_connected
from prefix_service.api.middleware.auth import WritableTenant
from prefix_service.api.routes.adapters import answer_version
from prefix_service.api.routes.documentation import refusals, response_headers
from prefix_service.api.routes.new_versions import ComposedVersion, FreshVersion
from prefix_service.api.routes.schemas import (
    VersionDetail,
)
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.records import Principal, Version
from prefix_service.errors import InvalidRequest, NotFound
from prefix_service.library.arrivals import Target, Upload
from prefix_service.prefix.config import PrefixConfig, parse_config
from prefix_service.prefix.description import Description, check_annotations, decode_card
from prefix_service.prefix.file_names import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from prefix_service.prefix.json_text import MAX_BASE_CONFIG_BYTES, json_memory, parse_config_json
from prefix_service.prefix.references import check_name, parse_qualified
from prefix_service.prefix.variant import MEDIA_TYPE

router = APIRouter(tags=["adapters"])

_FILE: Final = {"type": "string", "format": "binary"}
_HEADERS: Final = response_headers(
    Location="where the version is",
    Prefix_Tenant_Created="`true` if the tenant came into being: there was none of this name when the request began",
)
_JSON_FILE: Final = "application/json, application/octet-stream"
_UPLOAD: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        CONFIG_NAME: _FILE,
                        BASE_CONFIG: _FILE,
                        CARD_NAME: {
                            **_FILE,
                            "description": "the model card, as PEFT writes it: up to 256 KiB of UTF-8",
                        },
                        ANNOTATIONS: {**_FILE, "description": "a JSON object of up to 64 texts of up to 4 KiB"},
                        WEIGHTS_NAME: _FILE,
                    },
                    "required": [CONFIG_NAME, WEIGHTS_NAME],
                },
                "encoding": {
                    CONFIG_NAME: {"contentType": _JSON_FILE},
                    BASE_CONFIG: {"contentType": _JSON_FILE},
                    CARD_NAME: {"contentType": "text/markdown, application/octet-stream"},
                    ANNOTATIONS: {"contentType": _JSON_FILE},
                    WEIGHTS_NAME: {"contentType": MEDIA_TYPE},
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
    response_model=VersionDetail,
    openapi_extra=_UPLOAD,
    responses={
        200: {"description": "The same content is a version already", "model": VersionDetail, "headers": _HEADERS},
        201: {"description": "A new version", "headers": _HEADERS},
        **refusals(
            {
                404: "There is no such tenant, or no such version to compose of",
                409: "Something else changed meanwhile",
                413: "The upload is larger than this service takes",
                422: "The config or the weights are malformed, or do not fit each other",
                507: "There is no space for it, or a quota is used up",
            }
        ),
    },
)
async def publish(request: Request, tenant: WritableTenant, name: NamePath, by: Founder, state: StateOf) -> Response:
    """Publish a version: a multipart upload of trained weights, or JSON for an untrained prefix, or for the
    concatenation of others. A version that exists keeps its card and annotations."""
    check_name("adapter", name)
    media_type = require_media_type(request.headers, "multipart/form-data", "application/json")
    target = _target(tenant, name, by)
    if media_type == "application/json":
        wanted = await read_json(request, _fresh_or_composed)
        await state.tenancy.require_authority(by)
        if isinstance(wanted, ComposedVersion):
            publishing = _publish_composed(wanted, state, target)
        else:
            publishing = _publish_fresh(wanted, state, target)
        version, is_new = await _wanted(request, publishing)
    else:
        version, is_new = await _publish_upload(request, state, target)
    headers = {"Location": f"/v1/tenants/{tenant}/adapters/{name}@{version.number}"}
    if by.acts_on is None:
        headers["Prefix-Tenant-Created"] = "true"
    return await answer_version(request, state, version, 201 if is_new else 200, headers)


def _fresh_or_composed(values: dict[str, Any]) -> FreshVersion | ComposedVersion:
    return validated(ComposedVersion, values) if "compose" in values else validated(FreshVersion, values)


async def _publish_fresh(wanted: FreshVersion, state: State, target: Target) -> tuple[Version, bool]:
    config = await state.admission.run(target.tenant, partial(parse_config, wanted.config))
    description = wanted.description()
    return await state.publisher.publish_fresh(target, config, wanted.init_weights, wanted.seed, description)


async def _publish_composed(wanted: ComposedVersion, state: State, target: Target) -> tuple[Version, bool]:
    """From all that the caller may read; with the fingerprint of the base model, which must be the same."""
    named = [(name, *parse_qualified(name)) for name in wanted.compose]
    library, by = state.library, target.by
    sources = [(name, await library.resolve_for(by, tenant, reference)) for name, tenant, reference in named]
    base_model = await state.adapters.common_base_model(sources)
    description = replace(wanted.description(), fingerprint=base_model)
    return await state.publisher.publish_composed(target, sources, description)


async def _publish_upload(request: Request, state: State, target: Target) -> tuple[Version, bool]:
    async with state.publisher.receiving(target, declared_weights(request)) as upload:
        config, description = await _receive(request, upload, state.settings.max_upload_bytes)
        return await _wanted(request, state.publisher.publish(upload, config, description))


async def _wanted(request: Request, publishing: Coroutine[Any, Any, tuple[Version, bool]]) -> tuple[Version, bool]:
    """Returns what `publishing` returns, unless the client leaves: then it is cancelled, at the latest after the step
    that runs."""
    made = await while_connected(request.receive, publishing)
    if made is None:
        raise InvalidRequest("the connection ended before the version was made")
    return made


async def _receive(request: Request, upload: Upload, limit: int) -> tuple[PrefixConfig, Description]:
    """Writes the weights of an upload and returns its config with all dimensions filled, and its description. Reserves
    the memory that they take."""
    async with reserved(request, declared_bytes(request, MOST_HELD)):
        parts = await read_upload(request, upload, limit)
        memory = json_memory(sum(len(parts.get(name, b"")) for name in (CONFIG_NAME, BASE_CONFIG, ANNOTATIONS)))
        return await computed(request, memory, partial(_parsed_parts, parts))


def _parsed_parts(parts: Mapping[str, bytes]) -> tuple[PrefixConfig, Description]:
    config = parse_config(parse_config_json(parts[CONFIG_NAME], CONFIG_NAME), from_file=True)
    if (base := parts.get(BASE_CONFIG)) is not None:
        config = config.filled(parse_config_json(base, BASE_CONFIG, MAX_BASE_CONFIG_BYTES))
    annotations = json_object(parts.get(ANNOTATIONS, b"{}"), ANNOTATIONS)
    description = Description(
        card=decode_card(parts.get(CARD_NAME, b"")),
        annotations=check_annotations(annotations),
        config_file=parts[CONFIG_NAME],
    )
    return config, description


def _target(tenant: str, name: str, by: Principal) -> Target:
    """A platform admin's first upload makes the tenant; for everybody else it must exist."""
    makes_tenants = by.tenant is None and by.has("admin")
    if by.acts_on is None and not makes_tenants:
        raise NotFound(f"there is no tenant {tenant!r}")
    return Target(tenant, name, by, makes_tenants)
