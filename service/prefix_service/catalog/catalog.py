"""Adapters, their immutable versions, and aliases."""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import asdict
from typing import Final

import sqlalchemy as sa

from prefix_service.catalog.audit import record
from prefix_service.catalog.authority import prove_in, writing_for
from prefix_service.catalog.changes import (
    AdapterDeleted,
    AliasDeleted,
    AliasMoved,
    VersionDeleted,
    VersionEncoded,
    VersionPublished,
    announce,
)
from prefix_service.catalog.database import Database, insert
from prefix_service.catalog.deletions import hide_adapter, let_go
from prefix_service.catalog.descriptions import nbytes_of, store
from prefix_service.catalog.freed import note
from prefix_service.catalog.garbage import hold, require_held
from prefix_service.catalog.quotas import Room, require_room_for_version, room
from prefix_service.catalog.records import SERVICE, NewVersion, Principal, Version
from prefix_service.catalog.rows import VERSION, aliases_of, find_adapter, missing, version_of
from prefix_service.catalog.schema import adapters, aliases, numbers, tenants, versions
from prefix_service.catalog.tenants import count, lock, make
from prefix_service.errors import Conflict, NotFound, PreconditionFailed
from prefix_service.prefix.description import EMPTY, Description
from prefix_service.prefix.references import Reference

MOST_ALIASES: Final = 1000
"""Aliases that an adapter may have: a listing shows all of them."""


class Catalog:
    """Blocking; call it from a thread. Every method is one transaction, durable when it returns.

    Any method may also raise OutOfSpace or StorageFailed, when the database refuses.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def check(self) -> None:
        """That the database answers, and its tables are there."""
        with self._database.reading() as connection:
            connection.execute(sa.select(versions.c.id).limit(1))

    def find(
        self, tenant: str, adapter: str, digest: str, nbytes: int, by: Principal, *, make_tenant: bool = False
    ) -> Version | None:
        """The version that has this content already; None if it would be a new one, and there is room for its bytes.

        Raises:
            Unauthenticated: `by` has no authority any more.
            NotFound: there is no such tenant, and it may not come into being.
            QuotaExceeded: the tenant's quotas do not allow it.
        """
        with self._database.reading() as connection:
            prove_in(connection, by)
            owner = connection.execute(sa.select(tenants).where(tenants.c.name == tenant)).one_or_none()
            if owner is None:
                if make_tenant:
                    return None
                raise NotFound(f"there is no tenant {tenant!r}")
            existing = _same(connection, owner.id, adapter, digest)
            if existing is None:
                require_room_for_version(connection, owner, adapter, nbytes)
            return existing

    def room(self, tenant: str, adapter: str, *, make_tenant: bool = False) -> Room:
        """Returns what the tenant's quotas leave for a version of an adapter, before anything is known of it.

        Raises:
            NotFound: there is no such tenant, and it may not come into being.
            QuotaExceeded: the tenant may have no more adapters.
        """
        with self._database.reading() as connection:
            owner = connection.execute(sa.select(tenants).where(tenants.c.name == tenant)).one_or_none()
            if owner is not None:
                return room(connection, owner, adapter)
        if make_tenant:
            return Room()
        raise NotFound(f"there is no tenant {tenant!r}")

    def add_version(
        self,
        tenant: str,
        adapter: str,
        new: NewVersion,
        by: Principal,
        *,
        description: Description = EMPTY,
        make_tenant: bool = False,
    ) -> tuple[Version, bool]:
        """Make a version visible under the next number, with its description, and whether it is new: the same digest is
        the same version, which keeps the description that it has. With `make_tenant` its tenant comes into being with
        it. Its blobs are held, and stored.

        Raises:
            Unauthenticated: `by` has no authority any more.
            NotFound: there is no such tenant.
            QuotaExceeded: the tenant's quotas do not allow it.
            Unavailable: its blobs are not held any more.
        """
        with writing_for(self._database, by) as connection:
            if make_tenant:
                make(connection, tenant, by)
            owner = lock(connection, tenant)
            existing = _same(connection, owner.id, adapter, new.digest)
            if existing is not None:
                return existing, False
            require_held(connection, (new.weights, new.key_values))
            nbytes = new.nbytes + description.nbytes
            require_room_for_version(connection, owner, adapter, nbytes)
            made = insert(connection, adapters).values(tenant_id=owner.id, name=adapter).on_conflict_do_nothing()
            is_first = connection.scalar(made.returning(adapters.c.id)) is not None
            adapter_id = find_adapter(connection, tenant, adapter)
            number = _next_number(connection, tenant, adapter)
            row = {"adapter_id": adapter_id, "number": number, "manifest_bytes": new.manifest_bytes, **asdict(new)}
            version_id = connection.execute(sa.insert(versions).values(row).returning(versions.c.id)).scalar_one()
            if description != EMPTY:
                store(connection, version_id, description)
            count(connection, adapter_id, adapters_more=int(is_first), versions_more=1, bytes_more=nbytes)
            record(connection, by, "version.published", tenant, f"{tenant}/{adapter}@{number}", digest=new.digest)
            announce(connection, VersionPublished(tenant, adapter, number, new.digest))
            return _required(_one(connection, adapter_id, versions.c.number == number)), True

    def hold(self, digests: Collection[str]) -> bool:
        """Keeps blobs that are about to be stored and named from being collected, for the grace period; returns False
        if a collector is removing one of them at this moment."""
        with self._database.writing() as connection:
            return hold(connection, digests)

    def abandon(self, tenant_id: int, adapter: str, digest: str, nbytes: int) -> None:
        """Counts the stored bytes of a version that did not come into being, like those of one that was deleted. The
        tenant is named by its id: one that was made again under the same name has stored nothing."""
        with self._database.writing() as connection:
            present = sa.select(tenants.c.id).where(tenants.c.id == tenant_id, sa.not_(tenants.c.deleted))
            if connection.scalar(present) is not None and _same(connection, tenant_id, adapter, digest) is None:
                note(connection, {tenant_id: nbytes})

    def resolve(self, tenant: str, reference: Reference) -> Version:
        """The version that a reference means now.

        Raises:
            NotFound: there is none.
        """
        with self._database.reading() as connection:
            adapter_id = find_adapter(connection, tenant, reference.adapter)
            found = _one(connection, adapter_id, _selected(adapter_id, reference))
        if found is None:
            raise NotFound(f"there is no {tenant}/{reference}")
        return found

    def replace_key_values(self, version: Version, digest: str) -> Version:
        """Makes `digest`, which is held and stored, the blob of a version's keys and values, unless another call has
        replaced that blob since `version` was read; returns the version as the catalog has it now.

        Raises:
            NotFound: the version was deleted meanwhile.
            Unavailable: the blob is not held any more.
        """
        with writing_for(self._database, SERVICE) as connection:
            require_held(connection, (digest,))
            adapter_id = find_adapter(connection, version.tenant, version.adapter)
            row = (versions.c.adapter_id == adapter_id, versions.c.number == version.number)
            expected = versions.c.key_values == version.key_values
            target = f"{version.tenant}/{version.adapter}@{version.number}"
            if connection.execute(sa.update(versions).where(*row, expected).values(key_values=digest)).rowcount:
                details = {"digest": version.digest, "key_values": digest}
                record(connection, SERVICE, "version.encoded", version.tenant, target, **details)
                change = VersionEncoded(version.tenant, version.adapter, version.number, version.digest)
                announce(connection, change)
            current = _one(connection, adapter_id, versions.c.number == version.number)
        if current is None:
            raise NotFound(f"there is no {target}")
        return current

    def aliases_of(self, tenant: str, adapter: str) -> dict[str, int]:
        """The aliases of an adapter and the version numbers that they point at.

        Raises:
            NotFound: there is no such adapter.
        """
        with self._database.reading() as connection:
            adapter_id = find_adapter(connection, tenant, adapter)
            return aliases_of(connection, [adapter_id])[adapter_id]

    def alias(self, tenant: str, adapter: str, alias: str) -> tuple[int, int | None]:
        """Returns the number of the version that an alias points at, and of the one that it pointed at before, if any.

        Raises:
            NotFound: there is no such adapter or alias.
        """
        with self._database.reading() as connection:
            adapter_id = find_adapter(connection, tenant, adapter)
            query = sa.select(aliases.c.number, aliases.c.previous)
            found = connection.execute(query.where(aliases.c.adapter_id == adapter_id, aliases.c.name == alias)).first()
        if found is None:
            raise NotFound(f"{tenant}/{adapter} has no alias {alias!r}")
        return found.number, found.previous

    def put_alias(
        self, tenant: str, adapter: str, alias: str, number: int, by: Principal, expected: int | None = -1
    ) -> bool:
        """Point an alias at a version; whether it is new. `expected` is where it must point now: a number, None for
        nowhere, -1 for anywhere.

        Raises:
            Unauthenticated: `by` has no authority any more.
            NotFound: there is no such adapter or version.
            PreconditionFailed: it does not point where `expected` says.
            Conflict: the adapter has as many aliases as it may have.
        """
        with self._changing(tenant, adapter, by) as (connection, adapter_id):
            version = _one(connection, adapter_id, _numbered(number))
            if version is None:
                raise NotFound(f"there is no {tenant}/{adapter}@{number}")
            current = _require_target(connection, adapter_id, alias, expected)
            if current is None:
                _require_fewer_aliases(connection, adapter_id, f"{tenant}/{adapter}")
            if current != number:
                moved = {"number": number, "previous": current}
                values = insert(connection, aliases).values(adapter_id=adapter_id, name=alias, **moved)
                connection.execute(values.on_conflict_do_update(index_elements=["adapter_id", "name"], set_=moved))
                target = f"{tenant}/{adapter}@{alias}"
                record(connection, by, "alias.moved", tenant, target, version=number, before=current)
                announce(connection, AliasMoved(tenant, adapter, alias, number, version.digest))
            return current is None

    def delete_alias(self, tenant: str, adapter: str, alias: str, by: Principal, expected: int | None = -1) -> None:
        """Forget an alias; `expected` as in `put_alias`.

        Raises:
            Unauthenticated: `by` has no authority any more.
            NotFound: there is no such adapter or alias.
            PreconditionFailed: it does not point where `expected` says.
        """
        with self._changing(tenant, adapter, by, frees=True) as (connection, adapter_id):
            current = _require_target(connection, adapter_id, alias, expected)
            gone = sa.delete(aliases).where(aliases.c.adapter_id == adapter_id, aliases.c.name == alias)
            if connection.execute(gone).rowcount == 0:
                raise NotFound(f"{tenant}/{adapter} has no alias {alias!r}")
            record(connection, by, "alias.deleted", tenant, f"{tenant}/{adapter}@{alias}", before=current)
            announce(connection, AliasDeleted(tenant, adapter, alias))

    def delete(self, tenant: str, reference: Reference, by: Principal) -> None:
        """Deletes an adapter, or one version of it. An adapter is deleted with its last version.

        Raises:
            Unauthenticated: `by` has no authority any more.
            NotFound: there is no such thing.
            Conflict: an alias points at the version.
        """
        with self._changing(tenant, reference.adapter, by, frees=True) as (connection, adapter_id):
            if reference.explicit:
                gone = _one(connection, adapter_id, _selected(adapter_id, reference))
                if gone is None:
                    raise NotFound(f"there is no {tenant}/{reference}")
                _require_no_alias(connection, adapter_id, gone.number, f"{tenant}/{reference}")
                left = _delete_version(connection, adapter_id, gone)
                details = {"versions": [gone.number], "digests": [gone.digest]}
                record(connection, by, "version.deleted", tenant, f"{tenant}/{reference}", **details)
                announce(connection, VersionDeleted(tenant, reference.adapter, gone.number, gone.digest))
                if left:
                    return
            else:
                total = connection.scalar(sa.select(adapters.c.versions).where(adapters.c.id == adapter_id))
                record(connection, by, "adapter.deleted", tenant, f"{tenant}/{reference}", versions=total)
                announce(connection, AdapterDeleted(tenant, reference.adapter))
            hide_adapter(connection, adapter_id)

    @contextlib.contextmanager
    def _changing(
        self, tenant: str, adapter: str, by: Principal, *, frees: bool = False
    ) -> Iterator[tuple[sa.Connection, int]]:
        """A write transaction of `by` on an adapter that exists, alone among the changes of its tenant."""
        with writing_for(self._database, by, frees=frees) as connection:
            try:
                lock(connection, tenant)
            except NotFound as error:
                raise missing(tenant, adapter) from error
            yield connection, find_adapter(connection, tenant, adapter)


def _same(connection: sa.Connection, tenant_id: int, adapter: str, digest: str) -> Version | None:
    owned = sa.and_(adapters.c.tenant_id == tenant_id, adapters.c.name == adapter)
    row = connection.execute(VERSION.where(owned, versions.c.digest == digest)).one_or_none()
    return None if row is None else version_of(row)


def _delete_version(connection: sa.Connection, adapter_id: int, version: Version) -> int:
    """Deletes one version; returns how many its adapter has left."""
    condition = sa.and_(versions.c.adapter_id == adapter_id, versions.c.number == version.number)
    nbytes = version.nbytes + nbytes_of(connection, condition)
    let_go(connection, condition)
    connection.execute(sa.delete(versions).where(condition))
    count(connection, adapter_id, versions_more=-1, bytes_more=-nbytes)
    left: int = connection.execute(sa.select(adapters.c.versions).where(adapters.c.id == adapter_id)).scalar_one()
    return left


def _next_number(connection: sa.Connection, tenant: str, adapter: str) -> int:
    counted = insert(connection, numbers).values(tenant=tenant, adapter=adapter, last=1)
    counted = counted.on_conflict_do_update(index_elements=["tenant", "adapter"], set_={"last": numbers.c.last + 1})
    number: int = connection.execute(counted.returning(numbers.c.last)).scalar_one()
    return number


def _require_no_alias(connection: sa.Connection, adapter_id: int, number: int, reference: str) -> None:
    pointing = [name for name, target in aliases_of(connection, [adapter_id])[adapter_id].items() if target == number]
    if pointing:
        raise Conflict(f"alias {', '.join(pointing)} points at {reference}: move it first")


def _require_fewer_aliases(connection: sa.Connection, adapter_id: int, adapter: str) -> None:
    found = connection.scalar(sa.select(sa.func.count()).where(aliases.c.adapter_id == adapter_id)) or 0
    if found >= MOST_ALIASES:
        raise Conflict(f"{adapter} has {found} aliases, and may have {MOST_ALIASES}: delete one first")


def _numbered(number: int) -> sa.ColumnElement[bool]:
    # A caller's number may be larger than the column's, which on PostgreSQL would not even compare.
    return versions.c.number == sa.literal(number, sa.BigInteger)


def _selected(adapter_id: int, reference: Reference) -> sa.ColumnElement[bool]:
    if reference.version is not None:
        return _numbered(reference.version)
    if reference.digest is not None:
        return versions.c.digest == reference.digest
    if reference.selector == "latest":
        newest = sa.select(sa.func.max(versions.c.number)).where(versions.c.adapter_id == adapter_id)
        return versions.c.number == newest.scalar_subquery()
    target = sa.select(aliases.c.number).where(aliases.c.adapter_id == adapter_id, aliases.c.name == reference.selector)
    return versions.c.number == target.scalar_subquery()


def _one(connection: sa.Connection, adapter_id: int, condition: sa.ColumnElement[bool]) -> Version | None:
    row = connection.execute(VERSION.where(versions.c.adapter_id == adapter_id, condition)).one_or_none()
    return None if row is None else version_of(row)


def _required(version: Version | None) -> Version:
    if version is None:
        raise AssertionError("a version vanished inside its own transaction")
    return version


def _require_target(connection: sa.Connection, adapter_id: int, alias: str, expected: int | None) -> int | None:
    current = aliases_of(connection, [adapter_id])[adapter_id].get(alias)
    if expected not in (-1, current):
        raise PreconditionFailed(f"alias {alias!r} points at {'nothing' if current is None else current}")
    return current
