"""Makes a catalog equal to another one, row by row, also from SQLite to PostgreSQL and back: ids, numbers, keys, the
audit, usage and the changes stay what they are.

A catalog that is being filled belongs to the blob store `UNFINISHED`, so no service starts on it (`claim.py`). Rows are
written in one transaction: whoever reads sees the catalog as it was, or as it is in the other one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeAlias

import sqlalchemy as sa

from prefix_service.catalog.changes import catalog_id, revision_of
from prefix_service.catalog.claim import UNFINISHED, Claim
from prefix_service.catalog.rows import OWNED, PRESENT
from prefix_service.catalog.schema import catalog, changes, keys, metadata, replicas, tenants, versions
from prefix_service.errors import Conflict

Values: TypeAlias = dict[str, Any]

_COPIED: Final = [table for table in metadata.sorted_tables if table not in (catalog, replicas)]
"""Tables whose rows are copied, those that others refer to first."""

_TOGETHER: Final = 500  # rows of a statement; each of its values is a parameter, of which SQLite has 32,766
_REPLACEMENT: Final = "\ufffd"


@dataclass(frozen=True, slots=True)
class Rows:
    """Numbers of rows that a copy added, changed and removed."""

    added: int
    changed: int
    removed: int


def named_blobs(connection: sa.Connection) -> set[str]:
    """Returns the digests of all blobs that versions name."""
    query = sa.select(versions.c.weights, versions.c.key_values).select_from(OWNED).where(PRESENT)
    return {digest for row in connection.execute(query) for digest in row}


def count_rows(connection: sa.Connection) -> int:
    """Returns the number of rows that `copy_rows` would compare."""
    return sum(connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0 for table in _COPIED)


def begin(source: sa.Connection, target: sa.Connection, wanted: Claim) -> None:
    """Makes an empty catalog the unfinished copy of `source`, or checks that the target is an earlier copy of it, which
    will belong to `wanted`.

    Raises:
        Conflict: the target holds something else, or has been changed since it was copied.
    """
    row = target.execute(sa.select(catalog).with_for_update()).one()
    origin = catalog_id(source)
    if row.id != origin:
        if row.revision or row.key_secret or any(_has_rows(target, table) for table in (tenants, keys)):
            raise Conflict(f"the target holds the catalog {row.id}, and this is {origin}: name an empty one")
    elif row.blob_store != UNFINISHED:
        if row.key_secret is not None:
            wanted.require_same(Claim(row.key_secret, row.blob_store))
        require_earlier(source, target)
        return
    noted = {"id": origin, "revision": 0, "key_secret": wanted.key_secret, "blob_store": UNFINISHED}
    target.execute(sa.update(catalog).values(noted))


def require_earlier(source: sa.Connection, target: sa.Connection) -> None:
    """Checks that every change of the target is one of the source.

    Raises:
        Conflict: the target has changes of its own, or nobody can tell.
    """
    revision = revision_of(target)
    if revision == 0:
        return
    latest = sa.select(changes).where(changes.c.revision == revision)
    found = [connection.execute(latest).one_or_none() for connection in (source, target)]
    if revision > revision_of(source) or (None not in found and found[0] != found[1]):
        raise Conflict(
            f"the target has changes that the source does not have, up to its revision {revision}: a service has run "
            "on it since the last migrate; to replace it all the same, empty it"
        )
    if None in found:
        raise Conflict(
            f"whether the target has changes of its own cannot be told, since revision {revision} is no longer kept "
            "(PREFIX_CHANGES_DAYS): empty the target's catalog; its blobs are used again"
        )


def copy_rows(source: sa.Connection, target: sa.Connection, progress: Callable[[int], object]) -> Rows:
    """Makes the rows of `target`, a write transaction, those of `source`; calls `progress` with numbers of rows of the
    source that are done. The row of `catalog` is left to `finish`."""
    # A row that is gone may still have the name that another row took since, so removals come first.
    removed = sum(_remove(source, target, table) for table in reversed(_COPIED))
    added = changed = 0
    for table in _COPIED:
        for page in _pages(source, table):
            new, other = _write(target, table, page)
            added, changed = added + new, changed + other
            progress(len(page))
        _continue_counting(target, table)
    return Rows(added, changed, removed)


def finish(source: sa.Connection, target: sa.Connection, claim: Claim | None) -> None:
    """Gives the target the id and the revision of the source, and notes whose it is: nobody's in a data folder."""
    noted: Values = {"id": catalog_id(source), "revision": revision_of(source), "key_secret": None, "blob_store": None}
    if claim is not None:
        noted |= {"key_secret": claim.key_secret, "blob_store": claim.blob_store}
    target.execute(sa.update(catalog).values(noted))


def _has_rows(connection: sa.Connection, table: sa.Table) -> bool:
    return connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() is not None


def _remove(source: sa.Connection, target: sa.Connection, table: sa.Table) -> int:
    """Removes rows that the source does not have, or has under another name or owner."""
    removed = 0
    fixed = _fixed(table)
    for page in _pages(target, table):
        there = _found(source, table, [_key(table, row) for row in page])
        gone = []
        for row in page:
            key = _key(table, row)
            other = there.get(key)
            if other is None or any(row[name] != _stored(target, table.c[name], other[name]) for name in fixed):
                gone.append(key)
        if gone:
            target.execute(sa.delete(table).where(_among(table, gone)))
            removed += len(gone)
    return removed


def _fixed(table: sa.Table) -> list[str]:
    """Returns the unique columns, and those that refer to other rows: an update of them could meet another row."""
    unique = [column for index in table.constraints if isinstance(index, sa.UniqueConstraint) for column in index]
    return sorted({column.name for column in [*unique, *(column for column in table.c if column.foreign_keys)]})


def _write(target: sa.Connection, table: sa.Table, page: list[Values]) -> tuple[int, int]:
    """Adds or changes rows; returns how many of each."""
    wanted = [{name: _stored(target, table.c[name], value) for name, value in row.items()} for row in page]
    there = _found(target, table, [_key(table, row) for row in wanted])
    new = [row for row in wanted if _key(table, row) not in there]
    changed = [row for row in wanted if there.get(_key(table, row), row) != row]
    if new:
        target.execute(sa.insert(table), new)
    if changed:
        named = [column == sa.bindparam(f"key_{column.name}", type_=column.type) for column in table.primary_key]
        rest = {column.name: sa.bindparam(f"to_{column.name}", type_=column.type) for column in table.c}
        statement = sa.update(table).where(*named).values(rest)
        target.execute(statement, [_parameters(table, row) for row in changed])
    return len(new), len(changed)


def _parameters(table: sa.Table, row: Values) -> Values:
    keyed = {f"key_{column.name}": row[column.name] for column in table.primary_key}
    return keyed | {f"to_{name}": value for name, value in row.items()}


def _stored(target: sa.Connection, column: sa.Column[Any], value: Any) -> Any:
    """Returns a value as the target's database will return it."""
    if isinstance(value, str):
        # Older releases let a NUL into the names of keys in SQLite.
        return value.replace("\0", _REPLACEMENT)
    if isinstance(value, datetime) and target.dialect.name == "sqlite":  # some columns have whole seconds there
        to_text = column.type.dialect_impl(target.dialect).bind_processor(target.dialect)
        return value if to_text is None else datetime.fromisoformat(to_text(value))
    return value


def _pages(connection: sa.Connection, table: sa.Table) -> Iterator[list[Values]]:
    """Yields all rows in the order of their keys, which need not be that of another database."""
    key = sa.tuple_(*table.primary_key)
    query = sa.select(table).order_by(*table.primary_key).limit(_TOGETHER)
    rows = _values(connection.execute(query))
    while rows:
        yield rows
        after = sa.tuple_(*(sa.literal(rows[-1][column.name], column.type) for column in table.primary_key))
        rows = _values(connection.execute(query.where(key > after))) if len(rows) == _TOGETHER else []


def _found(connection: sa.Connection, table: sa.Table, wanted: Sequence[tuple[Any, ...]]) -> dict[Any, Values]:
    rows = _values(connection.execute(sa.select(table).where(_among(table, wanted))))
    return {_key(table, row): row for row in rows}


def _among(table: sa.Table, wanted: Sequence[tuple[Any, ...]]) -> sa.ColumnElement[bool]:
    first, *others = table.primary_key
    by_first = first.in_({key[0] for key in wanted})  # SQLite has no use for its index in a comparison of tuples
    return sa.and_(by_first, sa.tuple_(*table.primary_key).in_(wanted)) if others else by_first


def _values(rows: Iterable[sa.Row[Any]]) -> list[Values]:
    return [dict(row._mapping) for row in rows]


def _key(table: sa.Table, row: Values) -> tuple[Any, ...]:
    return tuple(row[column.name] for column in table.primary_key)


def _continue_counting(target: sa.Connection, table: sa.Table) -> None:
    """Makes PostgreSQL give ids after the greatest one that was copied; SQLite does so by itself."""
    column = table.autoincrement_column
    if target.dialect.name == "postgresql" and column is not None:
        sequence = sa.func.pg_get_serial_sequence(table.name, column.name)
        greatest = sa.select(sa.func.max(column)).scalar_subquery()
        target.execute(sa.select(sa.func.setval(sequence, sa.func.coalesce(greatest, 1), greatest.is_not(None))))
