"""Authentication: denies by default. Every route except the public ones needs a key, checked before a body is read."""

import math
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Final

from fastapi import Depends, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from prefix_service.api.http.page_files import PAGE_FILES
from prefix_service.api.http.paths import HEALTH, REFERENCE_FILES, TenantPath
from prefix_service.api.middleware.session_cookie import session_of
from prefix_service.catalog.records import DEV, Principal
from prefix_service.catalog.records import Scope as KeyScope
from prefix_service.errors import Forbidden, NotFound, ReadOnly, Unauthenticated
from prefix_service.library.known_keys import KnownKeys
from prefix_service.library.page_sessions import PageSessions
from prefix_service.logs import request_context
from prefix_service.prefix.references import check_name

_OF_METRICS_KEYS: Final = frozenset({"/metrics", "/v1/whoami"})
"""The routes that a key of scope `metrics` may use."""
WRITES: Final = "writes"
"""In the scope of a request that needs a key of scope `write` or `admin`, and changes something."""
PUBLIC: Final = HEALTH | {"/", "/openapi.json", "/ui/session", *REFERENCE_FILES, *PAGE_FILES}
_LOCAL: Final = rb"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?"
_LOCAL_HOST: Final = re.compile(_LOCAL, re.IGNORECASE)
_LOCAL_ORIGIN: Final = re.compile(rb"https?://" + _LOCAL)


class Authenticator:
    """Turns the key or the browser session of a request into a principal. Without keys (dev mode) every caller is a
    platform admin."""

    def __init__(self, keys: KnownKeys | None, sessions: PageSessions) -> None:
        self._keys, self._sessions = keys, sessions

    def remembered(self, header: bytes) -> Principal | None:
        """Returns the caller's principal, if its key has been verified before and is still valid; else None."""
        return DEV if self._keys is None else self._keys.recall(header)

    async def authenticate(self, scope: Scope, *, notes_use: bool = True) -> Principal:
        """Returns the caller's principal: by the `Authorization` header of a request, or without one by its session,
        whose use is noted unless `notes_use` is False.

        Raises:
            Unauthenticated: there is no key and no session, or an invalid one.
            Overloaded, StorageFailed: this process does not know the key or the session, and cannot look it up now.
        """
        header = _header(scope, b"authorization")
        if (known := self.remembered(header)) is not None:
            return known
        if not header and (session_id := session_of(scope)) is not None:
            return await self._sessions.find(session_id, notes_use=notes_use)
        return await self.verify(header)

    async def verify(self, header: bytes) -> Principal:
        """Returns the principal of the key in the value of an `Authorization` header; the value is empty if there is
        none.

        Raises:
            Unauthenticated: there is no key, or an invalid one.
            Overloaded, StorageFailed: this process does not know the key, and cannot look it up now.
        """
        scheme, _, key = header.decode("latin-1").partition(" ")
        if self._keys is None or scheme.lower() != "bearer" or not key:
            raise Unauthenticated("a key is needed: send it as 'Authorization: Bearer pfx_…'")
        return await self._keys.verify(header, key.strip())

    async def admit(self, scope: Scope) -> float:
        """Checks again the key or the session of a request that goes on, and returns the moment of `time.monotonic`
        when its key ends. That a request goes on is no use of a session.

        Raises:
            Unauthenticated, Overloaded, StorageFailed: as `authenticate`.
        """
        caller = await self.authenticate(scope, notes_use=False)
        return math.inf if self._keys is None else self._keys.ends(caller.key_id)


class AuthenticationMiddleware:
    """Puts the principal into the ASGI scope, or raises Unauthenticated."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authenticates by the path as it was received, never by a URL that a Host header could rewrite.

        Raises:
            Unauthenticated: there is no key, or an invalid one.
            Forbidden: in dev mode, a web page of another site asks; or the key's scope does not include the path.
            Overloaded, StorageFailed: this process does not know the key, and cannot look it up now.
        """
        if scope["path"] not in PUBLIC:
            remembered = self._authenticator.remembered(_header(scope, b"authorization"))
            principal = remembered or await self._authenticator.authenticate(scope)
            if principal is DEV:
                require_local(scope)
            scope["principal"], scope["tenant"] = principal, principal.tenant
            request_context.get()["key_id"] = principal.key_id
            # Checked here, since cached answers and routes for any key follow.
            if principal.scope == "metrics" and scope["path"] not in _OF_METRICS_KEYS:
                raise Forbidden("yours is a key of scope metrics, for GET /metrics and GET /v1/whoami alone")
        await self._app(scope, receive, send)


def _header(scope: Scope, wanted: bytes) -> bytes:
    for name, value in scope["headers"]:
        if name == wanted:
            found: bytes = value
            return found
    return b""


def require_local(scope: Scope) -> None:
    """Refuses requests of a web page that a browser on this machine has opened: without keys, it could read and change
    everything (DNS rebinding: the page's own name resolves to 127.0.0.1; RFC 6454, section 7; W3C Fetch Metadata).

    A browser cannot reach a Unix socket, so its callers may send any host.

    Raises:
        Forbidden: the host, the origin or the site is not of this machine.
    """
    host, origin, site = (_header(scope, name) for name in (b"host", b"origin", b"sec-fetch-site"))
    if scope["client"] is not None and not _LOCAL_HOST.fullmatch(host):
        raise Forbidden(
            f"--dev answers to the hosts localhost, 127.0.0.1 and [::1] alone, not to {_quoted(host)}: ask for one of "
            "them, or serve with keys"
        )
    if origin and not _LOCAL_ORIGIN.fullmatch(origin):
        raise Forbidden(f"--dev serves this machine alone, and a web page of {_quoted(origin)} asks")
    if site not in (b"", b"same-origin", b"none"):
        raise Forbidden(f"--dev serves this machine alone, and a web page of another site asks ({_quoted(site)})")


def _quoted(value: bytes) -> str:
    return repr(value.decode("latin-1")[:100])


# FastAPI calls a dependency that is no coroutine in a thread, however little it does.


def _tenant_with(scope: KeyScope) -> Callable[[Request, str], Awaitable[str]]:
    async def check(request: Request, tenant: TenantPath) -> str:
        principal = await _caller(request)
        check_name("tenant", tenant)
        if not principal.may_see(tenant):
            # The message is that of a missing one, so that a caller learns nothing about other tenants.
            inside = request.path_params.get("ref") or request.path_params.get("name")
            raise NotFound(f"there is no {tenant}/{inside}" if inside else f"there is no tenant {tenant!r}")
        _require(principal, scope)
        _require_writable(request, scope)
        request.scope["tenant"] = tenant
        return tenant

    return check


async def _caller(request: Request) -> Principal:
    principal: Principal = request.scope["principal"]
    return principal


def _platform_with(scope: KeyScope) -> Callable[[Request], Awaitable[Principal]]:
    async def check(request: Request) -> Principal:
        principal = await _caller(request)
        if principal.tenant is not None:
            raise Forbidden("this needs a key of the platform, and yours belongs to a tenant")
        _require(principal, scope)
        _require_writable(request, scope)
        return principal

    return check


def _require_writable(request: Request, scope: KeyScope) -> None:
    """Refuses a change on a read-only service. A request is a change if it needs more than `read` and is not GET or
    HEAD.

    Raises:
        ReadOnly: the service is read-only.
    """
    if scope not in ("write", "admin") or request.method in ("GET", "HEAD"):
        return
    request.scope[WRITES] = True
    if request.app.state.prefix_service.settings.read_only:
        raise ReadOnly("this service is read-only (--read-only): send changes to the one that writes")


def _require(principal: Principal, scope: KeyScope) -> None:
    if not principal.has(scope):
        raise Forbidden(f"this needs a key of scope {scope}, and yours has {principal.scope}")


ReadableTenant = Annotated[str, Depends(_tenant_with("read"))]
"""The path's tenant, which the caller may read."""
WritableTenant = Annotated[str, Depends(_tenant_with("write"))]
"""The path's tenant, which the caller may change."""
AdministeredTenant = Annotated[str, Depends(_tenant_with("admin"))]
"""The path's tenant, whose keys the caller may manage."""
Caller = Annotated[Principal, Depends(_caller)]
"""The caller's principal."""
MetricsReader = Annotated[Principal, Depends(_platform_with("metrics"))]
"""The principal of a caller with a key of the platform, of any scope."""
PlatformReader = Annotated[Principal, Depends(_platform_with("read"))]
"""The principal of a caller with a key of the platform that may read."""
PlatformAdmin = Annotated[Principal, Depends(_platform_with("admin"))]
"""The principal of a platform admin."""
