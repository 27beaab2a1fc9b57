"""Requests in flight: refused above a limit, after the key was checked and before any body is read."""

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from prefix_service.api.http.event_stream import MEDIA_TYPE
from prefix_service.api.http.negotiation import lists
from prefix_service.api.http.paths import HEALTH, LIVE
from prefix_service.api.middleware.auth import PUBLIC
from prefix_service.api.middleware.rates import charged
from prefix_service.catalog.records import Principal
from prefix_service.registry.admission import Admission


class InFlightMiddleware:
    """Counts every request but those of the health routes and streams, until the last byte of its answer has left.

    A request counts for the tenant that its rate is charged to. Platform admins on routes that concern no tenant's
    adapters, and scrapes of the metrics, have a few places of their own. So have the public routes, which ask for no
    key: whoever leaves their answers unread takes no place of a tenant.
    """

    def __init__(self, app: ASGIApp, admission: Callable[[], Admission]) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on.

        Raises:
            Overloaded: too many requests are in flight.
        """
        if scope["path"] in HEALTH or _is_stream(scope):
            await self._app(scope, receive, send)
            return
        admission = self._admission()
        if scope["path"] in PUBLIC:
            admission.begin_stranger()
            try:
                await self._app(scope, receive, send)
            finally:
                admission.requests.end_stranger()
            return
        tenant = charged(scope)
        admission.begin(tenant, reserved=tenant is None and _is_of_operator(scope))
        try:
            await self._app(scope, receive, send)
        finally:
            admission.requests.end(tenant)


def _is_stream(scope: Scope) -> bool:
    """Whether a request asks for a stream, which its route counts among the watchers."""
    return LIVE.fullmatch(scope["path"]) is not None and lists(Headers(raw=scope["headers"]), MEDIA_TYPE)


def _is_of_operator(scope: Scope) -> bool:
    principal: Principal | None = scope.get("principal")
    if principal is None or principal.tenant is not None:
        return False
    return scope["path"] == "/metrics" or (principal.has("admin") and scope["path"] != "/v1/prefixes")
