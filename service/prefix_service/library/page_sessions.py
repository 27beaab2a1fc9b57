"""Sessions of the page at `/ui`: the key that each was begun with."""

import base64
import contextlib
import hmac
from typing import Final

from prefix_service.catalog.records import Principal
from prefix_service.catalog.sessions import LONGEST, Sessions
from prefix_service.catalog.threads import read_catalog, write_catalog
from prefix_service.errors import Forbidden, OutOfSpace, ReadOnly, StorageFailed, Unauthenticated
from prefix_service.library.unknown_ids import UnknownIds
from prefix_service.system.bounded import put_last
from prefix_service.system.turns import ASKING

__all__ = ["LONGEST", "PageSessions"]

_ENDED: Final = "the session has ended: sign in again"
_MOST_KNOWN: Final = 4096
_TAG_BYTES: Final = 9  # a multiple of three, so that its text needs no padding
_TAG: Final = 12  # characters of it


class PageSessions:
    """Finds the principal of a session. The catalog is read at every request: a session that was ended, or a key that
    was revoked, anywhere, counts no more.

    An id ends with a tag that only `secret` makes: one that no process of this service has made is refused without a
    look into the catalog, however many are tried. Ids that were not alive here before are looked up as rarely as
    unknown keys, others in the turn of the tenant whose session it was. Belongs to the event loop.
    """

    def __init__(self, sessions: Sessions, unknown_ids: UnknownIds, secret: bytes) -> None:
        self._sessions, self._unknown_ids, self._secret = sessions, unknown_ids, secret
        self._alive: dict[str, str] = {}  # each session's tenant; empty for the platform

    async def begin(self, by: Principal) -> str:
        """Begins a session of a caller, and returns its id.

        Raises:
            Forbidden: keys of scope `metrics` see nothing that the page shows.
            Unauthenticated, ReadOnly, OutOfSpace, StorageFailed: as `Sessions.begin`.
        """
        if by.scope == "metrics":
            raise Forbidden("yours is a key of scope metrics, which sees nothing of the page: sign in with another")
        ASKING.set(by.tenant or "")
        stored = await write_catalog(self._sessions.begin, by)
        session_id = stored + self._tag(stored)
        put_last(self._alive, session_id, by.tenant or "", _MOST_KNOWN)
        return session_id

    async def end(self, session_id: str) -> None:
        """Ends a session, if there is one of this id.

        Raises:
            Overloaded: too many unknown ids have been looked up within a second.
            ReadOnly, OutOfSpace, StorageFailed: as `Sessions.end`.
        """
        if (stored := self._stored(session_id)) is not None:
            self._admit(session_id)
            self._alive.pop(session_id, None)
            await write_catalog(self._sessions.end, stored)

    async def find(self, session_id: str, *, notes_use: bool = True) -> Principal:
        """Returns the principal of the key that a session was begun with. The use keeps the session alive unless
        `notes_use` is False.

        Raises:
            Unauthenticated: the session has ended, or there never was one.
            Overloaded: too many unknown ids have been looked up within a second.
            StorageFailed: the catalog does not answer.
        """
        if (stored := self._stored(session_id)) is None:
            raise Unauthenticated(_ENDED)
        self._admit(session_id)
        session = await read_catalog(self._sessions.find, stored)
        if session is None:
            self._alive.pop(session_id, None)
            raise Unauthenticated(_ENDED)
        put_last(self._alive, session_id, session.principal.tenant or "", _MOST_KNOWN)
        if notes_use and session.is_use_due:
            with contextlib.suppress(OutOfSpace, StorageFailed, ReadOnly):
                await write_catalog(self._sessions.note_use, stored)
        return session.principal

    def _admit(self, session_id: str) -> None:
        if (tenant := self._alive.get(session_id)) is None:
            self._unknown_ids.admit()
        ASKING.set(tenant or "")

    def _stored(self, session_id: str) -> str | None:
        """Returns the part of an id that the catalog knows; None if no process of this service has made the id."""
        stored, tag = session_id[:-_TAG], session_id[-_TAG:]
        return stored if hmac.compare_digest(self._tag(stored), tag) else None

    def _tag(self, stored: str) -> str:
        tag = hmac.digest(self._secret, stored.encode(), "sha256")[:_TAG_BYTES]
        return base64.urlsafe_b64encode(tag).decode()
