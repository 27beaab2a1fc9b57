"""Read your writes: a write says the revision that it made, and a read may ask for at least that."""

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefix_service.api.http.opaque import Revisions
from prefix_service.api.middleware.auth import WRITES
from prefix_service.catalog.records import Principal
from prefix_service.library.following import Following

_MIN: Final = b"prefix-min-revision"


class RevisionMiddleware:
    """Adds `Prefix-Revision` to the answers of writes, and lets a request with `Prefix-Min-Revision` wait until this
    process has applied the changes up to that revision."""

    def __init__(self, app: ASGIApp, following: Following, revisions: Revisions) -> None:
        self._app, self._following, self._revisions = app, following, revisions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on.

        Raises:
            InvalidRequest: the header holds no revision of the caller's tenant.
            Unavailable: this process does not know the changes up to that revision.
        """
        if (caller := scope.get("principal")) is None:
            await self._app(scope, receive, send)
            return
        for name, value in scope["headers"]:
            if name == _MIN:
                # The writer received the revision after its commit, so one look into the catalog must find it.
                await self._following.reach(self._revisions.revision(caller, value.decode("latin-1")))
        if scope["method"] not in ("GET", "HEAD"):
            send = self._with_revision(scope, caller, send)
        await self._app(scope, receive, send)

    def _with_revision(self, scope: Scope, caller: Principal, send: Send) -> Send:
        async def send_with_revision(message: Message) -> None:
            # A writer's own change is known before its answer begins, unless the catalog went away in between.
            if (
                message["type"] == "http.response.start"
                and scope.get(WRITES)
                and message["status"] < 400
                and self._following.are_known
            ):
                text = self._revisions.text(caller, self._following.revision)
                message["headers"] = [*message.get("headers", ()), (b"prefix-revision", text.encode())]
            await send(message)

        return send_with_revision
