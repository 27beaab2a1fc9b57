"""Figures of a version's keys and values: norms, and how far two versions are apart."""

import hashlib
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, Field

from prefix_service.api.http.negotiation import is_current, require_json_acceptable
from prefix_service.api.http.paths import RefPath
from prefix_service.api.middleware.auth import ReadableTenant
from prefix_service.api.routes.documentation import refusals, request_headers, response_headers
from prefix_service.api.state import StateOf
from prefix_service.catalog.records import Version
from prefix_service.prefix.references import REFERENCE_PATTERN, parse_reference

router = APIRouter(tags=["adapters"], dependencies=[Depends(require_json_acceptable)])

_PATH: Final = "/v1/tenants/{tenant}/adapters/{ref}"

With = Annotated[
    str,
    Query(
        alias="with",
        description="the other version, of any adapter of the tenant: name, name@7, name@alias, …",
        json_schema_extra={"pattern": REFERENCE_PATTERN},
    ),
]

Numbers = list[list[float]]
"""A table: a list for each bin of layers."""


class Axis(BaseModel):
    """An axis of `count` positions in bins of `step` neighbours each; the last bin may have fewer."""

    count: int
    step: int


class NormTables(BaseModel):
    """Norms of keys, or of values. A cell is the root mean square of the Euclidean norms of its vectors, each of which
    belongs to one token in one head."""

    by_head: Numbers = Field(description="layers by heads")
    by_token: Numbers = Field(description="layers by virtual tokens")


class SinkLikeToken(BaseModel):
    """A virtual token whose norms are those of an attention sink in so many layers."""

    token: int
    layers: int


class SinkLike(BaseModel):
    """Virtual tokens whose norms are those of attention sinks: in a layer, the norm of the key over all heads is an
    outlier (a modified z-score above 3.5), and the norm of the value is below half the median. A hint: whether a token
    is a sink depends on the queries too."""

    by_token: list[list[int]] = Field(
        description="layers by virtual tokens: how many pairs of a layer and a sink-like token are in the cell"
    )
    tokens: list[SinkLikeToken] = Field(description="up to 32 of them, those of most layers first")


class Norms(BaseModel):
    """The norms of a version's keys and values."""

    layers: Axis
    kv_heads: Axis
    tokens: Axis
    keys: NormTables
    values: NormTables
    sink_like: SinkLike


class ComparedVersion(BaseModel):
    """One of two versions that are compared."""

    adapter: str
    version: int
    digest: str


class DifferenceTables(BaseModel):
    """Differences of keys, or of values, layers by heads: the norm of the difference over the larger norm, 0 … 2; and
    the cosine of the angle between both, -1 … 1."""

    relative: Numbers
    cosine: Numbers


class Difference(BaseModel):
    """The difference of the keys, or of the values, of a layer: as `prefix-service diff` prints it."""

    max_absolute: float
    relative: float
    cosine: float


class LayerDifference(BaseModel):
    """The differences of a layer, or of a bin of layers that begins with it."""

    layer: int
    keys: Difference
    values: Difference


class Comparison(BaseModel):
    """How far two versions are apart. `config` has the fields that differ, each with both values; null is a field that
    a config does not have."""

    first: ComparedVersion
    second: ComparedVersion
    config: dict[str, list[Any]]
    layers: Axis
    kv_heads: Axis
    keys: DifferenceTables
    values: DifferenceTables
    by_layer: list[LayerDifference]


_HEADERS: Final = response_headers(
    ETag="strong entity tag",
    Prefix_Version="the version's number",
    Prefix_Digest="the version's digest",
)


def _documented(model: type[BaseModel], description: str, unacceptable: str) -> dict[str, Any]:
    missing = {404: "There is no such adapter or version", 422: unacceptable, 507: "There is no memory for it"}
    return {
        "response_class": Response,
        "responses": {
            200: {"description": description, "model": model, "headers": _HEADERS},
            304: {"description": "What the caller has is current"},
            **refusals(missing),
        },
        "openapi_extra": request_headers(If_None_Match="an entity tag: 304 while it is current"),
    }


@router.get(f"{_PATH}/statistics", **_documented(Norms, "The norms", "The reference is malformed"))
async def get_statistics(request: Request, tenant: ReadableTenant, ref: RefPath, state: StateOf) -> Response:
    """The norms of a version's keys and values by layer and head, and by layer and virtual token, with the tokens
    whose norms are those of attention sinks. A table has at most 4,096 cells: long axes are in bins."""
    reference = parse_reference(ref)
    version = await state.library.resolve(tenant, reference)
    body = await state.version_statistics.norms(version)
    return _answer(request, version, body, immutable=reference.immutable)


@router.get(
    f"{_PATH}/compare", **_documented(Comparison, "How far they are apart", "The versions have different shapes")
)
async def compare(request: Request, tenant: ReadableTenant, ref: RefPath, other: With, state: StateOf) -> Response:
    """How far two versions of one shape are apart: relative distance and cosine similarity of keys and values by layer
    and head, and the fields of their configs that differ. The versions can be of one adapter or of two."""
    first, second = parse_reference(ref), parse_reference(other)
    versions = [await state.library.resolve(tenant, reference) for reference in (first, second)]
    body = await state.version_statistics.comparison(*versions)
    return _answer(request, versions[0], body, immutable=first.immutable and second.immutable)


def _answer(request: Request, version: Version, body: bytes, *, immutable: bool) -> Response:
    headers = {
        "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
        "Prefix-Version": str(version.number),
        "Prefix-Digest": version.digest,
        "Cache-Control": "private, max-age=31536000, immutable" if immutable else "private, no-cache",
    }
    if is_current(request.headers, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers | {"X-Content-Type-Options": "nosniff"}, media_type="application/json")
