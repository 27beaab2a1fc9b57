"""The timeline of a version, readable by the tenant's admin: changes and reads together."""

from fastapi import APIRouter, Response
from pydantic import BaseModel

from prefix_service.api.http.paths import RefPath
from prefix_service.api.middleware.auth import AdministeredTenant, Caller
from prefix_service.api.routes.audit import AuditItem
from prefix_service.api.routes.schemas import Moment
from prefix_service.api.state import StateOf
from prefix_service.library.timeline import Event, EventKind
from prefix_service.prefix.references import parse_reference

router = APIRouter(tags=["adapters"])


class TimelineEvent(BaseModel):
    """Something that happened to a version. A read is known by its hour, and `at` is the beginning of that hour.
    `alias` is the alias that began (`alias-moved-here`) or ceased (`alias-moved-away`) to name the version, and
    `change` the entry of the audit, or null."""

    at: Moment
    kind: EventKind
    alias: str | None
    change: AuditItem | None


class Timeline(BaseModel):
    """The events of a version, oldest first: its latest 500 changes among the latest 100,000 of its tenant, and its
    first and last read of the last 90 days."""

    items: list[TimelineEvent]


@router.get("/v1/tenants/{tenant}/adapters/{ref}/timeline", response_model=Timeline)
async def timeline(tenant: AdministeredTenant, caller: Caller, ref: RefPath, state: StateOf) -> Response:
    """Return what happened to a version, from its publication to its last read. Reads are recorded within a minute."""
    version = await state.library.resolve(tenant, parse_reference(ref))

    def item(event: Event) -> TimelineEvent:
        change = None if event.change is None else AuditItem.of(event.change, state.audit_ids, caller)
        return TimelineEvent(at=event.at, kind=event.kind, alias=event.alias, change=change)

    def write(events: list[Event]) -> Response:
        return Response(Timeline(items=[*map(item, events)]).model_dump_json(), media_type="application/json")

    return await state.timelines.of(version, write)
