"""Bounds the requests in flight, after the key was checked and before any body is read."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from prefix_service.api.http.event_stream import EVENT_STREAM
from prefix_service.api.http.negotiation import lists
from prefix_service.api.http.paths import HEALTH, LIVE, WATCHED
from prefix_service.api.middleware.auth import PUBLIC
from prefix_service.api.middleware.rates import charged
from prefix_service.catalog.records import Principal
from prefix_service.registry.admission import Admission
from prefix_service.system.turns import ASKING


class InFlightMiddleware:
    """Counts every request, until the last byte of its answer has left, except those of health routes, and
    those that wait for changes or live numbers, which have a bound of their own.

    A request counts for the tenant that its rate is charged to. Platform admins on routes that concern no tenant's
    adapters, and scrapes of the metrics, have a few places of their own. So have the public routes, which ask for no
    key: whoever leaves their answers unread takes no place of a tenant. What a request reads and writes in the catalog
    waits in its tenant's turn; platform admins have a turn of their own.
    """

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on.

        Raises:
            Overloaded: too many requests are in flight.
        """
        if scope["path"] in HEALTH:
            await self._app(scope, receive, send)
            return
        if scope["path"] in PUBLIC:
            self._admission.begin_stranger()
            try:
                await self._app(scope, receive, send)
            finally:
                self._admission.requests.end_stranger()
            return
        tenant = charged(scope)
        ASKING.set("" if tenant is None or _is_of_admin(scope) else tenant)
        if scope["path"] == WATCHED or _is_live_stream(scope):
            await self._app(scope, receive, send)
            return
        self._admission.begin(tenant, reserved=tenant is None and _is_of_operator(scope))
        try:
            await self._app(scope, receive, send)
        finally:
            self._admission.requests.end(tenant)


def _is_live_stream(scope: Scope) -> bool:
    """Whether a request asks for a stream of live numbers, which its route counts among the watchers."""
    return LIVE.fullmatch(scope["path"]) is not None and lists(Headers(raw=scope["headers"]), EVENT_STREAM)


def _is_of_operator(scope: Scope) -> bool:
    principal: Principal | None = scope.get("principal")
    if principal is None or principal.tenant is not None:
        return False
    return scope["path"] == "/metrics" or (_is_of_admin(scope) and scope["path"] != "/v1/prefixes")


def _is_of_admin(scope: Scope) -> bool:
    principal: Principal | None = scope.get("principal")
    return principal is not None and principal.tenant is None and principal.has("admin")
