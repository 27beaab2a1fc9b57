"""The Open Inference Protocol (KServe v2, Triton's REST dialect): a model is an adapter, `<tenant>/<adapter>`."""

from collections.abc import AsyncIterator
from functools import partial
from importlib.metadata import version as version_of
from typing import Annotated, Any, Final

import orjson
from anyio import to_thread
from fastapi import APIRouter, Path, Request, Response
from starlette.responses import StreamingResponse

from service.api.auth import Caller, Reading, Writing
from service.api.bodies import json_object, read_body, validated
from service.api.documentation import json_body, request_headers
from service.api.inference_v2_requests import INPUTS, JSON_LENGTH, read_inference
from service.api.inference_v2_responses import DATATYPES, TensorsResponse
from service.api.inference_v2_schemas import (
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
    TensorMetadata,
    UnloadRequest,
)
from service.api.paths import NamePath
from service.api.state import LibraryOf, SettingsOf
from service.catalog.records import Version
from service.errors import InvalidRequest
from service.library import Library
from service.plan import PrefixRequest
from service.prefix.config import parse_config
from service.prefix.references import Reference, check_name, parse_reference

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

_MODEL: Final = "/models/{tenant}/{name}"
_VERSION: Final = _MODEL + "/versions/{version}"
_REPOSITORY: Final = "/repository/models/{tenant}/{name}"
_PAGE: Final = 1000

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
        **request_headers(**_FRAMED),
    },
}

_Selector = Annotated[str, Path(description="the version's number, or an alias, digest or latest")]


@router.get("")
async def server_metadata() -> ServerMetadata:
    """What this server is, and the extensions that it speaks."""
    extensions = ["binary_tensor_data", "model_repository", "parameters"]
    return ServerMetadata(name="prefix-service", version=version_of("prefix-service"), extensions=extensions)


@router.get("/health/live")
async def server_live() -> ServerLive:
    """The process answers: restart it if this fails."""
    return ServerLive()


@router.get("/health/ready")
async def server_ready(library: LibraryOf) -> ServerReady:
    """The service can do its work: send it no requests while this fails."""
    await to_thread.run_sync(library.catalog.check)
    return ServerReady()


@router.get(_MODEL)
async def model_metadata(tenant: Reading, name: NamePath, library: LibraryOf) -> ModelMetadata:
    """The inputs and outputs of a model's latest version."""
    return await _metadata(library, await _resolved(library, tenant, name))


@router.get(_VERSION)
async def version_metadata(tenant: Reading, name: NamePath, version: _Selector, library: LibraryOf) -> ModelMetadata:
    """The inputs and outputs of one version."""
    return await _metadata(library, await _resolved(library, tenant, name, version))


@router.get(f"{_MODEL}/ready")
async def model_ready(tenant: Reading, name: NamePath, library: LibraryOf) -> ModelReady:
    """Whether inference may be asked for: the model is published, and loaded when it is needed."""
    return ModelReady(name=_name(await _resolved(library, tenant, name)))


@router.get(f"{_VERSION}/ready")
async def version_ready(tenant: Reading, name: NamePath, version: _Selector, library: LibraryOf) -> ModelReady:
    """The same of one version."""
    return ModelReady(name=_name(await _resolved(library, tenant, name, version)))


@router.post(f"{_MODEL}/infer", **_INFERENCE)
async def infer(
    request: Request, tenant: Reading, name: NamePath, library: LibraryOf, settings: SettingsOf
) -> TensorsResponse:
    """`past_key_values`, masks and position ids of a model's latest version."""
    version = await _resolved(library, tenant, name)
    return await _inferred(request, library, version, settings.max_request_bytes)


@router.post(f"{_VERSION}/infer", **_INFERENCE)
async def infer_version(
    request: Request, tenant: Reading, name: NamePath, version: _Selector, library: LibraryOf, settings: SettingsOf
) -> TensorsResponse:
    """The same of one version."""
    found = await _resolved(library, tenant, name, version)
    return await _inferred(request, library, found, settings.max_request_bytes)


@router.post(
    "/repository/index",
    response_class=StreamingResponse,
    responses={200: {"description": "Every version that the key may see", "model": list[IndexEntry]}},
    openapi_extra=json_body(IndexRequest, required=False),
)
async def repository_index(
    request: Request, caller: Caller, library: LibraryOf, settings: SettingsOf
) -> StreamingResponse:
    """Every version that the caller may see, in the order of publishing, and whether it is in memory."""
    wanted = validated(IndexRequest, await _optional_json(request, settings.max_request_bytes))
    pages = _pages(library, caller.tenant, only_ready=wanted.ready)
    first = await anext(pages)  # what fails, fails before the answer begins
    return StreamingResponse(_listed(first, pages), media_type="application/json")


@router.post(f"{_REPOSITORY}/load", response_class=Response, openapi_extra=json_body(LoadRequest, required=False))
async def repository_load(
    request: Request, tenant: Writing, name: NamePath, by: Caller, library: LibraryOf, settings: SettingsOf
) -> Response:
    """Load a model's latest version into memory now, and wait; whether it is pinned stays as it is."""
    wanted = validated(LoadRequest, await _optional_json(request, settings.max_request_bytes))
    if wanted.parameters:
        given = ", ".join(wanted.parameters)
        raise InvalidRequest(f"load takes no parameters, got {given:.80}: a version is what was published")
    version = await _resolved(library, tenant, name)
    await library.pin(version, by, pinned=bool(library.residency(version)["pinned"]))
    return Response()


@router.post(f"{_REPOSITORY}/unload", response_class=Response, openapi_extra=json_body(UnloadRequest, required=False))
async def repository_unload(
    request: Request, tenant: Writing, name: NamePath, by: Caller, library: LibraryOf, settings: SettingsOf
) -> Response:
    """Take all versions of a model out of memory; the next inference loads what it needs again."""
    validated(UnloadRequest, await _optional_json(request, settings.max_request_bytes))
    check_name("adapter", name)
    latest, *others = await to_thread.run_sync(library.catalog.versions_of, tenant, name)
    for version in (latest, *(other for other in others if library.residency(other)["resident"])):
        await library.unload(version, by)
    return Response()


async def _optional_json(request: Request, limit: int) -> dict[str, Any]:
    """tritonclient names no media type, or a wrong one."""
    body = bytes(await read_body(request, limit))
    return await to_thread.run_sync(json_object, body) if body else {}


async def _resolved(library: Library, tenant: str, name: str, selector: str | None = None) -> Version:
    check_name("adapter", name)
    reference = Reference(name) if selector is None else parse_reference(f"{name}@{selector}")
    return await library.resolve(tenant, reference)


async def _inferred(request: Request, library: Library, version: Version, limit: int) -> TensorsResponse:
    inference = await read_inference(request, limit)
    plan = await to_thread.run_sync(library.plan, version, inference.options, inference.mask)
    return TensorsResponse(library, plan, inference.asked)


async def _metadata(library: Library, version: Version) -> ModelMetadata:
    versions = await to_thread.run_sync(library.catalog.versions_of, version.tenant, version.adapter)
    config = parse_config(version.config)
    outputs = [TensorMetadata(name="attention_mask", datatype="INT64", shape=[-1, -1])]
    if config.num_transformer_submodules == 1:
        outputs.append(TensorMetadata(name="position_ids", datatype="INT64", shape=[-1, -1]))
    for tensor in library.plan(version, PrefixRequest()).message.tensors.values():
        if tensor.name != "attention_mask":
            shape = [-1, *tensor.shape[1:]]
            outputs.append(TensorMetadata(name=tensor.name, datatype=DATATYPES[tensor.dtype], shape=shape))
    return ModelMetadata(
        name=_name(version),
        versions=[str(one.number) for one in reversed(versions)],
        platform=f"peft_{config.peft_type.lower()}",
        inputs=[
            TensorMetadata(name=name, datatype=datatype, shape=list(shape))
            for name, (datatype, _, shape) in INPUTS.items()
        ],
        outputs=outputs,
    )


async def _pages(library: Library, tenant: str | None, *, only_ready: bool) -> AsyncIterator[list[IndexEntry]]:
    after = 0
    while True:
        found = await to_thread.run_sync(partial(library.catalog.index, tenant, after=after, limit=_PAGE))
        entries = []
        for one in found:
            ready = bool(library.residency(one)["resident"])
            if ready or not only_ready:
                state, reason = ("READY", "") if ready else ("UNAVAILABLE", "not in memory: inference loads it")
                name, number = f"{one.tenant}/{one.adapter}", str(one.number)
                entries.append(IndexEntry(name=name, version=number, state=state, reason=reason))
        yield entries
        if len(found) < _PAGE:
            return
        after = found[-1].id


async def _listed(first: list[IndexEntry], others: AsyncIterator[list[IndexEntry]]) -> AsyncIterator[bytes]:
    yield b"[" + _joined(first)
    empty = not first
    async for page in others:
        if page:
            yield (b"" if empty else b",") + _joined(page)
            empty = False
    yield b"]"


def _joined(entries: list[IndexEntry]) -> bytes:
    return orjson.dumps([entry.model_dump() for entry in entries])[1:-1]


def _name(version: Version) -> str:
    return f"{version.tenant}/{version.adapter}"
