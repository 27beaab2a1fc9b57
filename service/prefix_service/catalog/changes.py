"""The typed changes of a catalog: each mutation announces what it changed, and its transaction stores that.

A stored change has a revision. Revisions count from 1 without gaps. A transaction takes its own when it ends, from the
row of `catalog`, which stays locked until the commit: no revision becomes visible before all smaller ones. So whoever
knows the changes up to a revision asks for the later ones, and misses none.

The audit is written beside this, for people; no code reads it to find out what changed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Final

import sqlalchemy as sa

from prefix_service.catalog.records import Principal
from prefix_service.catalog.schema import catalog, changes, tenants
from prefix_service.errors import Gone

CHANNEL: Final = "prefix_changes"
"""The channel on which PostgreSQL notifies others of a commit with changes. It carries nothing else."""


@dataclass(frozen=True, slots=True)
class Change:
    """Anything that changed in the catalog. `kind` names its type in the database and over HTTP."""

    kind: ClassVar[str]


@dataclass(frozen=True, slots=True)
class EverythingChanged(Change):
    """Changes were missed: anything that is remembered may be untrue. It is never stored."""


@dataclass(frozen=True, slots=True)
class TenantChange(Change):
    """A change of a tenant itself."""

    tenant: str


@dataclass(frozen=True, slots=True)
class TenantCreated(TenantChange):
    """A tenant came into being."""

    kind = "tenant-created"


@dataclass(frozen=True, slots=True)
class QuotasChanged(TenantChange):
    """A tenant has other quotas."""

    kind = "quotas-changed"


@dataclass(frozen=True, slots=True)
class TenantDeleted(TenantChange):
    """A tenant was deleted, with its keys, adapters, versions and aliases."""

    kind = "tenant-deleted"


@dataclass(frozen=True, slots=True)
class KeyChange(Change):
    """A change of one key of a tenant, or with None of the platform."""

    tenant: str | None
    key_id: str


@dataclass(frozen=True, slots=True)
class KeyCreated(KeyChange):
    """A key was made."""

    kind = "key-created"


@dataclass(frozen=True, slots=True)
class KeyShortened(KeyChange):
    """A key ends earlier than before."""

    kind = "key-shortened"


@dataclass(frozen=True, slots=True)
class KeyRevoked(KeyChange):
    """A key was revoked."""

    kind = "key-revoked"


@dataclass(frozen=True, slots=True)
class AdapterChange(Change):
    """A change of an adapter, its versions or its aliases."""

    tenant: str
    adapter: str


@dataclass(frozen=True, slots=True)
class AdapterDeleted(AdapterChange):
    """An adapter was deleted, with its versions and aliases."""

    kind = "adapter-deleted"


@dataclass(frozen=True, slots=True)
class AliasMoved(AdapterChange):
    """An alias points at another version than before, or is new."""

    kind = "alias-moved"
    alias: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class AliasDeleted(AdapterChange):
    """An alias was deleted."""

    kind = "alias-deleted"
    alias: str


@dataclass(frozen=True, slots=True)
class VersionChange(AdapterChange):
    """A change of one version."""

    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class VersionPublished(VersionChange):
    """A version was published: `latest` means it."""

    kind = "version-published"


@dataclass(frozen=True, slots=True)
class VersionEncoded(VersionChange):
    """Other keys and values replaced those of a version, which were lost."""

    kind = "version-encoded"


@dataclass(frozen=True, slots=True)
class VersionDeleted(VersionChange):
    """A version was deleted; its adapter too, if it was the last one."""

    kind = "version-deleted"


@dataclass(frozen=True, slots=True)
class CardChanged(VersionChange):
    """A version has another model card."""

    kind = "card-changed"


@dataclass(frozen=True, slots=True)
class AnnotationsChanged(VersionChange):
    """A version has other annotations."""

    kind = "annotations-changed"


@dataclass(frozen=True, slots=True)
class BaseModelChanged(VersionChange):
    """A version has another fingerprint of its base model."""

    kind = "base-model-changed"


_STORED: Final[tuple[type[Change], ...]] = (
    TenantCreated,
    QuotasChanged,
    TenantDeleted,
    KeyCreated,
    KeyShortened,
    KeyRevoked,
    AdapterDeleted,
    AliasMoved,
    AliasDeleted,
    VersionPublished,
    VersionEncoded,
    VersionDeleted,
    CardChanged,
    AnnotationsChanged,
    BaseModelChanged,
)
KINDS: Final[Mapping[str, type[Change]]] = {found.kind: found for found in _STORED}
"""The types of stored changes."""


@dataclass(frozen=True, slots=True)
class StoredChange:
    """A change with its revision and the moment of its transaction."""

    revision: int
    time: datetime
    change: Change


@dataclass(frozen=True, slots=True)
class SeenChanges:
    """Changes that one caller may see, and the revision up to which they are complete."""

    revision: int
    changes: list[StoredChange]


_OF_ADMINS: Final = [kind for kind, found in KINDS.items() if issubclass(found, KeyChange | QuotasChanged)]


def announce(connection: sa.Connection, change: TenantChange | KeyChange | AdapterChange) -> None:
    """Store a change at the end of a write transaction; its tenant is the one that has the name now."""
    owner = sa.select(tenants.c.id).where(tenants.c.name == change.tenant)
    tenant_id = None if change.tenant is None else connection.scalar(owner)
    connection.get_execution_options()["announced"].append((tenant_id, change))


@dataclass(frozen=True, slots=True)
class Stored:
    """The revision of the last change that a transaction stored, and on PostgreSQL the transaction's id."""

    revision: int
    transaction: str | None


def store(connection: sa.Connection, announced: Sequence[tuple[int | None, Change]]) -> Stored | None:
    """Store what a transaction has announced, each with its tenant's id; returns None without any. The end of the
    transaction follows: other writers wait for the row of `catalog`. On PostgreSQL its commit notifies the others."""
    if not announced:
        return None
    taken = sa.update(catalog).values(revision=catalog.c.revision + len(announced))
    is_server = connection.dialect.name == "postgresql"
    own_id = sa.cast(sa.func.pg_current_xact_id(), sa.Text) if is_server else sa.null()
    last, transaction = connection.execute(taken.returning(catalog.c.revision, own_id)).one()
    first = last - len(announced) + 1
    for revision, (tenant_id, change) in enumerate(announced, first):
        row = {"kind": change.kind, "tenant_id": tenant_id, **dataclasses.asdict(change)}
        connection.execute(sa.insert(changes).values(revision=revision, **row))
    if is_server:
        connection.execute(sa.select(sa.func.pg_notify(CHANNEL, "")))
    return Stored(last, transaction)


def revision_of(connection: sa.Connection) -> int:
    """Returns the revision of the latest change; 0 before the first."""
    found: int = connection.execute(sa.select(catalog.c.revision)).scalar_one()
    return found


def catalog_id(connection: sa.Connection) -> str:
    """Returns the random id of the catalog, which it keeps for ever, in backups too."""
    found: str = connection.execute(sa.select(catalog.c.id)).scalar_one()
    return found


def changes_after(connection: sa.Connection, revision: int, limit: int) -> tuple[int, list[StoredChange]]:
    """Returns the catalog's revision, and up to `limit` of the changes after another one, oldest first."""
    later = catalog.outerjoin(changes, changes.c.revision > sa.literal(revision, sa.BigInteger))
    query = sa.select(catalog.c.revision.label("latest"), changes).select_from(later)
    rows = connection.execute(query.order_by(changes.c.revision).limit(limit)).all()
    return rows[0].latest, [stored_change(row) for row in rows if row.kind is not None]


def seen_changes(connection: sa.Connection, by: Principal, since: int | None, limit: int) -> SeenChanges:
    """Returns up to `limit` changes after a revision, oldest first, that a caller may see: those of its own tenant, or
    for the platform of all. Changes of keys and quotas are for admins. None for the present revision and no changes.

    Raises:
        Gone: some of the changes since then are no longer kept, or they are another catalog's.
    """
    latest = revision_of(connection)
    if since is None or since == latest:
        return SeenChanges(latest, [])
    oldest = connection.scalar(sa.select(sa.func.min(changes.c.revision)))
    if since > latest or oldest is None or since + 1 < oldest:
        raise Gone("changes since this revision are no longer kept: read everything again, then follow from now on")
    query = sa.select(changes).where(changes.c.revision > since).order_by(changes.c.revision).limit(limit)
    if by.tenant is not None:
        query = query.where(changes.c.tenant_id == by.tenant_id)
    if not by.has("admin"):
        query = query.where(changes.c.kind.not_in(_OF_ADMINS))
    found = [stored_change(row) for row in connection.execute(query)]
    return SeenChanges(found[-1].revision if len(found) == limit else latest, found)


def stored_change(row: sa.Row[Any]) -> StoredChange:
    """Returns the change in a row of `changes`."""
    make: Callable[..., Change] = KINDS[row.kind]
    names = (field.name for field in dataclasses.fields(KINDS[row.kind]))
    return StoredChange(row.revision, row.at, make(**{name: row._mapping[name] for name in names}))
