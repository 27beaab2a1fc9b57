"""Sessions of the page: a cookie stands for a key, in calls of the page itself alone."""

import contextlib
import re
from typing import Final

from anyio import to_thread
from starlette.types import Scope

from prefix_service.api.middleware.known_keys import KnownKeys
from prefix_service.catalog.reads import read_catalog
from prefix_service.catalog.records import Principal
from prefix_service.catalog.sessions import LONGEST, Sessions
from prefix_service.errors import Forbidden, OutOfSpace, ReadOnly, StorageFailed, Unauthenticated

CSRF_HEADER: Final = "X-Prefix-CSRF"
"""A page of another site cannot send it without being asked first, and nobody answers that question here."""

_COOKIE: Final = "prefix-session"
_ID: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_ORIGIN: Final = re.compile(rb"(https?)://([^/?#]+)")
_PORT: Final = re.compile(rb":[0-9]+$")
_PORTS: Final = {b"http": b":80", b"https": b":443"}
_MOST_KNOWN: Final = 4096


class BrowserSessions:
    """From a request's cookie to the principal of the key that its session was begun with. The catalog is asked at
    every request: a session that was ended, or a key that was revoked, anywhere, counts no more.

    Ids that were not alive here before are looked up as rarely as unknown keys. Belongs to the event loop.
    """

    def __init__(self, sessions: Sessions, keys: KnownKeys) -> None:
        self._sessions, self._keys = sessions, keys
        self._alive: dict[str, None] = {}

    async def begin(self, by: Principal) -> str:
        """Begins a session of a caller, and returns its id.

        Raises:
            Forbidden: keys of scope `metrics` see nothing that the page shows.
            Unauthenticated, ReadOnly, OutOfSpace, StorageFailed: as `Sessions.begin`.
        """
        if by.scope == "metrics":
            raise Forbidden("yours is a key of scope metrics, which sees nothing of the page: sign in with another")
        session_id = await to_thread.run_sync(self._sessions.begin, by)
        self._remember(session_id)
        return session_id

    async def end(self, scope: Scope) -> None:
        """Ends the session of a request, if it has one."""
        if (session_id := _cookie(scope)) is not None:
            self._alive.pop(session_id, None)
            await to_thread.run_sync(self._sessions.end, session_id)

    async def find(self, scope: Scope, *, notes_use: bool = True) -> Principal | None:
        """Returns who asks by the cookie of a request; None if it has none. The use of a session keeps it alive unless
        `notes_use` is False.

        Raises:
            Unauthenticated: the session has ended, or the request does not come from the page itself.
            Overloaded: too many unknown ids have been looked up within a second.
            StorageFailed: the catalog does not answer.
        """
        if (session_id := _cookie(scope)) is None:
            return None
        if (reason := why_foreign(scope)) is not None:
            raise Unauthenticated(
                f"a session counts only in calls of the page itself, and {reason}: send a key as "
                "'Authorization: Bearer pfx_…'"
            )
        if session_id not in self._alive:
            self._keys.admit_stranger()
        session = await read_catalog(self._sessions.find, session_id)
        if session is None:
            self._alive.pop(session_id, None)
            raise Unauthenticated("the session has ended: sign in again")
        self._remember(session_id)
        if notes_use and session.is_use_due:
            with contextlib.suppress(OutOfSpace, StorageFailed, ReadOnly):
                await to_thread.run_sync(self._sessions.note_use, session_id)
        return session.principal

    def _remember(self, session_id: str) -> None:
        self._alive.pop(session_id, None)
        self._alive[session_id] = None
        if len(self._alive) > _MOST_KNOWN:
            del self._alive[next(iter(self._alive))]


def why_foreign(scope: Scope) -> str | None:
    """Returns why a request was not sent by a page of this very service; None if it was. Such a request has the header
    `X-Prefix-CSRF`, and the page's own Origin. Browsers leave the Origin out of a GET to their own site; a request that
    changes something must have it."""
    headers = dict(scope["headers"])
    if CSRF_HEADER.lower().encode() not in headers:
        return f"this one has no header {CSRF_HEADER}"
    if (site := headers.get(b"sec-fetch-site", b"same-origin")) != b"same-origin":
        return f"this one comes from another site (Sec-Fetch-Site: {_shown(site)})"
    origin, host = headers.get(b"origin"), headers.get(b"host", b"")
    if origin is None:
        return None if scope["method"] in ("GET", "HEAD") else "this one has no Origin"
    found = _ORIGIN.fullmatch(origin)
    if found is not None and _with_port(found[1], found[2]) == _with_port(found[1], host):
        return None
    return (
        f"this one has the Origin {_shown(origin)} and the Host {_shown(host)}, which must be the same address: a "
        "proxy has to pass on the Host that the browser sent, with its port (nginx: proxy_set_header Host $http_host)"
    )


def _with_port(scheme: bytes, host: bytes) -> bytes:
    """Returns a host in small letters, with the port of its scheme if it names none."""
    return host.lower() if _PORT.search(host) else host.lower() + _PORTS[scheme]


def _shown(value: bytes) -> str:
    return repr(value.decode("latin-1")[:100])


def session_cookie(session_id: str, scope: Scope) -> str:
    """Returns the `Set-Cookie` of a session that has begun; an empty id ends it. The page's Origin tells whether the
    browser speaks TLS, also where a proxy ends that."""
    secure = "; Secure" if dict(scope["headers"]).get(b"origin", b"").startswith(b"https:") else ""
    seconds = int(LONGEST.total_seconds()) if session_id else 0
    return f"{_COOKIE}={session_id}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}"


def _cookie(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name != b"cookie":
            continue
        for pair in value.decode("latin-1").split(";"):
            key, _, text = pair.strip().partition("=")
            if key == _COOKIE and _ID.fullmatch(text):
                found: str = text
                return found
    return None
