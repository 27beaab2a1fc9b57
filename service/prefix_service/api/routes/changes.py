"""Changes as they happen: a page of them, waited for if there are none yet, or a stream of events."""

from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema
from starlette.types import Receive, Scope, Send

from prefix_service.api.http.negotiation import lists, require_acceptable
from prefix_service.api.http.paths import WATCHED
from prefix_service.api.http.presence import while_connected
from prefix_service.api.middleware.auth import Caller
from prefix_service.api.routes.documentation import refusals, request_headers
from prefix_service.api.routes.schemas import Moment
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.changes import SeenChanges, StoredChange
from prefix_service.catalog.records import Principal
from prefix_service.errors import PrefixServiceError
from prefix_service.library.watching import Watcher

router = APIRouter(tags=["changes"])

_EVENT_STREAM: Final = "text/event-stream"
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
        200: {"content": {_EVENT_STREAM: {"schema": {"type": "string"}}}},
        **refusals({410: "Some of the changes since then are no longer kept: read everything again"}),
    },
)
async def changes(request: Request, caller: Caller, state: StateOf, since: Since = None) -> Response:
    """What changed since a revision, for the eyes of the key that asks: of its tenant, or of all for a key of the
    platform. Changes of keys and quotas need a key of scope admin. If there are none yet, the answer waits for up to 30
    seconds. With `Accept: text/event-stream` it is a stream of events, of which each has one item as JSON."""
    is_stream = lists(request.headers, _EVENT_STREAM)
    if not is_stream:
        require_acceptable(request.headers, "application/json")
    given = request.headers.get("last-event-id", since) if is_stream else since
    begin = None if given is None else state.revisions.revision(caller, given)
    watching = _Watching(state, caller, request.headers.get("authorization", ""))
    if is_stream:
        return _EventStream(watching, begin)
    with watching.begin() as watcher:
        if begin is None:
            return watching.page(await state.watchers.read(caller, None))
        seen = await while_connected(request.receive, watcher.next(begin, _LONGEST))
    return Response(status_code=204) if seen is None else watching.page(seen)  # None: the client has left


class _Watching:
    """One caller that watches changes, and what it is shown of them."""

    def __init__(self, state: State, by: Principal, authorization: str) -> None:
        self.state, self.by, self._authorization = state, by, authorization.encode("latin-1")

    def begin(self) -> AbstractContextManager[Watcher]:
        """Counts the caller while the block runs.

        Raises:
            Overloaded: there are too many.
        """
        return self.state.watchers.begin(self.by, self._admit)

    async def _admit(self) -> float:
        authenticator = self.state.authenticator
        return authenticator.ends(await authenticator.authenticate(self._authorization))

    def revision(self, revision: int) -> str:
        """Returns a revision as the caller is shown it."""
        return self.state.revisions.text(self.by, revision)

    def item(self, stored: StoredChange) -> ChangeItem:
        """Returns a change as the caller is shown it."""
        values = asdict(stored.change)
        key = values.pop("key_id", None)
        names = {"revision": self.revision(stored.revision), "kind": stored.change.kind, "time": stored.time}
        return ChangeItem.model_validate({**names, **values, "key": key})

    def page(self, seen: SeenChanges) -> Response:
        """Returns the answer with these changes."""
        page = ChangesPage(revision=self.revision(seen.revision), items=[self.item(change) for change in seen.changes])
        return Response(page.model_dump_json(), media_type="application/json", headers={"Cache-Control": "no-store"})


class _EventStream(Response):
    """Sends changes as server-sent events until the client leaves, its key ends, or the process does."""

    def __init__(self, watching: _Watching, since: int | None) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=_EVENT_STREAM)
        del self.headers["Content-Length"]
        self._watching, self._since = watching, since

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. What forbids it is raised before the answer begins."""
        with self._watching.begin() as watcher:
            seen = await self._watching.state.watchers.read(self._watching.by, self._since)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await while_connected(receive, self._send_events(watcher, seen, send))

    async def _send_events(self, watcher: Watcher, seen: SeenChanges, send: Send) -> None:
        with suppress(PrefixServiceError):  # whoever is refused here comes again, and is told why
            while True:
                events = [_event(self._watching.item(change)) for change in seen.changes]
                # An id alone is no event, and a browser goes on from it all the same.
                events.append(b"id: %b\n\n" % self._watching.revision(seen.revision).encode())
                await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
                if self._watching.state.watchers.is_ending:
                    break
                seen = await watcher.next(seen.revision, _HEARTBEAT)
        await send({"type": "http.response.body"})


def _event(item: ChangeItem) -> bytes:
    return b"id: %b\ndata: %b\n\n" % (item.revision.encode(), item.model_dump_json().encode())
