"""`catalog.authority`: each transaction that writes proves by ids that its caller may do so."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.authority import prove, writing_for
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.records import COMMAND_LINE, DEV, SERVICE, Principal, Quotas
from prefix_service.catalog.schema import garbage, keys, metadata
from prefix_service.catalog.sessions import Sessions
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import NotFound, Unauthenticated
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, Content, on_postgresql

Change = Callable[[Principal], object]


@pytest.fixture
def changes(
    tenants: Tenants, catalog: Catalog, keyring: Keyring, audit: AuditLog, content: Content
) -> dict[str, Change]:
    """Returns every method of the catalog that changes something for a caller."""
    tenants.put("acme", BY)
    for word in "xy":
        catalog.add_version("acme", "a", content(word), BY)
    catalog.put_alias("acme", "a", "prod", 1, BY)
    key, _ = keyring.create("acme", "read", "", BY)
    return {
        "put": lambda by: tenants.put("acme", by, Quotas(max_adapters=9)),
        "delete tenant": lambda by: tenants.delete("acme", by),
        "create": lambda by: keyring.create("acme", "admin", "", by),
        "create platform": lambda by: keyring.create(None, "admin", "", by),
        "shorten": lambda by: keyring.shorten("acme", key.id, datetime.now(UTC) + timedelta(days=1), by),
        "revoke": lambda by: keyring.revoke("acme", key.id, by),
        "add_version": lambda by: catalog.add_version("acme", "a", content("z"), by, make_tenant=True),
        "same version": lambda by: catalog.add_version("acme", "a", content("x"), by),
        "find": lambda by: catalog.find("acme", "a", content("z").digest, 1, by, make_tenant=True),
        "delete": lambda by: catalog.delete("acme", parse_reference("a@2"), by),
        "put_alias": lambda by: catalog.put_alias("acme", "a", "prod", 2, by),
        "delete_alias": lambda by: catalog.delete_alias("acme", "a", "prod", by),
        "add": lambda by: audit.add(by, "residency.loaded", "acme", "acme/a@1"),
    }


CHANGES = (
    *("put", "delete tenant", "create", "create platform", "shorten", "revoke", "add_version", "same version", "find"),
    *("delete", "put_alias", "delete_alias", "add"),
)


def everything(database: Database) -> dict[str, list[Any]]:
    """Returns every row of every table but garbage, where blobs are held before any change."""
    tables = [table for table in metadata.sorted_tables if table is not garbage]
    with database.reading() as connection:
        return {table.name: list(connection.execute(sa.select(table))) for table in tables}


def revoke(keyring: Keyring, _database: Database, by: Principal) -> None:
    keyring.revoke(by.tenant, by.key_id, BY)


def expire(_keyring: Keyring, database: Database, by: Principal) -> None:
    early = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=2)
    with database.writing() as connection:
        connection.execute(sa.update(keys).where(keys.c.id == by.key_id).values(expires=early))


def shrink(_keyring: Keyring, database: Database, by: Principal) -> None:
    with database.writing() as connection:
        connection.execute(sa.update(keys).where(keys.c.id == by.key_id).values(scope="read"))


@pytest.mark.parametrize("end", [revoke, expire, shrink])
@pytest.mark.parametrize("owner", ["acme", None])
def test_a_key_that_ended_changes_nothing(
    changes: dict[str, Change],
    keyring: Keyring,
    database: Database,
    owner: str | None,
    end: Callable[[Keyring, Database, Principal], None],
) -> None:
    """Every change is refused for a key that was revoked, has expired or has a smaller scope than when it was
    verified."""
    by = keyring.verify(keyring.create(owner, "admin", "", BY)[1])
    end(keyring, database, by)
    before = everything(database)
    for name, change in changes.items():
        with pytest.raises(Unauthenticated, match="while the request was under way"):
            change(by)
        assert everything(database) == before, name


@pytest.mark.parametrize("owner", ["acme", None])
def test_a_session_that_was_ended_changes_nothing(
    changes: dict[str, Change], keyring: Keyring, database: Database, owner: str | None
) -> None:
    """A change by a session that was ended since its request began is refused, although its key is valid."""
    sessions = Sessions(database)
    session_id = sessions.begin(keyring.verify(keyring.create(owner, "admin", "", BY)[1]))
    found = sessions.find(session_id)
    assert found is not None
    prove(database, found.principal)
    sessions.end(session_id)
    before = everything(database)
    for name, change in changes.items():
        with pytest.raises(Unauthenticated, match="the session was ended while the request was under way: sign in"):
            change(found.principal)
        assert everything(database) == before, name


@pytest.mark.parametrize("is_made_again", [False, True])
def test_a_tenant_is_the_one_that_the_request_named(
    changes: dict[str, Change], keyring: Keyring, tenants: Tenants, database: Database, is_made_again: bool
) -> None:
    """A change is refused if its tenant was deleted since its request began, also if a namesake was made, and with the
    deleted tenant's own keys."""
    acme = tenants.require("acme")
    platform = replace(keyring.verify(keyring.create(None, "admin", "", BY)[1]), acts_on=acme)
    own = replace(keyring.verify(keyring.create("acme", "admin", "", BY)[1]), acts_on=acme)
    tenants.delete("acme", BY)
    if is_made_again:
        tenants.put("acme", BY)
    before = everything(database)
    del changes["create platform"]  # concerns no tenant
    for name, change in changes.items():
        with pytest.raises(NotFound, match="the tenant was deleted while the request was under way"):
            change(platform)
        with pytest.raises(Unauthenticated):
            change(own)
        with pytest.raises(NotFound):
            change(replace(DEV, acts_on=acme))
        assert everything(database) == before, name


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("owner", ["acme", None])
def test_a_key_that_is_alive_changes_what_it_may(
    changes: dict[str, Change], keyring: Keyring, tenants: Tenants, name: str, owner: str | None
) -> None:
    """Every change is carried out for a valid key, also for one that ends within a minute."""
    soon = datetime.now(UTC) + timedelta(minutes=1)
    by = keyring.verify(keyring.create(owner, "admin", "", BY, soon)[1])
    changes[name](replace(by, acts_on=tenants.require("acme")))


def test_a_namesake_of_its_tenant_is_not_its_tenant(keyring: Keyring, tenants: Tenants, database: Database) -> None:
    """A key is compared with the id of its tenant, never with the name."""
    tenants.put("acme", BY)
    by = keyring.verify(keyring.create("acme", "admin", "", BY)[1])
    with pytest.raises(Unauthenticated):
        prove(database, replace(by, tenant_id=None))
    assert by.tenant_id is not None
    with pytest.raises(Unauthenticated):
        prove(database, replace(by, tenant_id=by.tenant_id + 1))
    prove(database, by)


@pytest.mark.parametrize("by", [SERVICE, COMMAND_LINE, DEV])
def test_without_a_key_there_is_nothing_to_prove(database: Database, by: Principal) -> None:
    """Principals without a key are accepted; a key with the id of such a principal is refused."""
    prove(database, by)
    with pytest.raises(Unauthenticated):
        prove(database, replace(by, has_key=True))


@on_postgresql
@pytest.mark.parametrize("owner", ["acme", None])
def test_a_revocation_that_commits_first_wins(
    database: Database, keyring: Keyring, tenants: Tenants, owner: str | None
) -> None:
    """A writer waits for a revocation that began first, and is then refused; a revocation waits for a writer that began
    first."""
    tenants.put("acme", BY)
    by = keyring.verify(keyring.create(owner, "admin", "", BY)[1])
    revoked, written = threading.Event(), threading.Event()

    def write() -> None:
        with writing_for(database, by):
            written.set()
            assert not revoked.wait(0.5)

    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(write)
        assert written.wait(60)
        revoking = pool.submit(keyring.revoke, owner, by.key_id, BY)
        revoking.add_done_callback(lambda _: revoked.set())
        writing.result(60)
        revoking.result(60)
    with database.writing() as connection:
        connection.execute(
            sa.insert(keys).values(id=by.key_id, tenant_id=by.tenant_id, scope="admin", name="", hash="")
        )
    with ThreadPoolExecutor(1) as pool:
        with database.writing() as connection:
            connection.execute(sa.delete(keys).where(keys.c.id == by.key_id))
            refused = pool.submit(write)
            with pytest.raises(TimeoutError):
                refused.result(0.3)
        with pytest.raises(Unauthenticated):
            refused.result(60)


@on_postgresql
def test_signing_out_waits_for_a_writer(database: Database, keyring: Keyring, tenants: Tenants) -> None:
    """A transaction that has proved a session ends before the session does."""
    tenants.put("acme", BY)
    sessions = Sessions(database)
    session_id = sessions.begin(keyring.verify(keyring.create("acme", "admin", "", BY)[1]))
    found = sessions.find(session_id)
    assert found is not None
    with ThreadPoolExecutor(1) as pool:
        with writing_for(database, found.principal):
            ending = pool.submit(sessions.end, session_id)
            with pytest.raises(TimeoutError):
                ending.result(0.3)
        ending.result(60)
    with pytest.raises(Unauthenticated):
        prove(database, found.principal)
