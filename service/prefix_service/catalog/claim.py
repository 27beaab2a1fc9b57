"""Whose a catalog on PostgreSQL is: the secret of its keys and its blob store, noted at its first start and compared at
every other, and its first key."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from prefix_service.catalog.authority import writing_for
from prefix_service.catalog.database import Database
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import COMMAND_LINE
from prefix_service.catalog.schema import catalog, keys
from prefix_service.errors import Conflict, NotFound

UNFINISHED: Final = "an unfinished migrate"
"""The blob store of a catalog that `copying.py` is filling; no service has it, not even an older release."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The fingerprint of a secret and the name of a blob store."""

    key_secret: str
    blob_store: str

    def require_same(self, found: "Claim") -> None:
        """Raises Conflict if a catalog belongs to another secret or blob store than this one."""
        if found.key_secret != self.key_secret:
            raise Conflict(
                "the keys of this catalog are hashed with another secret than that of PREFIX_KEY_SECRET_FILE "
                f"(fingerprint {found.key_secret[:8]}…, here {self.key_secret[:8]}…): give every replica the same file"
            )
        if found.blob_store != self.blob_store:
            raise Conflict(
                f"this catalog belongs to the blob store {found.blob_store!r}, and this replica has "
                f"{self.blob_store!r}: all replicas of a catalog share one blob store"
            )


def claim(database: Database, mine: Claim, make_first_key: Callable[[sa.Connection], object] | None) -> None:
    """Note whose a catalog is that nobody has served yet, and make its first key in the same transaction, unless it has
    keys; otherwise compare. Of processes that start together one does it: the row of the catalog is locked.

    Raises:
        Conflict: the catalog belongs to another secret or blob store, or to an unfinished `migrate`.
        OutOfSpace, StorageFailed: the database refused; nothing was noted.
    """
    with writing_for(database, COMMAND_LINE) as connection:
        found = _found(connection, sa.select(catalog.c.key_secret, catalog.c.blob_store).with_for_update())
        if found is not None:
            mine.require_same(found)
            return
        noted = {"key_secret": mine.key_secret, "blob_store": mine.blob_store}
        connection.execute(sa.update(catalog).values(noted))
        if make_first_key is not None and connection.scalar(sa.select(keys.c.id).limit(1)) is None:
            make_first_key(connection)


def require_claim(database: Database, keyring: Keyring, blob_store: str | None = None) -> None:
    """Compare, without a change; the blob store only if one is given.

    Raises:
        Conflict: the catalog belongs to another secret or blob store, or to an unfinished `migrate`.
        NotFound: nobody has served it yet.
        StorageFailed: the database refused.
    """
    with database.reading() as connection:
        found = _found(connection, sa.select(catalog.c.key_secret, catalog.c.blob_store))
    if found is None:
        raise NotFound("no service has run on this catalog yet: `prefix-service serve` prepares it")
    Claim(keyring.fingerprint, blob_store or found.blob_store).require_same(found)


def require_finished(database: Database) -> None:
    """Raises Conflict if the catalog is the target of a `migrate` that has not come to its end."""
    with database.reading() as connection:
        _found(connection, sa.select(catalog.c.key_secret, catalog.c.blob_store))


def _found(connection: sa.Connection, query: sa.Select[tuple[str, str]]) -> Claim | None:
    row = connection.execute(query).one()
    if row.blob_store == UNFINISHED:
        raise Conflict("a `prefix-service migrate` to this catalog has not come to its end: run it again first")
    return None if row.key_secret is None else Claim(row.key_secret, row.blob_store)
