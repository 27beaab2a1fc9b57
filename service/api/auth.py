"""Deny by default: every route but the public ones needs a key, checked before any body is read."""

import hashlib
import time
from collections.abc import Callable
from typing import Annotated, Final

from anyio import to_thread
from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.contextvars import bind_contextvars

from service.api.paths import TenantPath
from service.api.problems import problem
from service.catalog.keys import Keyring
from service.catalog.records import Principal
from service.catalog.records import Scope as KeyScope
from service.errors import Forbidden, NotFound, PrefixServiceError, Unauthenticated
from service.prefix.references import check_name

PUBLIC: Final = frozenset({"/livez", "/readyz", "/openapi.json", "/docs", "/docs/oauth2-redirect"})
REMEMBERED_SECONDS: Final = 5.0
"""How long a verified key is not looked up again: the longest that a revoked one may still work."""

_ANYONE: Final = Principal("dev", None, "admin")


class Authenticator:
    """From an `Authorization` header to a principal. Without a keyring (dev mode) everyone is a platform admin."""

    def __init__(self, keyring: Keyring | None) -> None:
        self._keyring = keyring
        self._known: dict[bytes, tuple[Principal, float]] = {}

    async def authenticate(self, header: str | None) -> Principal:
        """Who asks.

        Raises:
            Unauthenticated: no key, or not a valid one.
        """
        if self._keyring is None:
            return _ANYONE
        scheme, _, key = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("a key is needed: send it as 'Authorization: Bearer pfx_…'")
        name = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        principal, until = self._known.get(name, (None, 0.0))
        if principal is None or time.monotonic() > until:
            self._known.pop(name, None)
            principal = await to_thread.run_sync(self._keyring.verify, key.strip())
            self._remember(name, principal)
        return principal

    def forget(self, key_id: str) -> None:
        """A key that was revoked here stops working at once."""
        self._known = {name: known for name, known in self._known.items() if known[0].key_id != key_id}

    def forget_tenant(self, tenant: str) -> None:
        """The keys of a tenant that was deleted here stop working at once."""
        self._known = {name: known for name, known in self._known.items() if known[0].tenant != tenant}

    def _remember(self, name: bytes, principal: Principal) -> None:
        now = time.monotonic()
        if len(self._known) >= 10_000:
            self._known = {name: known for name, known in self._known.items() if known[1] > now}
        self._known[name] = principal, now + REMEMBERED_SECONDS


class AuthenticationMiddleware:
    """Puts the principal into the ASGI scope, or answers 401."""

    def __init__(self, app: ASGIApp, authenticator: Callable[[], Authenticator]) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authorise on the path as it was received, never on a URL that a Host header could rewrite."""
        if scope["type"] == "http" and scope["path"] not in PUBLIC:
            try:
                header = Headers(scope=scope).get("authorization")
                principal = await self._authenticator().authenticate(header)
            except PrefixServiceError as error:
                await problem(error)(scope, receive, send)
                return
            scope["principal"], scope["tenant"] = principal, principal.tenant
            bind_contextvars(key_id=principal.key_id)
        await self._app(scope, receive, send)


def _tenant_with(scope: KeyScope) -> Callable[[Request, str], str]:
    def check(request: Request, tenant: TenantPath) -> str:
        principal = _caller(request)
        check_name("tenant", tenant)
        if not principal.may_see(tenant):
            # In the words of a missing one, so that nothing is learnt about other tenants.
            inside = request.path_params.get("ref") or request.path_params.get("name")
            raise NotFound(f"there is no {tenant}/{inside}" if inside else f"there is no tenant {tenant!r}")
        _require(principal, scope)
        request.scope["tenant"] = tenant
        return tenant

    return check


def _caller(request: Request) -> Principal:
    principal: Principal = request.scope["principal"]
    return principal


def _platform_with(scope: KeyScope) -> Callable[[Request], Principal]:
    def check(request: Request) -> Principal:
        principal = _caller(request)
        if principal.tenant is not None:
            raise Forbidden("this needs a key of the platform, and yours belongs to a tenant")
        _require(principal, scope)
        return principal

    return check


def _require(principal: Principal, scope: KeyScope) -> None:
    if not principal.has(scope):
        raise Forbidden(f"this needs a key of scope {scope}, and yours has {principal.scope}")


Reading = Annotated[str, Depends(_tenant_with("read"))]
"""The path's tenant, for a caller who may read it."""
Writing = Annotated[str, Depends(_tenant_with("write"))]
"""The path's tenant, for a caller who may change it."""
Administering = Annotated[str, Depends(_tenant_with("admin"))]
"""The path's tenant, for a caller who may manage its keys."""
Caller = Annotated[Principal, Depends(_caller)]
"""Who asks."""
PlatformReader = Annotated[Principal, Depends(_platform_with("read"))]
"""A caller with a key of the platform."""
PlatformAdmin = Annotated[Principal, Depends(_platform_with("admin"))]
"""A platform admin."""
