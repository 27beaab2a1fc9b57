"""`POST /v1/prefixes`: one batch for many adapters."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.types import Receive, Scope, Send

from prefix_service.api.dependencies.bodies import read_mask_json
from prefix_service.api.dependencies.input_masks import mask_from_json
from prefix_service.api.dependencies.memory import payer
from prefix_service.api.http.json_objects import validated
from prefix_service.api.http.negotiation import require_acceptable, require_media_type
from prefix_service.api.http.responses import RawResponse, send_chunks
from prefix_service.api.http.served import SERVED, note_load, served_together
from prefix_service.api.middleware.auth import Caller
from prefix_service.api.routes.prefixes import BINARY, MASK_SCHEMA, HeldBody
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.records import Principal, Version
from prefix_service.errors import InvalidReference, NotFound
from prefix_service.library.library import Library
from prefix_service.library.plan import MixedPlan, MixedRequest
from prefix_service.prefix.references import Reference, parse_qualified
from prefix_service.prefix.variant import MEDIA_TYPE
from prefix_service.prefix.wire.masks import InputMask

router = APIRouter(tags=["prefixes"])

_SCHEMA: Final = MixedRequest.model_json_schema()
_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {**_SCHEMA, "properties": {**_SCHEMA["properties"], "attention_mask": MASK_SCHEMA}}
            }
        },
    }
}

Asked = tuple[str, str, Reference]
"""A reference as it was written, its tenant, and the rest."""


class MixedResponse(RawResponse):
    """A planned batch for many adapters; the renderings stay pinned until the last byte left."""

    def __init__(self, library: Library, plan: MixedPlan) -> None:
        super().__init__()
        self._library, self._plan = library, plan

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer a request."""
        scope[SERVED] = served_together(planned.version for row in self._plan.rows for planned in row)
        fields = [
            (b"content-type", MEDIA_TYPE.encode()),
            (b"content-length", b"%d" % self._plan.file.content_length),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
        ]
        async with self._library.renderings(self._plan, partial(note_load, scope)) as renderings:
            await send({"type": "http.response.start", "status": 200, "headers": fields})
            await send_chunks(scope, send, _in_steps(self._plan.file.chunks(renderings)))


async def _in_steps(chunks: Iterable[bytes | memoryview]) -> AsyncIterator[bytes | memoryview]:
    """Lets other requests go on between two chunks: putting many short lines together takes milliseconds."""
    for chunk in chunks:
        yield chunk
        await asyncio.sleep(0)


@router.post(
    "/v1/prefixes",
    status_code=200,
    responses={200: {"description": "A safetensors file", "content": {MEDIA_TYPE: BINARY}}},
    response_class=MixedResponse,
    openapi_extra=_BODY,
)
async def post_prefixes(request: Request, by: Caller, _memory: HeldBody, state: StateOf) -> MixedResponse:
    """One batch for many adapters, the rows of one forward pass of a base model that they share."""
    require_acceptable(request.headers, MEDIA_TYPE)
    require_media_type(request.headers, "application/json")
    library = state.library

    def read(values: dict[str, Any]) -> tuple[MixedRequest, list[list[Asked]], InputMask | None]:
        mask = mask_from_json(values.pop("attention_mask", None))
        if isinstance(rows := values.get("rows"), list):
            library.require_few_rows(len(rows))  # first: pydantic holds Python's lock for 250 ms where there are 65,536
        wanted = validated(MixedRequest, values)
        return wanted, _parsed(wanted), mask

    wanted, rows, mask = await read_mask_json(request, read)
    await _charge(state, by, rows)
    known: dict[str, tuple[str, Version]] = {}
    for index, row in enumerate(rows):
        for asked in row:
            if asked[0] not in known:
                known[asked[0]] = await _resolved(library, by, index, asked)
    versions = [[known[ref] for ref, _, _ in row] for row in rows]
    plan = await state.admission.run(payer(request), lambda: library.plan_mixed(versions, wanted, mask))
    return MixedResponse(library, plan)


def _parsed(wanted: MixedRequest) -> list[list[Asked]]:
    rows = []
    for index, row in enumerate(wanted.rows):
        refs = row if isinstance(row, list) else [] if row is None else [row]
        try:
            rows.append([(ref, *parse_qualified(ref)) for ref in refs])
        except InvalidReference as error:
            raise InvalidReference(f"row {index}: {error}") from error
    return rows


async def _charge(state: State, by: Principal, rows: list[list[Asked]]) -> None:
    """A key of the platform charges the tenants whose adapters it asks for; a tenant's has been charged already."""
    if by.tenant is None:
        for tenant in dict.fromkeys(tenant for row in rows for _, tenant, _ in row):
            await state.rates.require(tenant)


async def _resolved(library: Library, by: Principal, index: int, asked: Asked) -> tuple[str, Version]:
    ref, tenant, reference = asked
    try:
        return ref, await library.resolve_for(by, tenant, reference)
    except NotFound as error:
        raise NotFound(f"row {index}: {error}") from error
