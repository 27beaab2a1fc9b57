"""Charges each request to a tenant's rate, and sends the cached answer if there is one."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefix_service.api.http.problems import problem
from prefix_service.api.middleware.answers import Answers
from prefix_service.api.middleware.rates import Allowance, RateLimits, charged


class ChargingMiddleware:
    """Answers 429 above a tenant's rate; otherwise sends a cached answer, or passes the request on.

    Every answer to a tenant with a limit has the fields `RateLimit` and `RateLimit-Policy`. A cached answer names its
    tenant, so for a tenant without a limit the path of the request is not parsed.
    """

    def __init__(self, app: ASGIApp, answers: Answers, rates: RateLimits) -> None:
        self._app = app
        self._answers, self._rates = answers, rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Charges a request, and answers it or passes it on."""
        answer = self._answers.find(scope)
        tenant = charged(scope) if answer is None else scope["principal"].tenant or answer.tenant
        if tenant is not None and not self._rates.is_unlimited(tenant):
            allowance = await self._rates.charge(tenant)
            if allowance is not None:
                send = _with_allowance(allowance, send)
                if not allowance.granted:
                    await problem(allowance.refusal(tenant))(scope, receive, send)
                    return
        if answer is None:
            await self._app(scope, receive, send)
        else:
            scope["tenant"], scope["route"] = answer.tenant, answer.route
            await answer.response(scope, receive, send)


def _with_allowance(allowance: Allowance, send: Send) -> Send:
    async def send_with_fields(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *allowance.headers]
        await send(message)

    return send_with_fields
