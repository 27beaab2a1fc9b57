"""Deny by default: every route but the public ones needs a key, checked before any body is read."""

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Final

from anyio import to_thread
from fastapi import Depends, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.paths import HEALTH, TenantPath
from service.catalog.keys import Keyring
from service.catalog.records import AuditEntry, Principal
from service.catalog.records import Scope as KeyScope
from service.errors import Forbidden, NotFound, ReadOnly, Unauthenticated
from service.logs import about
from service.prefix.references import check_name

PUBLIC: Final = HEALTH | {"/openapi.json", "/docs", "/docs/oauth2-redirect"}
REMEMBERED_SECONDS: Final = 5.0
"""How long a verified key is not looked up again: the longest that a revoked one may still work."""

_ANYONE: Final = Principal("dev", None, "admin")
_OF_THIS_MACHINE: Final = re.compile(rb"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")


class Authenticator:
    """From an `Authorization` header to a principal. Without a keyring (dev mode) everyone is a platform admin."""

    def __init__(self, keyring: Keyring | None) -> None:
        self._keyring = keyring
        self._known: dict[bytes, tuple[Principal, float]] = {}
        self._heard = 0

    def remembered(self, header: bytes) -> Principal | None:
        """Who asks, if that was verified lately."""
        if self._keyring is None:
            return _ANYONE
        principal, until = self._known.get(hashlib.sha256(header).digest(), (None, 0.0))
        return principal if time.monotonic() < until else None

    async def authenticate(self, header: bytes) -> Principal:
        """Who asks, by the value of an `Authorization` header; empty for none.

        Raises:
            Unauthenticated: no key, or not a valid one.
        """
        if (known := self.remembered(header)) is not None:
            return known
        scheme, _, key = header.decode("latin-1").partition(" ")
        if self._keyring is None or scheme.lower() != "bearer" or not key:
            raise Unauthenticated("a key is needed: send it as 'Authorization: Bearer pfx_…'")
        heard = self._heard
        principal = await to_thread.run_sync(self._keyring.verify, key.strip())
        if heard == self._heard:  # else it may have been revoked since it was read
            self._remember(hashlib.sha256(header).digest(), principal)
        return principal

    def hear(self, changes: Sequence[AuditEntry]) -> None:
        """Keys that were revoked, or whose tenant was deleted, stop working now."""
        revoked = {change.target for change in changes if change.action == "key.revoked"}
        gone = {change.target for change in changes if change.action == "tenant.deleted"}
        if revoked or gone:
            self._heard += 1
            self._known = {
                name: known
                for name, known in self._known.items()
                if known[0].key_id not in revoked and known[0].tenant not in gone
            }

    def _remember(self, name: bytes, principal: Principal) -> None:
        now = time.monotonic()
        if len(self._known) >= 10_000:
            self._known = {name: known for name, known in self._known.items() if known[1] > now}
        self._known[name] = principal, now + REMEMBERED_SECONDS


class AuthenticationMiddleware:
    """Puts the principal into the ASGI scope, or raises Unauthenticated."""

    def __init__(self, app: ASGIApp, authenticator: Callable[[], Authenticator]) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authorise on the path as it was received, never on a URL that a Host header could rewrite."""
        if scope["path"] not in PUBLIC:
            authenticator, header = self._authenticator(), _header(scope, b"authorization")
            principal = authenticator.remembered(header) or await authenticator.authenticate(header)
            if principal is _ANYONE:
                _refuse_other_sites(_header(scope, b"origin"))
            scope["principal"], scope["tenant"] = principal, principal.tenant
            about.get()["key_id"] = principal.key_id
        await self._app(scope, receive, send)


def _header(scope: Scope, wanted: bytes) -> bytes:
    for name, value in scope["headers"]:
        if name == wanted:
            found: bytes = value
            return found
    return b""


def _refuse_other_sites(origin: bytes) -> None:
    """Without keys a web page, opened on this machine, could change things for its reader (RFC 6454, section 7)."""
    if origin and not _OF_THIS_MACHINE.fullmatch(origin):
        raise Forbidden(f"--dev serves this machine alone, and a web page of {origin.decode('latin-1')!r:.100} asks")


def _tenant_with(scope: KeyScope) -> Callable[[Request, str], str]:
    def check(request: Request, tenant: TenantPath) -> str:
        principal = _caller(request)
        check_name("tenant", tenant)
        if not principal.may_see(tenant):
            # In the words of a missing one, so that nothing is learnt about other tenants.
            inside = request.path_params.get("ref") or request.path_params.get("name")
            raise NotFound(f"there is no {tenant}/{inside}" if inside else f"there is no tenant {tenant!r}")
        _require(principal, scope)
        _require_writable(request, scope)
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
        _require_writable(request, scope)
        return principal

    return check


def _require_writable(request: Request, scope: KeyScope) -> None:
    """What needs more than `read`, and does more than look, changes something."""
    if (
        scope != "read"
        and request.method not in ("GET", "HEAD")
        and request.app.state.prefix_service.settings.read_only
    ):
        raise ReadOnly("this service is read-only (--read-only): send changes to the one that writes")


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
