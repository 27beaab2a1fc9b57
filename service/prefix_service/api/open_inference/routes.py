"""The Open Inference Protocol (KServe v2, Triton's REST dialect): a model is an adapter, `<tenant>/<adapter>`."""

from collections.abc import AsyncIterator
from functools import partial
from importlib.metadata import version as version_of
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from prefix_service.api.dependencies.authority import Actor
from prefix_service.api.dependencies.bodies import declared_bytes, parsed, read_body
from prefix_service.api.dependencies.memory import computed, reserved
from prefix_service.api.http.json_objects import MOST_JSON, validated
from prefix_service.api.http.paths import NamePath, SelectorPath
from prefix_service.api.middleware.auth import Caller, ReadableTenant, WritableTenant
from prefix_service.api.open_inference.extensions import EXTENSIONS
from prefix_service.api.open_inference.models import (
    JSON_LENGTH,
    MODEL,
    PAGE,
    VERSION,
    every_version,
    inputs_of_every_model,
    json_in_turn,
    json_list,
    name_of,
    outputs_of,
    platform_of,
    resolved,
    written,
)
from prefix_service.api.open_inference.requests import memory_of_parsing, most_inflated, parse_inference
from prefix_service.api.open_inference.responses import TensorsResponse
from prefix_service.api.open_inference.schemas import (
    IndexEntry,
    IndexRequest,
    InferenceRequest,
    InferenceResponse,
    LoadRequest,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
    UnloadRequest,
)
from prefix_service.api.routes.documentation import json_body, request_headers
from prefix_service.api.state import LibraryOf, State, StateOf, state_of
from prefix_service.catalog.records import Version, VersionName
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.references import check_name
from prefix_service.registry.admission import PLATFORM

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

M = TypeVar("M", bound=BaseModel)

_REPOSITORY: Final = "/repository/models/{tenant}/{name}"

_BINARY: Final[dict[str, Any]] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_FRAMED: Final = {JSON_LENGTH.replace("-", "_"): "bytes of JSON in front of binary tensors; absent when there are none"}
_INFERENCE: Final[dict[str, Any]] = {
    "response_class": Response,
    "responses": {
        200: {
            "description": "JSON, and the tensors that were asked for as binary data behind it",
            "content": {"application/json": {"schema": InferenceResponse.model_json_schema()}, **_BINARY},
        }
    },
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": InferenceRequest.model_json_schema()}, **_BINARY},
        },
        **request_headers(dict.fromkeys(_FRAMED, "^[0-9]{1,18}$"), **_FRAMED),
    },
}


async def _held_body(request: Request) -> AsyncIterator[None]:
    """Reserves memory for a body, decompressed, or for the mask in it, until the answer has left."""
    limit = state_of(request).settings.max_request_bytes
    async with reserved(request, most_inflated(request.headers, declared_bytes(request, limit), limit)):
        yield


HeldBody = Annotated[None, Depends(_held_body)]


@router.get("")
async def server_metadata() -> ServerMetadata:
    """Name and version of this server, and the extensions that it supports."""
    return ServerMetadata(name="prefix-service", version=version_of("prefix-service"), extensions=list(EXTENSIONS))


@router.get("/health/live")
async def server_live() -> ServerLive:
    """The process answers: restart it if this fails."""
    return ServerLive()


@router.get("/health/ready")
async def server_ready(state: StateOf) -> ServerReady:
    """The next request could be answered: send the service none while this fails."""
    await state.readiness.require()
    return ServerReady()


@router.get(MODEL, response_model=ModelMetadata)
async def model_metadata(tenant: ReadableTenant, name: NamePath, state: StateOf) -> Response:
    """The inputs and outputs of a model's latest version."""
    return await _metadata(state, await resolved(state.library, tenant, name))


@router.get(VERSION, response_model=ModelMetadata)
async def version_metadata(tenant: ReadableTenant, name: NamePath, version: SelectorPath, state: StateOf) -> Response:
    """The inputs and outputs of one version."""
    return await _metadata(state, await resolved(state.library, tenant, name, version))


@router.get(f"{MODEL}/ready")
async def model_ready(tenant: ReadableTenant, name: NamePath, library: LibraryOf) -> ModelReady:
    """Whether inference can be asked for: the model is published, and loaded when it is needed."""
    return ModelReady(name=name_of(await resolved(library, tenant, name)))


@router.get(f"{VERSION}/ready")
async def version_ready(
    tenant: ReadableTenant, name: NamePath, version: SelectorPath, library: LibraryOf
) -> ModelReady:
    """Whether inference can be asked for with one version."""
    return ModelReady(name=name_of(await resolved(library, tenant, name, version)))


@router.post(f"{MODEL}/infer", **_INFERENCE)
async def infer(
    request: Request, tenant: ReadableTenant, name: NamePath, _memory: HeldBody, state: StateOf
) -> TensorsResponse:
    """`past_key_values`, masks and position ids of a model's latest version."""
    return await _inferred(request, state, await resolved(state.library, tenant, name))


@router.post(f"{VERSION}/infer", **_INFERENCE)
async def infer_version(
    request: Request, tenant: ReadableTenant, name: NamePath, version: SelectorPath, _memory: HeldBody, state: StateOf
) -> TensorsResponse:
    """`past_key_values`, masks and position ids of one version."""
    return await _inferred(request, state, await resolved(state.library, tenant, name, version))


@router.post(
    "/repository/index",
    response_class=StreamingResponse,
    responses={200: {"description": "Every version that the key may see", "model": list[IndexEntry]}},
    openapi_extra=json_body(IndexRequest, required=False),
)
async def repository_index(request: Request, caller: Caller, state: StateOf) -> StreamingResponse:
    """Every version that the caller may see, in the order of names and numbers, and whether it is in memory."""
    wanted = await _optional(request, IndexRequest)
    pages = _ready(state, caller.tenant) if wanted.ready else _all(state, caller.tenant)
    return await json_list(pages)


@router.post(f"{_REPOSITORY}/load", response_class=Response, openapi_extra=json_body(LoadRequest, required=False))
async def repository_load(
    request: Request, tenant: WritableTenant, name: NamePath, by: Actor, state: StateOf
) -> Response:
    """Load a model's latest version into memory now, and wait; whether it is pinned stays as it is."""
    wanted = await _optional(request, LoadRequest)
    if wanted.parameters:
        given = ", ".join(wanted.parameters)
        raise InvalidRequest(f"load takes no parameters, got {given:.80}: a version is what was published")
    await state.tenancy.require_authority(by)
    version = await resolved(state.library, tenant, name)
    await state.residency.pin(version, by, pinned=bool(state.residency.state(version)["pinned"]))
    return Response()


@router.post(f"{_REPOSITORY}/unload", response_class=Response, openapi_extra=json_body(UnloadRequest, required=False))
async def repository_unload(
    request: Request, tenant: WritableTenant, name: NamePath, by: Actor, state: StateOf
) -> Response:
    """Take all versions of a model out of memory; the next inference loads what it needs again."""
    await _optional(request, UnloadRequest)
    await state.tenancy.require_authority(by)
    check_name("adapter", name)
    await state.residency.unload_all(tenant, name, by)
    return Response()


async def _optional(request: Request, model: type[M]) -> M:
    """Returns a JSON body as its model, an absent one as its defaults: tritonclient names no media type, or a wrong
    one."""
    async with reserved(request, declared_bytes(request, MOST_JSON)):
        body = await read_body(request, MOST_JSON)
        return await parsed(request, body or bytearray(b"{}"), partial(validated, model))


async def _inferred(request: Request, state: State, version: Version) -> TensorsResponse:
    library, limit = state.library, state.settings.max_request_bytes
    measurement = state.inference_statistics.measure(version)
    with measurement:
        body = await read_body(request, limit)
        measurement.arrived()

        def planned() -> TensorsResponse:
            inference = parse_inference(body, request.headers, limit)
            plan = library.plan(version, inference.options, inference.mask)
            return TensorsResponse(state.admission, library, plan, inference.asked, measurement)

        memory = memory_of_parsing(request.headers, len(body), limit)
        response = await computed(request, memory, planned)
        measurement.step()
        return response


async def _metadata(state: State, version: Version) -> Response:
    numbers = await state.adapters.numbers(version.tenant, version.adapter, PAGE)

    def make() -> dict[str, Any]:
        """Returns what `ModelMetadata` describes."""
        return {
            "name": name_of(version),
            "versions": [str(number) for number in numbers],
            "platform": platform_of(version),
            "inputs": inputs_of_every_model(),
            "outputs": outputs_of(state.library, version),
        }

    return await json_in_turn(state.admission, version.tenant, make)


def _all(state: State, tenant: str | None) -> AsyncIterator[bytes]:
    def entry(version: VersionName) -> dict[str, Any]:
        return _entry(version, ready=bool(state.residency.state(version)["resident"]))

    return every_version(state.pages, tenant, None, entry)


async def _ready(state: State, tenant: str | None) -> AsyncIterator[bytes]:
    """Yields what is in memory, without a look at what is not."""
    names = state.residency.versions(tenant)
    for begin in range(0, len(names) or 1, PAGE):
        page = partial(written, names[begin : begin + PAGE], partial(_entry, ready=True))
        yield await state.admission.run(tenant or PLATFORM, page)


def _entry(version: VersionName, *, ready: bool) -> dict[str, Any]:
    state, reason = ("READY", "") if ready else ("UNAVAILABLE", "not in memory: inference loads it")
    return {"name": name_of(version), "version": str(version.number), "state": state, "reason": reason}
