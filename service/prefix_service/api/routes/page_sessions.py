"""Sessions of the page: how a person signs in and out."""

import contextlib
from typing import Final

from fastapi import APIRouter, Request, Response
from pydantic import Field

from prefix_service.api.dependencies.bodies import read_body
from prefix_service.api.http.json_objects import json_object, validated
from prefix_service.api.http.negotiation import require_media_type
from prefix_service.api.middleware.auth import require_local
from prefix_service.api.middleware.session_cookie import cookie_of, session_cookie, session_of, why_foreign
from prefix_service.api.routes.documentation import json_body, request_headers
from prefix_service.api.routes.keys import Identity, identity
from prefix_service.api.state import State, StateOf
from prefix_service.catalog.records import DEV
from prefix_service.errors import Forbidden, ReadOnly, Unauthenticated
from prefix_service.library.request_model import RequestModel

router = APIRouter(tags=["page"])

_MOST: Final = 4096  # bytes of the body that signs in
_OF_PAGE: Final = request_headers(
    X_Prefix_CSRF="any value: a page of another site cannot send it",
    Origin="the page's own, which browsers send",
)


class SignIn(RequestModel):
    """The key that a session begins with."""

    key: str = Field(max_length=200)


@router.post("/ui/session", status_code=201, openapi_extra={**json_body(SignIn), **_OF_PAGE})
async def sign_in(request: Request, response: Response, state: StateOf) -> Identity:
    """Begin a session of the page with a key. The cookie `prefix-session`, behind TLS `__Host-prefix-session`, stands
    for the key in calls with the header `X-Prefix-CSRF: 1` and the page's own `Origin`, for 12 hours at most and 1 hour
    without use. In dev mode nobody needs one."""
    _require_page(request, state)
    require_media_type(request.headers, "application/json")
    wanted = validated(SignIn, json_object(await read_body(request, _MOST)))
    response.headers["Cache-Control"] = "no-store"
    if state.settings.dev:
        require_local(request.scope)
        return await identity(state, DEV)
    header = f"Bearer {wanted.key}".encode()
    caller = state.authenticator.remembered(header) or await state.authenticator.verify(header)
    if caller.tenant is not None:
        # The path is public, so nothing before this knew whose request it is.
        await state.rates.require(caller.tenant)
    session_id = await state.page_sessions.begin(caller)
    response.headers["Set-Cookie"] = session_cookie(session_id, request.scope)
    return await identity(state, caller)


@router.get("/ui/session", openapi_extra=_OF_PAGE)
async def who_is_signed_in(request: Request, response: Response, state: StateOf) -> Identity | None:
    """The key that the page is signed in with; null without a session. In dev mode everybody on this machine is."""
    response.headers["Cache-Control"] = "no-store"
    if state.settings.dev:
        require_local(request.scope)
        return await identity(state, DEV)
    with contextlib.suppress(Unauthenticated):
        if (session_id := session_of(request.scope)) is not None:
            return await identity(state, await state.page_sessions.find(session_id))
    return None


@router.delete("/ui/session", status_code=204, openapi_extra=_OF_PAGE)
async def sign_out(request: Request, response: Response, state: StateOf) -> None:
    """End the session of the page, if there is one."""
    _require_page(request, state)
    if (session_id := cookie_of(request.scope)) is not None:
        await state.page_sessions.end(session_id)
    response.headers["Set-Cookie"] = session_cookie("", request.scope)


def _require_page(request: Request, state: State) -> None:
    if state.settings.read_only:
        raise ReadOnly("this service is read-only (--read-only): sign in at the one that writes")
    if (reason := why_foreign(request.scope)) is not None:
        raise Forbidden(f"only the page itself signs in and out, and {reason}")
