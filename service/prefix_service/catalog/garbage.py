"""The blobs that the catalog names, and those that deletions let go within the grace period."""

from collections.abc import Collection, Iterator
from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa

from prefix_service.catalog import freed
from prefix_service.catalog.database import Database, now
from prefix_service.catalog.rows import OWNED, PRESENT
from prefix_service.catalog.schema import adapters, garbage, tenants, versions

_PAGE: Final = 1000

SLICE: Final = 250
"""Rows that one transaction removes: others can write again after some tens of milliseconds."""


class Garbage:
    """Blobs from the catalog's side. Blocking; only the database's own time is compared."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def wanted(self, digests: Collection[str], grace: float) -> set[str]:
        """Returns those of the blobs that must stay: a version names them, or did within the last `grace` seconds."""
        with self._database.reading() as connection:
            lately = garbage.c.since > now(connection) - timedelta(seconds=grace)
            queries = (
                sa.select(versions.c.weights).where(versions.c.weights.in_(digests)),
                sa.select(versions.c.key_values).where(versions.c.key_values.in_(digests)),
                sa.select(garbage.c.digest).where(garbage.c.digest.in_(digests), lately),
            )
            return {digest for query in queries for digest in connection.scalars(query)}

    def expired(self, grace: float) -> datetime:
        """Returns the moment `grace` seconds ago: a collection that begins now removes what was let go before it."""
        with self._database.reading() as connection:
            return now(connection) - timedelta(seconds=grace)

    def forget(self, before: datetime) -> bool:
        """Forgets some of what was let go before a moment, and has been collected since; returns whether there may be
        more."""
        with self._database.writing(frees=True) as connection:
            early = garbage.c.since <= before
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
