"""Who owns what: tenants, adapters, immutable versions and aliases, in one database."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from service.catalog.database import Database
from service.catalog.records import Adapter, NewVersion, Version
from service.catalog.schema import adapters, aliases, numbers, tenants, versions
from service.errors import Conflict, NotFound, PreconditionFailed
from service.prefix.references import Reference

_VERSION: Final = sa.select(versions, tenants.c.name.label("tenant"), adapters.c.name.label("adapter")).select_from(
    versions.join(adapters, versions.c.adapter_id == adapters.c.id).join(tenants, adapters.c.tenant_id == tenants.c.id)
)


class Catalog:
    """Blocking; call it from a thread. Every method is one transaction, durable when it returns.

    Any method may also raise OutOfSpace or StorageFailed, when the database refuses.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def check(self) -> None:
        """Whether the database answers."""
        with self._database.reading() as connection:
            connection.execute(sa.select(1))

    def add_tenant(self, name: str) -> bool:
        """Make a tenant; False if it existed."""
        with self._database.writing() as connection:
            statement = insert(tenants).values(name=name).on_conflict_do_nothing()
            return connection.execute(statement).rowcount == 1

    def has_tenant(self, name: str) -> bool:
        """Whether there is such a tenant."""
        with self._database.reading() as connection:
            return connection.scalar(sa.select(tenants.c.id).where(tenants.c.name == name)) is not None

    def list_tenants(self, after: str, limit: int) -> list[str]:
        """Up to `limit` tenants in the order of their names, beginning behind `after`."""
        with self._database.reading() as connection:
            query = sa.select(tenants.c.name).where(tenants.c.name > after).order_by(tenants.c.name).limit(limit)
            return list(connection.scalars(query))

    def add_version(
        self, tenant: str, adapter: str, new: NewVersion, *, make_tenant: bool = False
    ) -> tuple[Version, bool]:
        """Make a version visible under the next number, and whether it is new: the same digest is the same version.
        With `make_tenant` its tenant comes into being with it.

        Raises:
            NotFound: there is no such tenant.
        """
        with self._database.writing() as connection:
            if make_tenant:
                connection.execute(insert(tenants).values(name=tenant).on_conflict_do_nothing())
            tenant_id = connection.scalar(sa.select(tenants.c.id).where(tenants.c.name == tenant))
            if tenant_id is None:
                raise NotFound(f"there is no tenant {tenant!r}")
            connection.execute(insert(adapters).values(tenant_id=tenant_id, name=adapter).on_conflict_do_nothing())
            adapter_id = _adapter_id(connection, tenant, adapter)
            existing = _one(connection, adapter_id, versions.c.digest == new.digest)
            if existing is not None:
                return existing, False
            counted = insert(numbers).values(tenant=tenant, adapter=adapter, last=1)
            number = connection.scalar(
                counted.on_conflict_do_update(
                    index_elements=["tenant", "adapter"], set_={"last": numbers.c.last + 1}
                ).returning(numbers.c.last)
            )
            connection.execute(sa.insert(versions).values(adapter_id=adapter_id, number=number, **asdict(new)))
            return _required(_one(connection, adapter_id, versions.c.number == number)), True

    def resolve(self, tenant: str, reference: Reference) -> Version:
        """The version that a reference means now.

        Raises:
            NotFound: there is none.
        """
        with self._database.reading() as connection:
            adapter_id = _adapter_id(connection, tenant, reference.adapter)
            found = _one(connection, adapter_id, _selected(adapter_id, reference))
        if found is None:
            raise NotFound(f"there is no {tenant}/{reference}")
        return found

    def set_key_values(self, version: Version, digest: str) -> None:
        """Note the blob that a version's keys and values are in after they had to be made anew."""
        with self._database.writing() as connection:
            adapter_id = _adapter_id(connection, version.tenant, version.adapter)
            row = (versions.c.adapter_id == adapter_id, versions.c.number == version.number)
            connection.execute(sa.update(versions).where(*row).values(key_values=digest))

    def versions_of(self, tenant: str, adapter: str) -> list[Version]:
        """Every version of an adapter, newest first.

        Raises:
            NotFound: there is no such adapter.
        """
        with self._database.reading() as connection:
            adapter_id = _adapter_id(connection, tenant, adapter)
            query = _VERSION.where(versions.c.adapter_id == adapter_id).order_by(versions.c.number.desc())
            return [_version(row) for row in connection.execute(query)]

    def list_adapters(self, tenant: str, *, after: str, limit: int, base_model: str | None) -> list[Adapter]:
        """Up to `limit` adapters in the order of their names, beginning behind `after`."""
        every = versions.alias()
        count = sa.select(sa.func.count()).where(every.c.adapter_id == adapters.c.id).correlate(adapters)
        newest = sa.select(sa.func.max(every.c.number)).where(every.c.adapter_id == adapters.c.id).correlate(adapters)
        query = (
            _VERSION.add_columns(versions.c.adapter_id, count.scalar_subquery().label("total"))
            .where(tenants.c.name == tenant, adapters.c.name > after)
            .where(versions.c.number == newest.scalar_subquery())
            .order_by(adapters.c.name)
            .limit(limit)
        )
        if base_model is not None:
            query = query.where(versions.c.base_model == base_model)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
            named = _aliases_of(connection, [row.adapter_id for row in rows])
        return [Adapter(_version(row), row.total, named.get(row.adapter_id, {})) for row in rows]

    def aliases_of(self, tenant: str, adapter: str) -> dict[str, int]:
        """The aliases of an adapter and the version numbers that they point at.

        Raises:
            NotFound: there is no such adapter.
        """
        with self._database.reading() as connection:
            adapter_id = _adapter_id(connection, tenant, adapter)
            return _aliases_of(connection, [adapter_id])[adapter_id]

    def put_alias(self, tenant: str, adapter: str, alias: str, number: int, expected: int | None = -1) -> bool:
        """Point an alias at a version; whether it is new. `expected` is where it must point now: a number, None for
        nowhere, -1 for anywhere.

        Raises:
            NotFound: there is no such adapter or version.
            PreconditionFailed: it does not point where `expected` says.
        """
        with self._database.writing() as connection:
            adapter_id = _adapter_id(connection, tenant, adapter)
            if _one(connection, adapter_id, versions.c.number == number) is None:
                raise NotFound(f"there is no {tenant}/{adapter}@{number}")
            current = _require_target(connection, adapter_id, alias, expected)
            values = insert(aliases).values(adapter_id=adapter_id, name=alias, number=number)
            connection.execute(
                values.on_conflict_do_update(index_elements=["adapter_id", "name"], set_={"number": number})
            )
            return current is None

    def delete_alias(self, tenant: str, adapter: str, alias: str, expected: int | None = -1) -> None:
        """Forget an alias; `expected` as in `put_alias`.

        Raises:
            NotFound: there is no such adapter or alias.
            PreconditionFailed: it does not point where `expected` says.
        """
        with self._database.writing() as connection:
            adapter_id = _adapter_id(connection, tenant, adapter)
            _require_target(connection, adapter_id, alias, expected)
            gone = sa.delete(aliases).where(aliases.c.adapter_id == adapter_id, aliases.c.name == alias)
            if connection.execute(gone).rowcount == 0:
                raise NotFound(f"{tenant}/{adapter} has no alias {alias!r}")

    def delete(self, tenant: str, reference: Reference) -> None:
        """Delete an adapter, or one version of it.

        Raises:
            NotFound: there is no such thing.
            Conflict: an alias points at the version.
        """
        with self._database.writing() as connection:
            adapter_id = _adapter_id(connection, tenant, reference.adapter)
            if reference.explicit:
                found = _one(connection, adapter_id, _selected(adapter_id, reference))
                if found is None:
                    raise NotFound(f"there is no {tenant}/{reference}")
                pointing = [
                    n for n, v in _aliases_of(connection, [adapter_id])[adapter_id].items() if v == found.number
                ]
                if pointing:
                    raise Conflict(f"alias {', '.join(pointing)} points at {tenant}/{reference}: move it first")
                connection.execute(
                    sa.delete(versions).where(versions.c.adapter_id == adapter_id, versions.c.number == found.number)
                )
            left = connection.scalar(sa.select(sa.func.count()).where(versions.c.adapter_id == adapter_id))
            if not reference.explicit or left == 0:
                connection.execute(sa.delete(adapters).where(adapters.c.id == adapter_id))


def _adapter_id(connection: sa.Connection, tenant: str, adapter: str) -> int:
    query = sa.select(adapters.c.id).join(tenants).where(tenants.c.name == tenant, adapters.c.name == adapter)
    found: int | None = connection.scalar(query)
    if found is None:
        raise NotFound(f"there is no {tenant}/{adapter}")
    return found


def _selected(adapter_id: int, reference: Reference) -> sa.ColumnElement[bool]:
    if reference.version is not None:
        return versions.c.number == reference.version
    if reference.digest is not None:
        return versions.c.digest == reference.digest
    if reference.selector == "latest":
        newest = sa.select(sa.func.max(versions.c.number)).where(versions.c.adapter_id == adapter_id)
        return versions.c.number == newest.scalar_subquery()
    target = sa.select(aliases.c.number).where(aliases.c.adapter_id == adapter_id, aliases.c.name == reference.selector)
    return versions.c.number == target.scalar_subquery()


def _one(connection: sa.Connection, adapter_id: int, condition: sa.ColumnElement[bool]) -> Version | None:
    row = connection.execute(_VERSION.where(versions.c.adapter_id == adapter_id, condition)).one_or_none()
    return None if row is None else _version(row)


def _required(version: Version | None) -> Version:
    if version is None:
        raise AssertionError("a version vanished inside its own transaction")
    return version


def _version(row: sa.Row[Any]) -> Version:
    return Version(**{name: row._mapping[name] for name in Version.__dataclass_fields__})


def _require_target(connection: sa.Connection, adapter_id: int, alias: str, expected: int | None) -> int | None:
    current = _aliases_of(connection, [adapter_id])[adapter_id].get(alias)
    if expected not in (-1, current):
        raise PreconditionFailed(f"alias {alias!r} points at {'nothing' if current is None else current}")
    return current


def _aliases_of(connection: sa.Connection, adapter_ids: Sequence[int]) -> dict[int, dict[str, int]]:
    query = sa.select(aliases).where(aliases.c.adapter_id.in_(adapter_ids)).order_by(aliases.c.name)
    named: dict[int, dict[str, int]] = {adapter_id: {} for adapter_id in adapter_ids}
    for row in connection.execute(query):
        named[row.adapter_id][row.name] = row.number
    return named
