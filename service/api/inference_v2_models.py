"""The models of the Open Inference Protocol: a model is an adapter, `<tenant>/<adapter>`, with its versions."""

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any, Final

import orjson
from anyio import to_thread
from fastapi import Path
from starlette.responses import StreamingResponse

from service.api.inference_v2_requests import INPUTS
from service.api.inference_v2_responses import DATATYPES
from service.api.inference_v2_schemas import TensorMetadata
from service.catalog.records import Version, VersionName
from service.library import Library
from service.plan import PrefixRequest
from service.prefix.config import parse_config
from service.prefix.extras import InputMask
from service.prefix.references import Reference, check_name, parse_reference

MODEL: Final = "/models/{tenant}/{name}"
VERSION: Final = MODEL + "/versions/{version}"

PAGE: Final = 1000
"""Versions that are read and written together in a listing."""

Selector = Annotated[str, Path(description="the version's number, or an alias, digest or latest")]


async def resolved(library: Library, tenant: str, name: str, selector: str | None = None) -> Version:
    """Returns the version that a path names; without a selector, the latest.

    Raises:
        InvalidReference: the name or the selector is malformed.
        NotFound: there is none.
    """
    check_name("adapter", name)
    reference = Reference(name) if selector is None else parse_reference(f"{name}@{selector}")
    return await library.resolve(tenant, reference)


def name_of(version: Version | VersionName) -> str:
    """Returns the name of a version's model."""
    return f"{version.tenant}/{version.adapter}"


def platform_of(version: Version) -> str:
    """Returns the kind of model, which is the PEFT type."""
    return f"peft_{parse_config(version.config).peft_type.lower()}"


def inputs_of_every_model() -> list[TensorMetadata]:
    """Returns the inputs, which no adapter changes."""
    return [
        TensorMetadata(name=name, datatype=datatype, shape=list(shape)) for name, (datatype, _, shape) in INPUTS.items()
    ]


def outputs_of(library: Library, version: Version) -> list[TensorMetadata]:
    """Returns the outputs that an inference may ask for, with -1 for what the request decides."""
    tensors = library.plan(version, PrefixRequest(), InputMask.empty(1)).message.tensors
    extras = {"attention_mask": [-1, -1], "position_ids": [-1, -1]}
    return [
        TensorMetadata(
            name=tensor.name,
            datatype=DATATYPES[tensor.dtype],
            shape=extras.get(tensor.name, [-1, *tensor.shape[1:]]),
        )
        for tensor in tensors.values()
    ]


async def json_list(
    pages: AsyncIterator[Sequence[Any]], before: bytes = b"[", after: bytes = b"]"
) -> StreamingResponse:
    """Returns pages of objects as one JSON list, written page by page; what the first page raises is raised here,
    before the answer begins."""
    first = await anext(pages)
    return StreamingResponse(_written(first, pages, before, after), media_type="application/json")


async def _written(
    first: Sequence[Any], others: AsyncIterator[Sequence[Any]], before: bytes, after: bytes
) -> AsyncIterator[bytes]:
    yield before + orjson.dumps(first)[1:-1]
    empty = not first
    async for page in others:
        if page:
            yield (b"" if empty else b",") + orjson.dumps(page)[1:-1]
            empty = False
    yield after


async def every_version(
    library: Library, tenant: str | None, adapter: str | None = None
) -> AsyncIterator[list[VersionName]]:
    """Yields the versions of an adapter, of a tenant, or of all, page by page in the order of publishing; at least one
    page."""
    after = 0
    while True:
        found = await to_thread.run_sync(partial(library.catalog.index, tenant, adapter, after=after, limit=PAGE))
        yield found
        if len(found) < PAGE:
            return
        after = found[-1].id
