"""Reads, stores and replaces the descriptions of versions, which their digests do not cover."""

from collections.abc import Callable

import sqlalchemy as sa

from prefix_service.catalog.audit import record
from prefix_service.catalog.authority import writing_for
from prefix_service.catalog.changes import AnnotationsChanged, BaseModelChanged, CardChanged, announce
from prefix_service.catalog.database import Database, insert
from prefix_service.catalog.quotas import require_room
from prefix_service.catalog.records import Principal, Version
from prefix_service.catalog.rows import OWNED, PRESENT, missing
from prefix_service.catalog.schema import adapters, descriptions, tenants, versions
from prefix_service.catalog.tenants import count, lock
from prefix_service.errors import NotFound
from prefix_service.prefix.description import EMPTY, Description


class Descriptions:
    """Blocking; call it from a thread. Every method is one transaction, and may also raise OutOfSpace or StorageFailed.

    They are not remembered in memory, since serving a prefix needs none of them.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, version: Version) -> Description:
        """Returns the description of a version.

        Raises:
            NotFound: the version was deleted meanwhile.
        """
        with self._database.reading() as connection:
            return _find(connection, version)[2]

    def change(
        self, version: Version, by: Principal, what: str, change: Callable[[Description], Description]
    ) -> Description:
        """Replaces the description of a version by what `change` makes of it in the transaction, and returns that.

        `what` is changed, for the audit; what `change` raises is raised, and then nothing has changed.

        Raises:
            Unauthenticated: `by` has no authority any more.
            NotFound: the version was deleted meanwhile.
            QuotaExceeded: the tenant's quota of bytes does not allow it.
        """
        with writing_for(self._database, by) as connection:
            try:
                owner = lock(connection, version.tenant)
            except NotFound as error:
                raise missing(version.tenant, version.adapter) from error
            version_id, adapter_id, before = _find(connection, version)
            after = change(before)
            if after == before:
                return after
            growth = after.nbytes - before.nbytes
            if growth > 0:
                require_room(owner, growth, f"this {what} takes another")
            count(connection, adapter_id, versions_more=0, bytes_more=growth)
            store(connection, version_id, after)
            target = f"{version.tenant}/{version.adapter}@{version.number}"
            record(connection, by, f"{what}.changed", version.tenant, target, bytes=after.nbytes)
            names = version.tenant, version.adapter, version.number, version.digest
            if after.card != before.card:
                announce(connection, CardChanged(*names))
            if after.annotations != before.annotations:
                announce(connection, AnnotationsChanged(*names))
            if after.fingerprint != before.fingerprint:
                announce(connection, BaseModelChanged(*names))
            return after


def store(connection: sa.Connection, version_id: int, description: Description) -> None:
    """Stores the description of a version, in place of any other."""
    row = {
        "card": description.card,
        "annotations": dict(description.annotations),
        "fingerprint": description.fingerprint,
        "config_file": description.config_file or None,
        "bytes": description.nbytes,
    }
    statement = insert(connection, descriptions).values(version_id=version_id, **row)
    connection.execute(statement.on_conflict_do_update(index_elements=["version_id"], set_=row))


def nbytes_of(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> int:
    """Returns the bytes of the description of the one version that meets a condition."""
    described = descriptions.join(versions, versions.c.id == descriptions.c.version_id)
    return connection.scalar(sa.select(descriptions.c.bytes).select_from(described).where(condition)) or 0


def _find(connection: sa.Connection, version: Version) -> tuple[int, int, Description]:
    """Returns the ids of a version and its adapter, and its description."""
    same = (
        tenants.c.name == version.tenant,
        adapters.c.name == version.adapter,
        versions.c.number == version.number,
        versions.c.digest == version.digest,
    )
    query = sa.select(versions.c.id, versions.c.adapter_id).select_from(OWNED).where(PRESENT, *same)
    found = connection.execute(query).one_or_none()
    if found is None:
        raise NotFound(f"there is no {version.tenant}/{version.adapter}@{version.number}")
    row = connection.execute(sa.select(descriptions).where(descriptions.c.version_id == found.id)).one_or_none()
    if row is None:
        return found.id, found.adapter_id, EMPTY
    described = Description(row.card, row.annotations, row.fingerprint, row.config_file or b"")
    return found.id, found.adapter_id, described
