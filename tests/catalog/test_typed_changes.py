"""`catalog.changes`: which changes each mutation stores, and in which order they become visible."""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.changes import (
    KINDS,
    AdapterDeleted,
    AliasDeleted,
    AliasMoved,
    AnnotationsChanged,
    BaseModelChanged,
    CardChanged,
    Change,
    KeyCreated,
    KeyRevoked,
    KeyShortened,
    QuotasChanged,
    TenantCreated,
    TenantDeleted,
    VersionDeleted,
    VersionEncoded,
    VersionPublished,
    announce,
    changes_after,
    revision_of,
    store,
)
from prefix_service.catalog.database import Database
from prefix_service.catalog.descriptions import Descriptions
from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import Quotas
from prefix_service.catalog.schema import changes
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import NotFound
from prefix_service.prefix.description import Description
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, Content, HoldingCatalog
from tests.catalog.test_feed import acme, elsewhere

__all__ = ["acme", "elsewhere"]  # fixtures


def stored(database: Database, since: int) -> list[Change]:
    with database.reading() as connection:
        return [one.change for one in changes_after(connection, since, 99)[1]]


def latest(database: Database) -> int:
    with database.reading() as connection:
        return revision_of(connection)


class Mutations:
    """Every mutation of a catalog in which `acme/a` has two versions and an alias."""

    def __init__(self, database: Database, keyring: Keyring, content: Content) -> None:
        self.catalog, self.tenants, self.keyring = HoldingCatalog(database), Tenants(database), keyring
        self._descriptions, self._content = Descriptions(database), content
        self.key = keyring.create("acme", "read", "", BY)[0].id
        self.digests = [self.catalog.resolve("acme", parse_reference(f"a@{number}")).digest for number in (1, 2)]

    def describe(self, what: str, description: Description) -> None:
        version = self.catalog.resolve("acme", parse_reference("a@1"))
        self._descriptions.change(version, BY, what, lambda _: description)

    def publish(self) -> None:
        self.catalog.add_version("beta", "a", self._content("x"), BY, make_tenant=True)

    def encode_again(self) -> None:
        version = self.catalog.resolve("acme", parse_reference("a@1"))
        self.catalog.replace_key_values(version, "sha256:other")

    def create_key(self) -> None:
        self.key = self.keyring.create(None, "read", "", BY)[0].id


MUTATIONS: dict[str, tuple[Callable[[Mutations], object], Callable[[Mutations], list[Change]]]] = {
    "tenant": (lambda do: do.tenants.put("beta", BY), lambda _: [TenantCreated("beta")]),
    "quotas": (lambda do: do.tenants.put("acme", BY, Quotas(9)), lambda _: [QuotasChanged("acme")]),
    "no tenant": (lambda do: do.tenants.delete("acme", BY), lambda _: [TenantDeleted("acme")]),
    "key": (Mutations.create_key, lambda do: [KeyCreated(None, do.key)]),
    "shorter key": (
        lambda do: do.keyring.shorten("acme", do.key, datetime.now(UTC) + timedelta(hours=1), BY),
        lambda do: [KeyShortened("acme", do.key)],
    ),
    "no key": (lambda do: do.keyring.revoke("acme", do.key, BY), lambda do: [KeyRevoked("acme", do.key)]),
    "version": (
        Mutations.publish,
        lambda do: [TenantCreated("beta"), VersionPublished("beta", "a", 1, do.digests[0])],
    ),
    "encoded version": (Mutations.encode_again, lambda do: [VersionEncoded("acme", "a", 1, do.digests[0])]),
    "card": (
        lambda do: do.describe("card", Description("x", {})),
        lambda do: [CardChanged("acme", "a", 1, do.digests[0])],
    ),
    "annotations": (
        lambda do: do.describe("annotations", Description("", {"a": "b"})),
        lambda do: [AnnotationsChanged("acme", "a", 1, do.digests[0])],
    ),
    "fingerprint": (
        lambda do: do.describe("base-model", Description(fingerprint="{}")),
        lambda do: [BaseModelChanged("acme", "a", 1, do.digests[0])],
    ),
    "alias": (
        lambda do: do.catalog.put_alias("acme", "a", "prod", 2, BY),
        lambda do: [AliasMoved("acme", "a", "prod", 2, do.digests[1])],
    ),
    "no alias": (
        lambda do: do.catalog.delete_alias("acme", "a", "prod", BY),
        lambda _: [AliasDeleted("acme", "a", "prod")],
    ),
    "no version": (
        lambda do: do.catalog.delete("acme", parse_reference("a@2"), BY),
        lambda do: [VersionDeleted("acme", "a", 2, do.digests[1])],
    ),
    "no adapter": (
        lambda do: do.catalog.delete("acme", parse_reference("a"), BY),
        lambda _: [AdapterDeleted("acme", "a")],
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_mutation_stores_its_changes(
    database: Database, keyring: Keyring, content: Content, audit: AuditLog, mutation: str
) -> None:
    """Each mutation stores its changes with all names that listeners need, under revisions without gaps, and adds a
    line to the audit."""
    do = Mutations(database, keyring, content)
    before, lines = latest(database), len(audit.listed(None, before=None, limit=99))
    mutate, expected = MUTATIONS[mutation]
    mutate(do)
    found = stored(database, before)
    assert found == expected(do)
    assert latest(database) == before + len(found)
    assert len(audit.listed(None, before=None, limit=99)) == lines + len(found)


def test_every_type_is_stored_by_a_mutation(database: Database, keyring: Keyring, content: Content) -> None:
    """Every type of change is stored by a mutation in these tests, and no other type is."""
    do = Mutations(database, keyring, content)
    assert {type(change) for _, expected in MUTATIONS.values() for change in expected(do)} == set(KINDS.values())


def fail(database: Database) -> None:
    """Announces a change in a transaction that then fails."""
    with database.writing() as connection:
        announce(connection, TenantCreated("never"))
        raise ZeroDivisionError


@pytest.mark.usefixtures("acme")
def test_what_changes_nothing_stores_nothing(database: Database, catalog: Catalog, tenants: Tenants) -> None:
    """A mutation that changes nothing stores no change, and neither does one that fails after it was announced."""
    before = latest(database)
    tenants.put("acme", BY)
    catalog.put_alias("acme", "a", "prod", 1, BY)
    with pytest.raises(NotFound):
        catalog.put_alias("acme", "a", "prod", 7, BY)
    with pytest.raises(ZeroDivisionError):
        fail(database)
    assert latest(database) == before
    assert stored(database, before) == []


def test_a_change_belongs_to_the_tenant_of_its_time(database: Database, tenants: Tenants) -> None:
    """A change has the id of its tenant, which a later namesake does not share."""
    tenants.delete("acme", BY)
    tenants.put("acme", BY)
    with database.reading() as connection:
        owners = connection.scalars(sa.select(changes.c.tenant_id).order_by(changes.c.revision)).all()
    assert len(set(owners)) == 2
    assert owners[-2:] == [owners[0], tenants.require("acme")]


def waits_for_a_lock(database: Database) -> bool:
    """Returns whether a session of PostgreSQL waits for another."""
    with database.reading() as connection:
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return bool(connection.scalar(sa.text(waiting)))


def test_no_revision_becomes_visible_before_a_smaller_one(
    database: Database, elsewhere: Database, tenants: Tenants
) -> None:
    """Of two interleaved transactions the second, which is ready to commit first, waits until the first has
    committed."""
    is_postgresql = database._reads.engine.dialect.name == "postgresql"
    feed, heard = ChangeFeed(database), list[Change]()
    feed.listen(heard.extend)
    second = threading.Thread(target=Tenants(elsewhere).put, args=("second", BY))
    with database.writing() as connection:
        announced = connection.get_execution_options()["announced"]
        announce(connection, TenantCreated("first"))
        store(connection, announced)  # it has taken its revision, and has not committed
        announced.clear()
        second.start()
        deadline = time.monotonic() + 30
        while is_postgresql and not waits_for_a_lock(elsewhere) and second.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert second.is_alive()
        feed.catch_up()
        assert heard == []
    second.join(30)
    feed.catch_up()
    assert heard == [TenantCreated("first"), TenantCreated("second")]
