"""The models of the Open Inference Protocol: a model is an adapter, `<tenant>/<adapter>`, with its versions."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

import orjson
import torch
from starlette.responses import Response, StreamingResponse

from prefix_service.api.open_inference.schemas import Datatype, InputName
from prefix_service.catalog.records import Version, VersionName
from prefix_service.library.library import Library
from prefix_service.library.pages import Pages, WantedPage
from prefix_service.library.plan import PrefixRequest
from prefix_service.prefix.references import Reference, check_name, parse_reference
from prefix_service.prefix.wire.masks import InputMask
from prefix_service.registry.admission import Admission

MODEL: Final = "/models/{tenant}/{name}"
VERSION: Final = MODEL + "/versions/{version}"

JSON_LENGTH: Final = "Inference-Header-Content-Length"
"""The header field with the number of bytes of a body that are JSON; the rest are tensors."""

INPUTS: Final[dict[InputName, tuple[str, torch.dtype, tuple[int, ...]]]] = {
    "batch_size": ("INT32", torch.int32, (1,)),
    "attention_mask": ("INT64", torch.int64, (-1, -1)),
}
"""Datatype, dtype and shape of each input; -1 is any size."""

DATATYPES: Final[dict[torch.dtype, Datatype]] = {
    torch.float32: "FP32",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
}
"""The datatypes of the outputs."""

PAGE: Final = 1000
"""Versions that are read and written together in a listing, and the most that a model's metadata names."""


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
    return f"peft_{version.prefix_config.peft_type.lower()}"


def inputs_of_every_model() -> list[dict[str, Any]]:
    """Returns the inputs, which no adapter changes; each is what `TensorMetadata` describes."""
    return [{"name": name, "datatype": datatype, "shape": shape} for name, (datatype, _, shape) in INPUTS.items()]


def outputs_of(library: Library, version: Version) -> list[dict[str, Any]]:
    """Returns the outputs that an inference may ask for, with -1 for what the request decides; each is what
    `TensorMetadata` describes."""
    tensors = library.tensors(version, PrefixRequest(), InputMask.empty(1))
    extras = {"attention_mask": (-1, -1), "position_ids": (-1, -1)}
    return [
        {
            "name": tensor.name,
            "datatype": DATATYPES[tensor.dtype],
            "shape": extras.get(tensor.name, (-1, *tensor.shape[1:])),
        }
        for tensor in tensors.values()
    ]


async def json_in_turn(admission: Admission, tenant: str, make: Callable[[], dict[str, Any]]) -> Response:
    """Returns what `make` makes as JSON; both happen in a thread in the tenant's turn.

    It makes plain values: of a thousand layers they take 3 ms, and a pydantic model for each tensor 13.
    """
    text = await admission.run(tenant, lambda: orjson.dumps(make()))
    return Response(text, media_type="application/json")


async def json_list(pages: AsyncIterator[bytes], before: bytes = b"[", after: bytes = b"]") -> StreamingResponse:
    """Returns pages of objects, which are written already, as one JSON list; what the first page raises is raised
    here, before the answer begins."""
    first = await anext(pages)
    return StreamingResponse(_joined(first, pages, before, after), media_type="application/json")


async def _joined(first: bytes, others: AsyncIterator[bytes], before: bytes, after: bytes) -> AsyncIterator[bytes]:
    yield before + first
    empty = not first
    async for page in others:
        if page:
            yield (b"" if empty else b",") + page
            empty = False
    yield after


async def every_version(
    pages: Pages, tenant: str | None, adapter: str | None, shown: Callable[[VersionName], dict[str, Any]]
) -> AsyncIterator[bytes]:
    """Yields the versions of an adapter, of a tenant, or of all, as JSON objects with commas between them, in the order
    of their names and numbers; at least one page. Pages are read and written in threads, in their tenant's turn."""

    def write(version: VersionName) -> bytes:
        return orjson.dumps(shown(version))

    last: VersionName | None = None
    while True:
        page = await pages.index(tenant, adapter, WantedPage(last, PAGE, write))
        yield page.items
        last = page.last
        if last is None:
            return


def written(versions: Sequence[VersionName], shown: Callable[[VersionName], dict[str, Any]]) -> bytes:
    """Returns JSON objects with commas between them."""
    return orjson.dumps([shown(version) for version in versions])[1:-1]
