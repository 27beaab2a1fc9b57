"""Deletions: what is deleted can be found no more at once, and its rows are removed a slice at a time afterwards.

A transaction that removed 50,000 adapters would keep other writers waiting for seconds. So deleting an adapter or a
tenant gives its row a name that nobody can ask for, and the collector removes what hangs on the row, here or after the
next start. Ids, numbers and the audit are not reused or forgotten.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final

import sqlalchemy as sa

from prefix_service.catalog.database import Database, insert
from prefix_service.catalog.freed import note
from prefix_service.catalog.garbage import SLICE
from prefix_service.catalog.schema import (
    adapters,
    aliases,
    audit,
    descriptions,
    garbage,
    keys,
    tenants,
    usage,
    versions,
)

_HIDDEN: Final = "#"  # begins no name
_TEXT_BYTES: Final = 8 << 20  # of descriptions that one transaction removes: 250 of them may have 130 MB


def hide_adapter(connection: sa.Connection, adapter_id: int) -> None:
    """Deletes an adapter, which counts no more; its rows are removed later. The caller has locked the tenant."""
    counted = sa.select(adapters.c.tenant_id, adapters.c.bytes).where(adapters.c.id == adapter_id)
    owner, nbytes = connection.execute(counted).one()
    total = {"adapters": tenants.c.adapters - 1, "bytes": tenants.c.bytes - nbytes}
    connection.execute(sa.update(tenants).where(tenants.c.id == owner).values(total))
    _hide(connection, adapters, adapter_id)


def hide_tenant(connection: sa.Connection, tenant_id: int) -> None:
    """Deletes a tenant and its keys; its other rows are removed later."""
    connection.execute(sa.delete(keys).where(keys.c.tenant_id == tenant_id))
    _hide(connection, tenants, tenant_id)


def _hide(connection: sa.Connection, table: sa.Table, row_id: int) -> None:
    hidden = {"name": f"{_HIDDEN}{row_id}", "deleted": True}
    connection.execute(sa.update(table).where(table.c.id == row_id).values(hidden))


def let_go(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> None:
    """Before versions are deleted: note their blobs, whose grace period begins now, and how many bytes of whom these
    are."""
    owned = sa.select(adapters.c.tenant_id, _blob_bytes()).select_from(versions.join(adapters)).where(condition)
    # Before the blobs: on PostgreSQL others lock the rows of these two tables in the same order.
    note(connection, {row[0]: row[1] for row in connection.execute(owned.group_by(adapters.c.tenant_id))})
    found = sa.union(*(sa.select(column).where(condition) for column in (versions.c.weights, versions.c.key_values)))
    # In order: tenants share blobs, and on PostgreSQL two who locked these rows each in its own order would deadlock.
    statement = insert(connection, garbage).from_select(["digest"], found.order_by(sa.text("1")))
    connection.execute(statement.on_conflict_do_update(index_elements=["digest"], set_={"since": sa.func.now()}))


def _blob_bytes() -> sa.ColumnElement[int]:
    """Returns the bytes of the blobs of versions together; 0 without any."""
    total = sa.func.sum(versions.c.weights_bytes + versions.c.key_values_bytes)
    return sa.cast(sa.func.coalesce(total, 0), sa.BigInteger)


class Deletions:
    """Removes the rows of what was deleted. Blocking."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def remove_slice(self) -> bool:
        """Removes up to `SLICE` rows, and returns whether there may be more.

        Raises:
            OutOfSpace, StorageFailed: the database refused; nothing was removed.
        """
        with self._database.reading() as connection:
            if not any(connection.execute(_first(table)).first() for table in (adapters, tenants)):
                return False
        with self._database.writing(frees=True) as connection:
            # Another process may remove the same on PostgreSQL.
            found = connection.execute(_first(adapters).with_for_update(skip_locked=True)).all()
            if found:
                _remove_adapters(connection, found)
                return True
            tenant = connection.scalar(_first(tenants).limit(1).with_for_update(skip_locked=True))
            if tenant is not None:
                _remove_from(connection, tenant)
            return tenant is not None


def _first(table: sa.Table) -> sa.Select[Any]:
    columns = (table.c.id, table.c.versions) if table is adapters else (table.c.id,)
    return sa.select(*columns).where(table.c.deleted).order_by(table.c.id).limit(SLICE)


def _remove_from(connection: sa.Connection, tenant_id: int) -> None:
    """Removes some adapters of a tenant; after the last one its usage, its name in the audit, and then its row."""
    owned: sa.Select[Any] = sa.select(adapters.c.id, adapters.c.versions).where(adapters.c.tenant_id == tenant_id)
    found = connection.execute(owned.order_by(adapters.c.name).limit(SLICE)).all()
    if found:
        _remove_adapters(connection, found)
        return
    hours = sa.select(usage.c.hour).where(usage.c.tenant_id == tenant_id).order_by(usage.c.hour).limit(1)
    used = sa.delete(usage).where(usage.c.tenant_id == tenant_id, usage.c.hour == hours.scalar_subquery())
    if connection.execute(used).rowcount:
        return
    entries = sa.select(audit.c.id).where(audit.c.tenant_id == tenant_id).limit(SLICE)
    released = sa.update(audit).where(audit.c.id.in_(entries)).values(tenant_id=None)
    if connection.execute(released).rowcount < SLICE:
        connection.execute(sa.delete(tenants).where(tenants.c.id == tenant_id))


def _remove_adapters(connection: sa.Connection, found: Sequence[sa.Row[Any]]) -> None:
    """Removes the first of these adapters that have up to `SLICE` rows together, or a part of the first."""
    named = sa.select(aliases.c.adapter_id, sa.func.count().label("total")).group_by(aliases.c.adapter_id)
    named = named.where(aliases.c.adapter_id.in_([row.id for row in found]))
    aliased = {row.adapter_id: row.total for row in connection.execute(named)}
    sizes = accumulate(1 + row.versions + aliased.get(row.id, 0) for row in found)
    whole = [row.id for row, size in zip(found, sizes, strict=True) if size <= SLICE]
    if whole:
        if not _remove_versions(connection, versions.c.adapter_id.in_(whole)):
            return
        connection.execute(sa.delete(aliases).where(aliases.c.adapter_id.in_(whole)))
        connection.execute(sa.delete(adapters).where(adapters.c.id.in_(whole)))
        return
    first = found[0]
    if aliased.get(first.id):
        some = sa.select(aliases.c.name).where(aliases.c.adapter_id == first.id).limit(SLICE)
        connection.execute(sa.delete(aliases).where(aliases.c.adapter_id == first.id, aliases.c.name.in_(some)))
        return
    oldest = sa.select(versions.c.id).where(versions.c.adapter_id == first.id).order_by(versions.c.number).limit(SLICE)
    ids = connection.scalars(oldest).all()
    nbytes = connection.scalar(sa.select(_blob_bytes()).where(versions.c.id.in_(ids)))
    if not _remove_versions(connection, versions.c.id.in_(ids)):
        return
    left = {"versions": first.versions - SLICE if len(ids) == SLICE else 0, "bytes": adapters.c.bytes - nbytes}
    connection.execute(sa.update(adapters).where(adapters.c.id == first.id).values(left))


def _remove_versions(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> bool:
    """Removes versions with their descriptions; returns False if it removed only some of the descriptions, of which
    there are too many bytes for one transaction."""
    described = descriptions.join(versions, versions.c.id == descriptions.c.version_id)
    query = sa.select(descriptions.c.version_id, descriptions.c.bytes).select_from(described).where(condition)
    found = connection.execute(query).all()
    sizes = accumulate(row.bytes for row in found)
    some = [row.version_id for row, size in zip(found, sizes, strict=True) if size <= _TEXT_BYTES]
    if len(some) < len(found):
        connection.execute(sa.delete(descriptions).where(descriptions.c.version_id.in_(some)))
        return False
    let_go(connection, condition)
    connection.execute(sa.delete(versions).where(condition))  # and the descriptions: ON DELETE CASCADE
    return True
