"""Routes for the model card, the annotations and the base model's fingerprint of a version, each of which a `PUT`
replaces as a whole; and for the uploaded config file."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Final

import orjson
from fastapi import APIRouter, Depends, Request, Response

from prefix_service.api.dependencies.authority import Actor
from prefix_service.api.dependencies.bodies import declared_bytes, read_body, read_json
from prefix_service.api.dependencies.memory import held, payer, reserved
from prefix_service.api.http.negotiation import (
    is_current,
    is_expected,
    require_acceptable,
    require_json_acceptable,
    require_media_type,
)
from prefix_service.api.http.paths import RefPath
from prefix_service.api.middleware.auth import ReadableTenant, WritableTenant
from prefix_service.api.routes.documentation import refusals, request_headers, response_headers
from prefix_service.api.routes.new_versions import ANNOTATIONS_SCHEMA, FINGERPRINT_SCHEMA
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.records import Principal, Version
from prefix_service.errors import PreconditionFailed
from prefix_service.prefix.config import write_config
from prefix_service.prefix.description import (
    MOST_ANNOTATIONS,
    MOST_CARD,
    MOST_VALUE,
    Description,
    check_annotations,
    decode_card,
)
from prefix_service.prefix.fingerprint import check_fingerprint
from prefix_service.prefix.references import parse_reference

router = APIRouter(tags=["adapters"])

_PATH: Final = "/v1/tenants/{tenant}/adapters/{ref}"
_MARKDOWN: Final = "text/markdown"
_JSON: Final = "application/json"
_MOST_WRITTEN: Final = 6 * MOST_ANNOTATIONS * (MOST_VALUE + 64)  # JSON may write a byte of text as six
_HEADERS: Final = response_headers(
    ETag="strong entity tag of what is in the body",
    Prefix_Version="the version's number",
    Prefix_Digest="the version's digest, which does not cover them",
)
_READ_CONDITION: Final = request_headers(If_None_Match="an entity tag: 304 while it is current")
_WRITE_CONDITION: Final = request_headers(If_Match="the ETag that the caller saw: 412 if it is another now")
_MISSING: Final = "There is no such adapter or version"
_READ_REFUSALS: Final = refusals({404: _MISSING})
_WRITE_REFUSALS: Final = refusals(
    {
        404: _MISSING,
        412: "It is not what the condition says",
        413: "It is longer than it may be",
        422: "It is malformed",
        507: "There is no space for it, or a quota is used up",
    }
)

_HeldCard = Annotated[None, held(MOST_CARD)]
_HeldAnnotations = Annotated[None, held(_MOST_WRITTEN)]
"""Memory for what is answered, until it has left."""

_Part = Callable[[Description, Version], bytes]
"""The body that shows a part of a version's description."""


def _documented(
    media_type: str, schema: dict[str, Any], found: str = "What the version has; empty where it has none"
) -> dict[str, Any]:
    """Returns how a GET is described that answers with this media type."""
    content = {media_type: {"schema": schema}}
    return {
        "responses": {
            200: {
                "description": found,
                "headers": _HEADERS,
                "content": content,
            },
            304: {"description": "What the caller has is current"},
            **_READ_REFUSALS,
        },
        "openapi_extra": _READ_CONDITION,
    }


def _documented_change(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Returns how a PUT is described that takes this media type."""
    body = {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}
    return {
        "status_code": 204,
        "response_class": Response,
        "responses": {204: {"description": "It is stored", "headers": _HEADERS}, **_WRITE_REFUSALS},
        "openapi_extra": {**body, **_WRITE_CONDITION},
    }


_CARD_SCHEMA: Final = {"type": "string", "maxLength": MOST_CARD, "pattern": "^[^\\u0000]*$"}


@router.get(f"{_PATH}/card", response_class=Response, **_documented(_MARKDOWN, _CARD_SCHEMA))
async def get_card(
    request: Request, tenant: ReadableTenant, ref: RefPath, _memory: _HeldCard, state: StateOf
) -> Response:
    """The model card of a version, in Markdown, exactly as it was stored; empty where there is none."""
    require_acceptable(request.headers, _MARKDOWN)
    return await _answer(request, state, tenant, ref, f"{_MARKDOWN}; charset=utf-8", _card)


@router.put(f"{_PATH}/card", **_documented_change(_MARKDOWN, _CARD_SCHEMA))
async def put_card(request: Request, tenant: WritableTenant, ref: RefPath, by: Actor, state: StateOf) -> Response:
    """Replace the model card of a version: up to 256 KiB of UTF-8. With `If-Match` only if it is what the caller
    saw."""
    require_media_type(request.headers, _MARKDOWN)
    async with reserved(request, declared_bytes(request, MOST_CARD)):
        card = decode_card(await read_body(request, MOST_CARD))
    return await _change(request, state, by, (tenant, ref), "card", _card, partial(replace, card=card))


@router.get(
    f"{_PATH}/annotations",
    response_class=Response,
    dependencies=[Depends(require_json_acceptable)],
    **_documented(_JSON, ANNOTATIONS_SCHEMA),
)
async def get_annotations(
    request: Request, tenant: ReadableTenant, ref: RefPath, _memory: _HeldAnnotations, state: StateOf
) -> Response:
    """The annotations of a version: a JSON object of texts, empty where there are none."""
    return await _answer(request, state, tenant, ref, _JSON, _annotations)


@router.put(f"{_PATH}/annotations", **_documented_change(_JSON, ANNOTATIONS_SCHEMA))
async def put_annotations(
    request: Request, tenant: WritableTenant, ref: RefPath, by: Actor, state: StateOf
) -> Response:
    """Replace all annotations of a version: a JSON object of up to 64 texts of up to 4 KiB. With `If-Match` only if
    they are what the caller saw."""
    require_media_type(request.headers, _JSON)
    annotations = await read_json(request, check_annotations)
    change = partial(replace, annotations=annotations)
    return await _change(request, state, by, (tenant, ref), "annotations", _annotations, change)


@router.get(
    f"{_PATH}/base-model",
    response_class=Response,
    dependencies=[Depends(require_json_acceptable)],
    **_documented(_JSON, FINGERPRINT_SCHEMA),
)
async def get_base_model(request: Request, tenant: ReadableTenant, ref: RefPath, state: StateOf) -> Response:
    """The fingerprint of a version's base model: what keys and values depend on, as far as it is known; an empty object
    where nothing is."""
    return await _answer(request, state, tenant, ref, _JSON, _fingerprint)


@router.put(f"{_PATH}/base-model", **_documented_change(_JSON, FINGERPRINT_SCHEMA))
async def put_base_model(request: Request, tenant: WritableTenant, ref: RefPath, by: Actor, state: StateOf) -> Response:
    """Replace the fingerprint of a version's base model: up to 16 KiB of JSON. With `If-Match` only if it is what the
    caller saw."""
    require_media_type(request.headers, _JSON)
    change = partial(replace, fingerprint=await read_json(request, check_fingerprint))
    return await _change(request, state, by, (tenant, ref), "base-model", _fingerprint, change)


@router.get(
    f"{_PATH}/config",
    response_class=Response,
    dependencies=[Depends(require_json_acceptable)],
    **_documented(_JSON, {"type": "object"}, "The file; or the config as PEFT writes it, where no file was uploaded"),
)
async def get_config(request: Request, tenant: ReadableTenant, ref: RefPath, state: StateOf) -> Response:
    """The `adapter_config.json` of a version, byte for byte as it was uploaded. Of a version that was made of JSON, or
    uploaded to an older release, the config as PEFT writes it."""
    return await _answer(request, state, tenant, ref, _JSON, _config_file)


def _card(description: Description, _version: Version) -> bytes:
    return description.card.encode()


def _annotations(description: Description, _version: Version) -> bytes:
    return orjson.dumps(description.annotations, option=orjson.OPT_SORT_KEYS)


def _fingerprint(description: Description, _version: Version) -> bytes:
    return description.fingerprint.encode() or b"{}"


def _config_file(description: Description, version: Version) -> bytes:
    return description.config_file or write_config(version.config)


async def _answer(request: Request, state: State, tenant: str, ref: str, media_type: str, part: _Part) -> Response:
    """Returns a part of a description, made in a thread in its tenant's turn."""
    version = await state.library.resolve(tenant, parse_reference(ref))
    description = await state.adapters.description(version)

    def write() -> Response:
        body = part(description, version)
        headers = _headers(version, body)
        if is_current(request.headers, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers | {"X-Content-Type-Options": "nosniff"}, media_type=media_type)

    return await state.admission.run(payer(request), write)


async def _change(
    request: Request,
    state: State,
    by: Principal,
    where: tuple[str, str],
    what: str,
    part: _Part,
    change: Callable[[Description], Description],
) -> Response:
    """Changes a part of the description of the version that tenant and reference name."""
    await state.tenancy.require_authority(by)
    tenant, ref = where
    version = await state.library.resolve(tenant, parse_reference(ref))

    def checked(current: Description) -> Description:
        if "if-match" in request.headers and not is_expected(request.headers, _etag(part(current, version))):
            raise PreconditionFailed(f"the {what} of {tenant}/{ref} changed meanwhile: read it again, then change it")
        return change(current)

    def headers(changed: Description) -> dict[str, str]:
        return _headers(version, part(changed, version))

    stored = await state.adapters.change_description(version, by, what, checked, headers)
    return Response(status_code=204, headers=stored)


def _headers(version: Version, body: bytes) -> dict[str, str]:
    return {
        "ETag": _etag(body),
        "Prefix-Version": str(version.number),
        "Prefix-Digest": version.digest,
        "Cache-Control": "private, no-cache",
    }


def _etag(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()}"'
