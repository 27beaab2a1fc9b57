"""The main job: `GET`, `HEAD` and `POST …/prefix`."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request

from prefix_service.api.dependencies.bodies import declared_bytes, read_body, read_mask_json
from prefix_service.api.dependencies.input_masks import mask_from_json, mask_of_tensor
from prefix_service.api.dependencies.memory import computed, payer, reserved
from prefix_service.api.http.json_objects import validated
from prefix_service.api.http.negotiation import lists, require_acceptable, require_media_type
from prefix_service.api.http.paths import RefPath
from prefix_service.api.http.responses import ParametersResponse, PrefixResponse
from prefix_service.api.middleware.auth import ReadableTenant
from prefix_service.api.routes.documentation import refusals, request_headers, response_headers
from prefix_service.api.routes.shared_files import SharedFileResponse, shares_file
from prefix_service.api.state import LibraryOf, StateOf, state_of
from prefix_service.errors import InvalidCheckpoint, InvalidRequest
from prefix_service.library.plan import Plan, PrefixBody, PrefixRequest
from prefix_service.prefix.json_text import MOST_VALUES, json_memory
from prefix_service.prefix.references import parse_reference
from prefix_service.prefix.safetensors_header import parse_header
from prefix_service.prefix.safetensors_tensors import NAMES, tensor_at
from prefix_service.prefix.variant import MEDIA_TYPE, SHARED_FILE_TYPE
from prefix_service.prefix.wire.masks import InputMask
from prefix_service.prefix.wire.prefix_file import MASK_DTYPES

router = APIRouter(tags=["prefixes"])

_PATH: Final = "/v1/tenants/{tenant}/adapters/{ref}"

_MOST_HEADER: Final = 64 << 10  # bytes of a mask's safetensors header, which describes one tensor
_MASK_DTYPES: Final = frozenset(NAMES[dtype] for dtype in MASK_DTYPES.values())
BINARY: Final[dict[str, Any]] = {"schema": {"type": "string", "format": "binary"}}
_HEADERS: Final = response_headers(
    ETag="strong entity tag",
    Prefix_Version="the version's number",
    Prefix_Digest="the version's digest; it does not hash the body",
    Prefix_Base_Model="`known` if the fingerprint of its base model was given: `GET …/base-model` returns it",
    Repr_Digest="digest of the whole body (RFC 9530): sha-256, or the algorithm that Want-Repr-Digest prefers",
)
_CONDITIONS: Final = request_headers(
    If_None_Match="an entity tag: 304 while it is current",
    Range="one byte range: 206; several are ignored",
    If_Range="an entity tag: the range counts while it is current",
    Want_Repr_Digest="sha-256 or crc32c (RFC 9530); asks for Repr-Digest also where the body repeats rows",
)
_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "A safetensors file", "headers": _HEADERS, "content": {MEDIA_TYPE: BINARY}},
    206: {"description": "The byte range that was asked for", "headers": _HEADERS, "content": {MEDIA_TYPE: BINARY}},
    304: {"description": "What the caller has is current"},
    **refusals(
        {
            404: "There is no such adapter or version",
            406: "`Accept` leaves the media type out",
            416: "The byte range lies outside the file",
            422: "An option is malformed, or does not fit the adapter",
            507: "There is no memory for it",
        }
    ),
}
_SHARED_FILE: Final[dict[str, Any]] = {
    "schema": {
        "type": "object",
        "description": "where the safetensors file lies; only on the Unix socket, where the service shares files",
        "properties": {
            "file": {"type": "string", "description": "absolute path"},
            "bytes": {"type": "integer", "description": "its size"},
            "repr_digest": {
                "type": "string",
                "description": "its digest (RFC 9530), if Want-Repr-Digest asked for one",
            },
        },
        "required": ["file", "bytes"],
    }
}
_WHOLE: Final[dict[str, Any]] = {
    **_RESPONSES[200],
    "description": "A safetensors file, or where it lies on this host",
    "content": {MEDIA_TYPE: BINARY, SHARED_FILE_TYPE: _SHARED_FILE},
}
_READING: Final[dict[str, Any]] = {"status_code": 200, "responses": _RESPONSES, "openapi_extra": _CONDITIONS}
_READING_PREFIX: Final[dict[str, Any]] = {**_READING, "responses": {**_RESPONSES, 200: _WHOLE}}
MASK_SCHEMA: Final[dict[str, Any]] = {
    "type": "array",
    "minItems": 1,
    "maxItems": MOST_VALUES,
    "items": {"type": "array", "minItems": 1, "maxItems": MOST_VALUES, "items": {"type": "integer", "enum": [0, 1]}},
    "description": "the input's mask, one row each",
}
_JSON_SCHEMA: Final = PrefixBody.model_json_schema()
_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    **_JSON_SCHEMA,
                    "properties": {**_JSON_SCHEMA["properties"], "attention_mask": MASK_SCHEMA},
                }
            },
            MEDIA_TYPE: BINARY,
        },
    }
}


async def _held_body(request: Request) -> AsyncIterator[None]:
    async with reserved(request, declared_bytes(request, state_of(request).settings.max_request_bytes)):
        yield


HeldBody = Annotated[None, Depends(_held_body)]
"""Memory for a body, or for the mask in it, until the answer has left."""


@router.get(f"{_PATH}/prefix", response_class=PrefixResponse, **_READING_PREFIX)
@router.head(f"{_PATH}/prefix", response_class=PrefixResponse, **_READING_PREFIX)
async def get_prefix(
    request: Request,
    tenant: ReadableTenant,
    ref: RefPath,
    state: StateOf,
    options: Annotated[PrefixRequest, Query()],
) -> PrefixResponse:
    """`past_key_values` and the attention mask of an adapter, as a safetensors file."""
    require_acceptable(request.headers, MEDIA_TYPE)
    reference = parse_reference(ref)
    library = state.library
    version = await library.resolve(tenant, reference)
    plan = await state.admission.run(payer(request), partial(library.plan, version, options))
    response: PrefixResponse
    if shares_file(request, state.settings, plan):
        kind = SharedFileResponse if lists(request.headers, SHARED_FILE_TYPE) else PrefixResponse
        response = kind(library, plan, immutable=reference.immutable, varies=True)
    else:
        response = PrefixResponse(library, plan, immutable=reference.immutable)
    state.answers.remember(request.scope, reference, response)
    return response


@router.post(
    f"{_PATH}/prefix",
    status_code=200,
    responses={200: _RESPONSES[200]},
    response_class=PrefixResponse,
    openapi_extra=_BODY,
)
async def post_prefix(
    request: Request,
    tenant: ReadableTenant,
    ref: RefPath,
    _memory: HeldBody,
    state: StateOf,
    options: Annotated[PrefixRequest, Query()],
) -> PrefixResponse:
    """A prefix, with the input's attention mask extended and the position ids that follow from it."""
    require_acceptable(request.headers, MEDIA_TYPE)
    media_type = require_media_type(request.headers, "application/json", MEDIA_TYPE)
    reference = parse_reference(ref)
    library = state.library
    version = await library.resolve(tenant, reference)

    def plan_json(values: dict[str, Any]) -> Plan:
        mask = mask_from_json(values.pop("attention_mask", None))
        return library.plan(version, validated(PrefixBody, values), mask)

    if media_type == MEDIA_TYPE:
        body = await read_body(request, state.settings.max_request_bytes)
        nbytes = len(body) + json_memory(_MOST_HEADER)
        plan = await computed(request, nbytes, lambda: library.plan(version, options, _mask_from_tensors(body)))
    elif options.model_fields_set:
        raise InvalidRequest("options come in the JSON body here, not in the query")
    else:
        plan = await read_mask_json(request, plan_json)
    return PrefixResponse(library, plan, immutable=reference.immutable)


@router.get(f"{_PATH}/parameters", response_class=ParametersResponse, **_READING)
@router.head(f"{_PATH}/parameters", response_class=ParametersResponse, **_READING)
async def parameters(request: Request, tenant: ReadableTenant, ref: RefPath, library: LibraryOf) -> ParametersResponse:
    """The weights file, byte for byte as it was uploaded."""
    require_acceptable(request.headers, MEDIA_TYPE)
    reference = parse_reference(ref)
    version = await library.resolve(tenant, reference)
    return ParametersResponse(library, version, immutable=reference.immutable)


def _mask_from_tensors(body: bytearray) -> InputMask:
    view = memoryview(body)
    try:
        header = parse_header(view, dtypes=_MASK_DTYPES, longest=_MOST_HEADER)
    except InvalidCheckpoint as error:
        raise InvalidRequest(f"the body is not a safetensors file with an attention_mask: {error}") from error
    entry = header.tensors.get("attention_mask")
    if entry is None or len(header.tensors) > 1 or len(entry.shape) != 2:
        raise InvalidRequest("the body must hold one tensor, attention_mask of shape [batch, seq]")
    return mask_of_tensor(tensor_at(view, entry))
