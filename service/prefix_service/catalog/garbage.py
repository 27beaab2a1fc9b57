"""Decides which blobs must stay: each that a version names; and, for the grace period, each that a deletion let go or
that is about to be named.

Replicas on different machines store and remove the same blobs, and a bucket has no transactions. So the rows of
`garbage` say who may do what with a digest:

1. Whoever stores a blob first *holds* its digest: the grace period begins now. A collector that condemned the digest is
   waited for.
2. A collector *condemns* the digests that nobody named or held within the grace period, removes their blobs, and then
   *acquits* the digests.
3. The transaction that names a blob requires that its digest is still held.

A process that is killed after 1 leaves a blob that is collected after the grace period. A collector that is killed
within 2 leaves its digests condemned. They are free again after `CONDEMNED` seconds: a collector sends no removal later
than `REMOVING` seconds after it began to condemn.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa

from prefix_service.catalog import freed
from prefix_service.catalog.database import Database, insert, now
from prefix_service.catalog.rows import OWNED, PRESENT
from prefix_service.catalog.schema import adapters, garbage, tenants, versions
from prefix_service.errors import Unavailable

_PAGE: Final = 1000

SLICE: Final = 250
"""Rows that one transaction removes: others can write again after some tens of milliseconds."""

CONDEMNED: Final = 120.0
"""Seconds after which a condemned digest is free again, whatever became of the collector."""
REMOVING: Final = 60.0
"""Seconds for which a collector removes what it condemned; the rest of `CONDEMNED` is for requests under way."""


@dataclass(frozen=True, slots=True)
class Condemned:
    """Digests whose blobs a collector may remove now, and the moment at which it condemned them."""

    digests: frozenset[str]
    moment: datetime


def hold(connection: sa.Connection, digests: Collection[str]) -> bool:
    """Begins a new grace period of digests, in a transaction that ends before their blobs are stored; returns False if
    one of them is condemned, and all must be held again."""
    moment = now(connection)
    # In order: on PostgreSQL two who locked these rows each in its own order would deadlock.
    rows = [{"digest": digest, "since": moment} for digest in sorted(set(digests))]
    statement = insert(connection, garbage).values(rows)
    again = {"since": moment, "condemned": None}
    statement = statement.on_conflict_do_update(index_elements=["digest"], set_=again, where=_is_free(moment))
    return len(connection.scalars(statement.returning(garbage.c.digest)).all()) == len(rows)


def require_held(connection: sa.Connection, digests: Collection[str]) -> None:
    """Checks, in the transaction that names blobs, that no collector has removed or will remove them.

    Raises:
        Unavailable: too much time has passed since they were held.
    """
    wanted = set(digests)
    # Nobody condemns or forgets a locked row before this transaction ends.
    query = sa.select(garbage.c.digest).where(garbage.c.digest.in_(wanted), garbage.c.condemned.is_(None))
    if set(connection.scalars(query.order_by(garbage.c.digest).with_for_update())) != wanted:
        raise Unavailable(
            "this took longer than PREFIX_GARBAGE_GRACE, and the stored bytes may have been collected: publish again"
        )


class Garbage:
    """Blobs from the catalog's side. Blocking; only the database's own time is compared."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def wanted(self, digests: Collection[str], grace: float) -> set[str]:
        """Returns those of the blobs that must stay: a version names them, or did within the last `grace` seconds, or
        they were held within them."""
        with self._database.reading() as connection:
            lately = garbage.c.since > now(connection) - timedelta(seconds=grace)
            late = connection.scalars(sa.select(garbage.c.digest).where(garbage.c.digest.in_(digests), lately))
            return _named(connection, digests) | set(late)

    def condemn(self, digests: Collection[str], grace: float) -> Condemned:
        """Condemns those of the digests that are not wanted, and that no other collector has condemned.

        Raises:
            OutOfSpace, StorageFailed: the database refused.
        """
        with self._database.writing(frees=True) as connection:
            moment = now(connection)
            since = moment - timedelta(seconds=grace)
            early = sa.and_(garbage.c.since <= since, _is_free(moment))
            rows = [{"digest": digest, "since": since, "condemned": moment} for digest in sorted(digests)]
            statement = insert(connection, garbage).values(rows)
            statement = statement.on_conflict_do_update(
                index_elements=["digest"], set_={"condemned": moment}, where=early
            )
            found = set(connection.scalars(statement.returning(garbage.c.digest)))
            # Looked up once the rows are locked: what names one of them now was committed before.
            if named := found & _named(connection, found):
                connection.execute(sa.update(garbage).where(garbage.c.digest.in_(named)).values(condemned=None))
            return Condemned(frozenset(found - named), moment)

    def acquit(self, condemned: Condemned) -> None:
        """Frees digests whose blobs are removed, or stay.

        Raises:
            OutOfSpace, StorageFailed: the database refused.
        """
        with self._database.writing(frees=True) as connection:
            mine = sa.select(garbage.c.digest).where(
                garbage.c.digest.in_(condemned.digests), garbage.c.condemned == condemned.moment
            )
            mine = mine.order_by(garbage.c.digest).with_for_update()
            connection.execute(sa.delete(garbage).where(garbage.c.digest.in_(mine)))

    def expired(self, grace: float) -> datetime:
        """Returns the moment `grace` seconds ago: a collection that begins now removes what was let go before it."""
        with self._database.reading() as connection:
            return now(connection) - timedelta(seconds=grace)

    def forget(self, before: datetime) -> bool:
        """Forgets some of what was let go before a moment, and has been collected since; returns whether there may be
        more."""
        with self._database.reading() as connection:  # mostly there is nothing, and nobody waits for a writer
            if not connection.scalar(sa.select(sa.exists().where(garbage.c.since <= before) | freed.noted(before))):
                return False
        with self._database.writing(frees=True) as connection:
            early = sa.and_(garbage.c.since <= before, _is_free(now(connection)))
            # Another transaction holds a row to let it go again, or to forget it.
            free = sa.select(garbage.c.digest).where(early).order_by(garbage.c.since).limit(SLICE)
            statement = sa.delete(garbage).where(garbage.c.digest.in_(free.with_for_update(skip_locked=True)))
            more = connection.execute(statement).rowcount == SLICE
            return freed.forget(connection, before, SLICE) or more

    def named(self) -> Iterator[tuple[str, str, str]]:
        """Every version as `tenant/adapter@number`, with the digests of its weights and of its keys and values."""
        last = 0
        while True:
            query = (
                sa.select(
                    versions.c.id,
                    versions.c.number,
                    versions.c.weights,
                    versions.c.key_values,
                    tenants.c.name.label("tenant"),
                    adapters.c.name.label("adapter"),
                )
                .select_from(OWNED)
                .where(PRESENT, versions.c.id > last)
                .order_by(versions.c.id)
                .limit(_PAGE)
            )
            with self._database.reading() as connection:
                rows = connection.execute(query).all()
            for row in rows:
                yield f"{row.tenant}/{row.adapter}@{row.number}", row.weights, row.key_values
            if len(rows) < _PAGE:
                return
            last = rows[-1].id


def _is_free(moment: datetime) -> sa.ColumnElement[bool]:
    """Returns a condition: no collector has condemned the digest, or it did so too long ago."""
    return sa.or_(garbage.c.condemned.is_(None), garbage.c.condemned <= moment - timedelta(seconds=CONDEMNED))


def _named(connection: sa.Connection, digests: Collection[str]) -> set[str]:
    """Returns those of the digests that a version names."""
    columns = versions.c.weights, versions.c.key_values
    return {found for column in columns for found in connection.scalars(sa.select(column).where(column.in_(digests)))}
