"""Sessions of the page at `/ui`: begun with a key, found by a random id. Only a hash of the id is stored."""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import sqlalchemy as sa

from prefix_service.catalog.authority import writing_for
from prefix_service.catalog.database import Database, now
from prefix_service.catalog.records import Principal
from prefix_service.catalog.schema import keys, sessions, tenants

LONGEST: Final = timedelta(hours=12)
"""A session ends this long after it began."""

IDLE: Final = timedelta(hours=1)
"""A session that is not used for this long has ended."""

_MOST_OF_KEY: Final = 32
_USE_GRANULARITY: Final = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class Session:
    """A session that is alive: whose key it was begun with, and whether its use is to be noted."""

    principal: Principal
    is_use_due: bool


class Sessions:
    """The sessions of one catalog. A key that is revoked or expires ends its sessions. Blocking.

    Any method may also raise OutOfSpace or StorageFailed, when the disk or the database refuses.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, by: Principal) -> str:
        """Begins a session of a key, and returns its id. Of more than 32 sessions of a key the oldest ends.

        Raises:
            Unauthenticated: the key was revoked or has expired.
            ReadOnly: the catalog is opened for reading alone.
        """
        session_id = secrets.token_urlsafe(32)
        of_key = sessions.c.key_id == by.key_id
        with writing_for(self._database, by) as connection:
            moment = now(connection)
            newest = sa.select(sessions.c.hash).where(of_key).order_by(sessions.c.began.desc()).limit(_MOST_OF_KEY - 1)
            connection.execute(sa.delete(sessions).where(of_key, sessions.c.hash.not_in(newest.scalar_subquery())))
            row = {"hash": _hash(session_id), "key_id": by.key_id, "began": moment, "used": moment}
            connection.execute(sa.insert(sessions).values(row))
        return session_id

    def find(self, session_id: str) -> Session | None:
        """Returns a session by its id; None if it never existed or has ended, or its key has."""
        found = sessions.join(keys, sessions.c.key_id == keys.c.id).outerjoin(tenants, keys.c.tenant_id == tenants.c.id)
        query = sa.select(
            keys.c.id, tenants.c.name, keys.c.scope, keys.c.tenant_id, keys.c.expires, sessions.c.began, sessions.c.used
        ).select_from(found)
        with self._database.reading() as connection:
            row = connection.execute(query.where(sessions.c.hash == _hash(session_id))).one_or_none()
            moment = now(connection)
        if row is None or moment >= row.began + LONGEST or moment >= row.used + IDLE:
            return None
        if row.expires is not None and moment >= row.expires:
            return None
        principal = Principal(row.id, row.name, row.scope, row.tenant_id, session=_hash(session_id))
        return Session(principal, is_use_due=moment >= row.used + _USE_GRANULARITY)

    def note_use(self, session_id: str) -> None:
        """Notes that a session was used now."""
        with self._database.writing() as connection:
            used = sa.update(sessions).where(sessions.c.hash == _hash(session_id)).values(used=now(connection))
            connection.execute(used)

    def end(self, session_id: str) -> None:
        """Ends a session, if there is one of this id."""
        with self._database.writing(frees=True) as connection:
            connection.execute(sa.delete(sessions).where(sessions.c.hash == _hash(session_id)))


def _hash(session_id: str) -> str:
    return hashlib.sha256(session_id.encode()).hexdigest()
