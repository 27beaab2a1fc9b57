"""The URL of a catalog on PostgreSQL: checked before anything connects, and shown without its password."""

from typing import Final

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError

from prefix_service.errors import InvalidInput

_SCHEME: Final = "postgresql+psycopg"
_FORM: Final = f"{_SCHEME}://user:password@host:5432/database"
_RESERVED: Final = "@ : / ? # [ ] %"


def require_url(text: str) -> None:
    """Checks that a text is the URL of a PostgreSQL database. Messages never contain the text, which may have a
    password.

    Raises:
        InvalidInput: it is malformed, of another database, or names none.
    """
    scheme, found, _ = text.partition("://")
    if not found:
        raise InvalidInput(f"a catalog's URL is written as {_FORM}, and this has no ://")
    if scheme in ("postgres", "postgresql"):
        raise InvalidInput(f"begin it with {_SCHEME}:// instead of {scheme}://")
    if scheme != _SCHEME:
        raise InvalidInput(f"only {_SCHEME}:// is supported, not {scheme[:40]!r}")
    try:
        url = sa.make_url(text)
    except (ArgumentError, ValueError):
        # The cause has the text, or a part of it.
        raise InvalidInput(
            f"it cannot be read as {_FORM}: the port is a number, and {_RESERVED} in a user or password are "
            "percent-encoded, as in p%40ss"
        ) from None
    if not url.database:
        raise InvalidInput(f"it names no database behind the host: {_FORM}")
    if "/" in url.database or "@" in url.database or "@" in (url.host or ""):
        raise InvalidInput(f"percent-encode {_RESERVED} in the user and the password, as in p%40ss")


def shown(url: str) -> str:
    """Returns a URL without its password and parameters."""
    full = sa.make_url(url)
    plain = sa.URL.create(full.drivername, full.username, None, full.host, full.port, full.database)
    return plain.render_as_string()
