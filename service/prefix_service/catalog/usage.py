"""Usage: the versions that were handed out and the keys that fetched them, by hour; and requests for each adapter."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa

from prefix_service.catalog.database import Database, insert, now
from prefix_service.catalog.records import Dimension, Use, VersionName
from prefix_service.catalog.rows import OWNED, PRESENT
from prefix_service.catalog.schema import adapters, tenants, usage, versions
from prefix_service.errors import NotFound

_COUNTS: Final = ("requests", "bytes", "cold_loads", "prefix_tokens")
_KEY: Final = ("hour", "tenant_id", "adapter", "version", "key_id")
_HOUR: Final = timedelta(hours=1)

READ_DAYS: Final = 90
"""Days back in which reads of one version are looked for: an hour at a time."""


class UsageStore:
    """Blocking. Every method is one transaction, and may also raise OutOfSpace or StorageFailed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, uses: Iterable[Use]) -> None:
        """Adds to what was counted before, of tenants and adapters that still exist."""
        rows = sorted(uses, key=lambda use: use.place)  # in one order: on PostgreSQL two writers would deadlock else
        with self._database.writing() as connection:
            wanted = {use.tenant for use in rows}
            named = sa.select(tenants.c.name, tenants.c.id).where(tenants.c.name.in_(wanted))
            ids = {row.name: row.id for row in connection.execute(named)}
            values = [_row(use, ids[use.tenant]) for use in rows if use.tenant in ids]
            if values:
                statement = insert(connection, usage)
                added = {name: usage.c[name] + statement.excluded[name] for name in _COUNTS}
                connection.execute(statement.on_conflict_do_update(index_elements=_KEY, set_=added), values)
                _add_to_adapters(connection, values)

    def listed(
        self,
        tenant: str | None,
        by: Collection[Dimension],
        *,
        adapter: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: Use | None = None,
        limit: int,
    ) -> list[Use]:
        """Returns up to `limit` sums in the order of `Use.place`, beginning behind `after`: for each hour that begins
        from `since` on and before `until`, for a tenant or each of them, of one adapter or all, and apart for each
        adapter, version or key that `by` names.

        In a tenant's listing all keys of the platform are one, `platform`.

        Raises:
            NotFound: there is no such tenant.
        """
        found: list[Use] = []
        with self._database.reading() as connection:
            owner = None if tenant is None else _tenant_id(connection, tenant)
            mine = sa.true() if owner is None else usage.c.tenant_id == owner
            ends = mine if until is None else mine & (usage.c.hour < until)
            wanted = mine if adapter is None else mine & (usage.c.adapter == adapter)
            bounds = [since] if after is None else [since, after.hour]
            first = max((moment for moment in bounds if moment is not None), default=None)
            for hour in _hours(connection, ends, first):
                behind = after if after is not None and after.hour == hour else None
                query = _sums(hour, by, behind, hides_platform=owner is not None).where(wanted)
                found += [Use(**row._mapping) for row in connection.execute(query.limit(limit - len(found)))]
                if len(found) == limit:
                    break
        return found

    def read_hours(self, version: VersionName) -> tuple[datetime, datetime] | None:
        """Returns the first and the last hour of the last `READ_DAYS` days in which a version was handed out; None if
        it was not."""
        with self._database.reading() as connection:
            within = _of_version(version, _latest_hours(connection, READ_DAYS))
            query = sa.select(usage.c.hour).where(within).limit(1)
            first = connection.scalar(query.order_by(usage.c.hour))
            last = connection.scalar(query.order_by(usage.c.hour.desc()))
        return None if first is None or last is None else (first, last)

    def unread(self, wanted: Iterable[VersionName], days: int) -> list[VersionName]:
        """Returns those of some versions that were published at least `days` ago, and have not been handed out since.

        What a tenant used beyond what is counted apart may have been any of its versions: then none is returned.
        """
        with self._database.reading() as connection:
            hours = _latest_hours(connection, days)
            return [version for version in wanted if connection.execute(_unread(version, hours)).first()]


def _latest_hours(connection: sa.Connection, days: int) -> list[datetime]:
    """Returns the hours of so many days until now, and the next one: a process's clock may be ahead."""
    current = now(connection)
    first = (current - timedelta(days=days)).replace(minute=0, second=0, microsecond=0)
    return [first + _HOUR * number for number in range(24 * days + 2)]


def _of_version(version: VersionName, hours: Sequence[datetime]) -> sa.ColumnElement[bool]:
    """The usage of a version in these hours, each of which the primary key finds."""
    owner = sa.select(tenants.c.id).where(tenants.c.name == version.tenant).scalar_subquery()
    named = (usage.c.adapter == version.adapter) & (usage.c.version == version.number)
    return usage.c.hour.in_(hours) & (usage.c.tenant_id == owner) & named


def _unread(version: VersionName, hours: Sequence[datetime]) -> sa.Select[Any]:
    anything = VersionName(version.tenant, "", 0, "")
    return (
        sa.select(versions.c.id)
        .select_from(OWNED)
        .where(PRESENT, tenants.c.name == version.tenant, adapters.c.name == version.adapter)
        .where(versions.c.number == version.number, versions.c.created < hours[0])
        .where(*(~sa.exists().where(_of_version(one, hours)) for one in (version, anything)))
    )


def _add_to_adapters(connection: sa.Connection, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds the requests in these rows of usage to the totals of their adapters.

    On PostgreSQL no deadlock can follow: whoever changes adapters has locked their tenant's row before, for which the
    rows of usage had to wait.
    """
    requests = Counter[tuple[int, str]]()
    for row in rows:
        requests[row["tenant_id"], row["adapter"]] += row["requests"]
    same = (adapters.c.tenant_id == sa.bindparam("owner"), adapters.c.name == sa.bindparam("adapter"))
    more = sa.update(adapters).where(*same).values(used=adapters.c.used + sa.bindparam("more"))
    connection.execute(
        more, [{"owner": owner, "adapter": name, "more": count} for (owner, name), count in sorted(requests.items())]
    )


def _row(use: Use, tenant_id: int) -> dict[str, Any]:
    counts = {name: getattr(use, name) for name in _COUNTS}
    return {"hour": use.hour, "tenant_id": tenant_id, "adapter": use.adapter, "version": use.version} | {
        "key_id": use.key,
        **counts,
    }


def _tenant_id(connection: sa.Connection, tenant: str) -> int:
    found: int | None = connection.scalar(sa.select(tenants.c.id).where(tenants.c.name == tenant))
    if found is None:
        raise NotFound(f"there is no tenant {tenant!r}")
    return found


def _hours(connection: sa.Connection, condition: sa.ColumnElement[bool], first: datetime | None) -> Iterator[datetime]:
    """Yields the hours, from `first` on, in which something was used that meets a condition: each from an index."""
    query = sa.select(sa.func.min(usage.c.hour)).where(condition)
    hour = connection.scalar(query if first is None else query.where(usage.c.hour >= first))
    while hour is not None:
        yield hour
        hour = connection.scalar(query.where(usage.c.hour > hour))


def _sums(hour: datetime, by: Collection[Dimension], behind: Use | None, *, hides_platform: bool) -> sa.Select[Any]:
    key: sa.ColumnElement[str] = usage.c.key_id
    if hides_platform:
        # Other ids are hexadecimal. Without parameters, so that PostgreSQL finds it equal where it stands twice.
        is_of_platform = key > sa.literal_column("'g'")
        key = sa.case((is_of_platform, sa.literal_column("'platform'")), else_=key)
    known = {"adapter": usage.c.adapter, "version": usage.c.version, "key": key}
    columns = {"tenant": tenants.c.name} | {name: column for name, column in known.items() if name in by}
    query = (
        sa.select(
            usage.c.hour,
            *(column.label(name) for name, column in columns.items()),
            *(sa.cast(sa.func.sum(usage.c[name]), sa.BigInteger).label(name) for name in _COUNTS),
        )
        .select_from(usage.join(tenants, tenants.c.id == usage.c.tenant_id))
        .where(usage.c.hour == hour, sa.not_(tenants.c.deleted))
        .group_by(usage.c.hour, *columns.values())
        .order_by(*columns.values())
    )
    if behind is None:
        return query
    place = sa.tuple_(*(sa.literal(getattr(behind, name), column.type) for name, column in columns.items()))
    return query.where(sa.tuple_(*columns.values()) > place)
