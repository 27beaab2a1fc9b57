"""Live numbers of the last hour: as one document, or as a stream that goes on."""

from datetime import UTC
from functools import partial
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from prefix_service.api.http.event_stream import EVENT_STREAM, Events, EventStream, event
from prefix_service.api.http.negotiation import lists, require_acceptable
from prefix_service.api.middleware.auth import PlatformReader, ReadableTenant
from prefix_service.api.state import State, StateOf
from prefix_service.library.watching import Watcher
from prefix_service.registry.admission import PLATFORM

router = APIRouter(tags=["metrics"])

Since = Annotated[int, Query(ge=0, lt=1 << 40, description="seconds since 1970: numbers from this moment on")]
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "The last hour; with `Accept: text/event-stream` it goes on", "content": {EVENT_STREAM: {}}}
}


class LiveTier(BaseModel):
    """A tier of memory, of all workers: bytes at the end of each slot, and what happened in it."""

    name: str
    budget: list[int]
    used: list[int]
    pinned: list[int]
    entries: list[int]
    hits: list[int]
    misses: list[int]
    evictions: list[int]
    failures: list[int]


class LiveTenant(BaseModel):
    """The requests of a tenant in all slots of the document."""

    tenant: str
    requests: int
    bytes: int


class LiveNumbers(BaseModel):
    """Numbers of the last hour, of all worker processes of one replica, in slots of `seconds`; each list has a number
    for every slot. `p50` and `p99` are seconds from a request's head to its last byte, null without requests. A
    tenant's document has no tiers, no other tenants, and no limit, which is the process's."""

    replica: str = Field(description="the replica that answered, as in `GET /v1/replicas`: others count their own")
    seconds: float
    at: list[int] = Field(description="when each slot began: seconds since 1970")
    requests: list[int]
    bytes: list[int]
    cold_loads: list[int]
    p50: list[float | None]
    p99: list[float | None]
    problems: dict[str, list[int]] = Field(description="refused and failed requests by the code of their problem")
    in_flight: list[int]
    in_flight_limit: int | None
    tiers: list[LiveTier]
    tenants: list[LiveTenant]


@router.get("/v1/live", response_model=LiveNumbers, responses=_STREAM)
async def live_numbers(request: Request, _caller: PlatformReader, state: StateOf, since: Since = 0) -> Response:
    """The service's numbers of the last hour, up to the last few seconds. With `Accept: text/event-stream` each event
    is such a document: the first has all of it, the following what is new."""
    return await _answer(request, state, None, since)


@router.get("/v1/tenants/{tenant}/live", response_model=LiveNumbers, responses=_STREAM)
async def tenant_live_numbers(request: Request, tenant: ReadableTenant, state: StateOf, since: Since = 0) -> Response:
    """A tenant's numbers of the last hour, as those of the service."""
    return await _answer(request, state, tenant, since)


async def _answer(request: Request, state: State, tenant: str | None, since: float) -> Response:
    if tenant is not None:
        # What an earlier tenant of this name did is not shown.
        created = (await state.tenancy.tenant(tenant)).created
        since = max(since, created.replace(tzinfo=UTC).timestamp())
    if lists(request.headers, EVENT_STREAM):
        watching = state.watchers.begin(request.scope["principal"], partial(state.authenticator.admit, request.scope))
        return EventStream(watching, partial(_events, state, tenant, since))
    require_acceptable(request.headers, "application/json")
    return Response(await _document(state, tenant, since), media_type="application/json")


async def _events(state: State, tenant: str | None, since: float, watcher: Watcher) -> Events:
    seen = -1
    while not state.watchers.is_ending:
        if (last := state.live.last_slot()) > seen:
            numbers = await _document(state, tenant, since)
            seen, since = last, (last + 1) * state.live.seconds
            yield event(str(int(since)), numbers)
        await watcher.wait(state.live.seconds_until(seen + 1))


async def _document(state: State, tenant: str | None, since: float) -> bytes:
    read = state.live.read(tenant, since)
    whose = {"replica": state.fleet.replica}
    return await state.admission.run(tenant or PLATFORM, lambda: orjson.dumps(whose | read()))
