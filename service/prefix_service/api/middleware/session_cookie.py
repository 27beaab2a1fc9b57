"""The cookie of a session of the page, which stands for a key in calls of the page itself alone."""

import re
from typing import Final

from starlette.types import Scope

from prefix_service.errors import Unauthenticated
from prefix_service.library.page_sessions import LONGEST

CSRF_HEADER: Final = "X-Prefix-CSRF"
"""A page of another site cannot send it without being asked first, and nobody answers that question here."""

_COOKIE: Final = "prefix-session"
_SECURE_COOKIE: Final = f"__Host-{_COOKIE}"
"""The cookie behind TLS. Browsers take this prefix from the host itself alone, over TLS, so neither a neighbouring
subdomain nor somebody on an unencrypted line can plant a session of their own (RFC 6265bis, section 4.1.3.2)."""
_ID: Final = re.compile(r"[A-Za-z0-9_-]{55}")
_ORIGIN: Final = re.compile(rb"(https?)://([^/?#]+)")
_PORT: Final = re.compile(rb":[0-9]+$")
_PORTS: Final = {b"http": b":80", b"https": b":443"}


def session_of(scope: Scope) -> str | None:
    """Returns the id of a request's session from its cookie; None if it has none.

    Raises:
        Unauthenticated: the request has a session, and does not come from the page itself.
    """
    if (session_id := cookie_of(scope)) is not None and (reason := why_foreign(scope)) is not None:
        raise Unauthenticated(
            f"a session counts only in calls of the page itself, and {reason}: send a key as "
            "'Authorization: Bearer pfx_…'"
        )
    return session_id


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
    """Returns the value of `Set-Cookie` that gives the browser a session's id, or with an empty id removes it.

    The cookie is `Secure` if the page's Origin is `https:`, which holds behind a proxy that ends TLS too."""
    name, secure = (_SECURE_COOKIE, "; Secure") if _is_secure(scope) else (_COOKIE, "")
    seconds = int(LONGEST.total_seconds()) if session_id else 0
    return f"{name}={session_id}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}"


def _is_secure(scope: Scope) -> bool:
    origin: bytes = dict(scope["headers"]).get(b"origin", b"")
    return origin.startswith(b"https:")


def cookie_of(scope: Scope) -> str | None:
    """Returns the id of a session in the cookies of a request; None if it has none, or a malformed one.

    The cookie with the prefix counts before the one without, and alone if the Origin is `https:`. A browser leaves the
    Origin out of a GET, which may therefore have either.
    """
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        if name == b"cookie":
            for pair in value.decode("latin-1").split(";"):
                key, _, text = pair.strip().partition("=")
                if key in (_SECURE_COOKIE, _COOKIE) and _ID.fullmatch(text):
                    found.setdefault(key, text)
    return found.get(_SECURE_COOKIE) or (None if _is_secure(scope) else found.get(_COOKIE))
