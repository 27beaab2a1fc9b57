"""Removal of ended sessions, and of audit entries, changes and usage that are older than the settings allow."""

from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa

from prefix_service.catalog.database import Database, now
from prefix_service.catalog.garbage import SLICE
from prefix_service.catalog.schema import audit, changes, sessions, usage
from prefix_service.catalog.sessions import IDLE


@dataclass(frozen=True, slots=True)
class Retention:
    """Days that each is kept."""

    audit: int
    changes: int
    usage: int


def expire_audit(database: Database, days: int) -> bool:
    """Removes some of the oldest entries of the audit that are older than `days`, and returns whether there may be
    more. The newest entry stays: ids go on from it, so that none is given twice.

    Raises:
        OutOfSpace, StorageFailed: the database refused; nothing was removed.
    """
    newest = sa.select(sa.func.max(audit.c.id)).scalar_subquery()
    with database.reading() as connection:
        limit = now(connection) - timedelta(days=days)
        first = sa.select(audit.c.id, audit.c.at).where(audit.c.id < newest).order_by(audit.c.id).limit(SLICE)
        expired = [row.id for row in connection.execute(first) if row.at < limit]
    if not expired:
        return False
    with database.writing() as connection:
        connection.execute(sa.delete(audit).where(audit.c.id.in_(expired)))
    return len(expired) == SLICE


def expire_changes(database: Database, days: int) -> bool:
    """Removes some of the oldest changes that are older than `days`, and returns whether there may be more. A process
    that has not read them yet forgets everything instead.

    Raises:
        OutOfSpace, StorageFailed: the database refused; nothing was removed.
    """
    with database.reading() as connection:
        limit = now(connection) - timedelta(days=days)
        first = sa.select(changes.c.revision, changes.c.at).order_by(changes.c.revision).limit(SLICE)
        expired = [row.revision for row in connection.execute(first) if row.at < limit]
    if not expired:
        return False
    with database.writing(frees=True) as connection:
        connection.execute(sa.delete(changes).where(changes.c.revision.in_(expired)))
    return len(expired) == SLICE


def expire_usage(database: Database, days: int) -> bool:
    """Removes some usage of hours that began more than `days` ago, and returns whether there may be more.

    Raises:
        OutOfSpace, StorageFailed: the database refused; nothing was removed.
    """
    key = tuple(usage.primary_key)
    with database.reading() as connection:
        limit = now(connection) - timedelta(days=days)
        first = sa.select(*key).where(usage.c.hour < limit).order_by(*key).limit(SLICE)
        expired = [{f"old_{name}": value for name, value in row._mapping.items()} for row in connection.execute(first)]
    if not expired:
        return False
    with database.writing(frees=True) as connection:
        same = [column == sa.bindparam(f"old_{column.name}", type_=column.type) for column in key]
        connection.execute(sa.delete(usage).where(*same), expired)
    return len(expired) == SLICE


def expire_sessions(database: Database) -> bool:
    """Removes some of the page's sessions that have not been used for too long, and returns whether there may be more.

    Raises:
        OutOfSpace, StorageFailed: the database refused; nothing was removed.
    """
    with database.reading() as connection:
        idle = sessions.c.used < now(connection) - IDLE
        ended = connection.scalars(sa.select(sessions.c.hash).where(idle).order_by(sessions.c.used).limit(SLICE)).all()
    if not ended:
        return False
    with database.writing(frees=True) as connection:
        connection.execute(sa.delete(sessions).where(sessions.c.hash.in_(ended)))
    return len(ended) == SLICE
