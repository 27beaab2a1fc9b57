"""Changes as they happen: a page of them, waited for if there are none yet, or a stream of events."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema
from starlette.types import Scope

from prefix_service.api.http.event_stream import EVENT_STREAM, Events, EventStream, event
from prefix_service.api.http.negotiation import lists, require_acceptable
from prefix_service.api.http.paths import WATCHED
from prefix_service.api.http.presence import while_connected
from prefix_service.api.middleware.auth import Caller
from prefix_service.api.routes.documentation import refusals, request_headers
from prefix_service.api.routes.schemas import Moment
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.changes import SeenChanges, StoredChange
from prefix_service.catalog.records import Principal
from prefix_service.library.watching import Watcher
from prefix_service.registry.admission import PLATFORM

router = APIRouter(tags=["changes"])

_LONGEST: Final = 30.0  # seconds that an answer waits for the first change
_HEARTBEAT: Final = 15.0  # seconds between two signs of life of a stream

Since = Annotated[
    str | SkipJsonSchema[None],
    Query(
        min_length=32,
        max_length=32,
        description="a `revision` of an earlier answer, or `Prefix-Revision`; without it the answer has the present "
        "revision and no changes",
        json_schema_extra={"format": "revision"},
    ),
]


class ChangeItem(BaseModel):
    """One change. Members that its kind does not have are null."""

    revision: str
    kind: str
    tenant: str | None
    adapter: str | None = None
    alias: str | None = None
    version: int | None = None
    digest: str | None = None
    key: str | None = None
    time: Moment


class ChangesPage(BaseModel):
    """Changes, oldest first, and the revision to go on from."""

    revision: str
    items: list[ChangeItem]


@router.get(
    WATCHED,
    response_model=ChangesPage,
    openapi_extra=request_headers(
        Last_Event_ID="of a stream: the id of the last event that was received; it precedes `since`"
    ),
    responses={
        200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}},
        **refusals({410: "Some of the changes since then are no longer kept: read everything again"}),
    },
)
async def changes(request: Request, caller: Caller, state: StateOf, since: Since = None) -> Response:
    """Return the changes since a revision that the key may see: those of its tenant, or for a key of the platform those
    of all. Changes of keys and quotas need a key of scope admin. If there are none yet, the answer waits for up to 30
    seconds. With `Accept: text/event-stream` it is a stream of events, of which each has one item as JSON."""
    is_stream = lists(request.headers, EVENT_STREAM)
    if not is_stream:
        require_acceptable(request.headers, "application/json")
    given = request.headers.get("last-event-id", since) if is_stream else since
    begin = None if given is None else state.revisions.revision(caller, given)
    watching = _Watching(state, caller, request.scope)
    if is_stream:
        return EventStream(watching.begin(), partial(watching.events, begin))
    with watching.begin() as watcher:
        if begin is None:
            return await watching.page(await state.watchers.read(caller, None))
        seen = await while_connected(request.receive, watcher.next(begin, _LONGEST))
    return Response(status_code=204) if seen is None else await watching.page(seen)  # None: the client has left


class _Watching:
    """One caller that watches changes, and what it is shown of them."""

    def __init__(self, state: State, by: Principal, scope: Scope) -> None:
        self._state, self._by, self._scope = state, by, scope

    def begin(self) -> AbstractContextManager[Watcher]:
        """Counts the caller while the block runs.

        Raises:
            Overloaded: there are too many.
        """
        return self._state.watchers.begin(self._by, partial(self._state.authenticator.admit, self._scope))

    async def events(self, since: int | None, watcher: Watcher) -> Events:
        """Yields the changes after a revision as events, and the latest revision every few seconds.

        Raises:
            Unauthenticated: the key was revoked, or has ended.
            Gone: some of the changes since then are no longer kept.
            StorageFailed: the catalog cannot be read.
        """
        watchers = self._state.watchers
        seen = await watchers.read(self._by, since)
        while True:
            # A sign of life, of which 10,000 watchers get hundreds a second, needs no thread.
            yield await self._written(partial(self._events, seen)) if seen.changes else self._events(seen)
            if watchers.is_ending:
                return
            seen = await watcher.next(seen.revision, _HEARTBEAT)

    def _revision(self, revision: int) -> str:
        return self._state.revisions.text(self._by, revision)

    def _item(self, stored: StoredChange) -> ChangeItem:
        values = asdict(stored.change)
        key = values.pop("key_id", None)
        names = {"revision": self._revision(stored.revision), "kind": stored.change.kind, "time": stored.time}
        return ChangeItem.model_validate({**names, **values, "key": key})

    async def page(self, seen: SeenChanges) -> Response:
        """Returns the answer with these changes."""
        page = await self._written(partial(self._page, seen))
        return Response(page, media_type="application/json", headers={"Cache-Control": "no-store"})

    async def _written(self, write: Callable[[], bytes]) -> bytes:
        """Calls `write` in a thread: a hundred changes take milliseconds, and a thousand watchers that were away may
        come for them together."""
        return await self._state.admission.run(self._by.tenant or PLATFORM, write)

    def _page(self, seen: SeenChanges) -> bytes:
        items = [self._item(change) for change in seen.changes]
        return ChangesPage(revision=self._revision(seen.revision), items=items).model_dump_json().encode()

    def _events(self, seen: SeenChanges) -> bytes:
        events = [event(item.revision, item.model_dump_json().encode()) for item in map(self._item, seen.changes)]
        # An id alone is no event, and a browser goes on from it all the same.
        return b"".join([*events, b"id: %b\n\n" % self._revision(seen.revision).encode()])
