"""`catalog.deletions`: deleted things can be found no more immediately, and their rows are removed in slices."""

import subprocess
import sys
import textwrap

import pytest
import sqlalchemy as sa

from prefix_service.catalog import schema
from prefix_service.catalog.audit import AuditLog
from prefix_service.catalog.catalog import MOST_ALIASES, Catalog
from prefix_service.catalog.changes import Change, TenantDeleted
from prefix_service.catalog.database import Database
from prefix_service.catalog.deletions import Deletions
from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.garbage import SLICE, Garbage
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.records import Quotas
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import Conflict, NotFound, Unauthenticated
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, Content, Place, on_sqlite, remove_deleted


def fill(database: Database, tenant: str, sizes: list[int]) -> None:
    """Makes a tenant with an adapter for each of these sizes, and as many versions of it, with correct totals."""
    Tenants(database).put(tenant, BY)
    with database.writing() as connection:
        owner = connection.scalar(sa.select(schema.tenants.c.id).where(schema.tenants.c.name == tenant))
        for n, size in enumerate(sizes):
            row = {"tenant_id": owner, "name": f"a{n}", "versions": size, "bytes": 4 * size}
            adapter_id = connection.scalar(sa.insert(schema.adapters).values(row).returning(schema.adapters.c.id))
            made = [
                {"adapter_id": adapter_id, "number": number, "digest": f"{n} {number}", "manifest": "{}"}
                | {"weights": f"w {tenant} {n} {number}", "weights_bytes": 1, "weights_dtype": "bfloat16"}
                | {"key_values": f"kv {n} {number}", "key_values_bytes": 1, "manifest_bytes": 2}
                for number in range(1, size + 1)
            ]
            connection.execute(sa.insert(schema.versions), made)
        total = {"adapters": len(sizes), "bytes": 4 * sum(sizes)}
        connection.execute(sa.update(schema.tenants).where(schema.tenants.c.id == owner).values(total))


def rows(database: Database) -> dict[str, int]:
    """Returns how many rows each table has."""
    with database.reading() as connection:
        return {
            name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for name, table in schema.metadata.tables.items()
        }


def test_a_deleted_tenant_is_gone_before_its_rows_are(
    database: Database, tenants: Tenants, catalog: Catalog, listings: Listings, keyring: Keyring, content: Content
) -> None:
    """Nothing of a deleted tenant resolves or is listed, and no key works; a namesake has nothing of it but the
    numbers."""
    tenants.put("acme", BY, Quotas(max_bytes=1000))
    catalog.add_version("acme", "a", content("x"), BY)
    _, text = keyring.create("acme", "admin", "", BY)
    tenants.delete("acme", BY)
    assert rows(database)["versions"] == 1
    assert tenants.listed("", 9) == []
    assert listings.index(None, after=None, limit=9) == []
    assert list(Garbage(database).named()) == []
    for look in (tenants.get, tenants.require, lambda name: listings.versions(name, "a", before=None, limit=9)):
        with pytest.raises(NotFound):
            look("acme")
    with pytest.raises(NotFound):
        catalog.resolve("acme", parse_reference("a"))
    with pytest.raises(Unauthenticated):
        keyring.verify(text)
    assert catalog.add_version("acme", "a", content("x"), BY, make_tenant=True)[0].number == 2
    assert (tenants.get("acme").quotas, tenants.get("acme").bytes) == (Quotas(), 100)
    remove_deleted(database)
    assert catalog.resolve("acme", parse_reference("a")).number == 2
    assert {name: rows(database)[name] for name in ("tenants", "adapters", "versions")} == dict.fromkeys(
        ("tenants", "adapters", "versions"), 1
    )


def test_a_deleted_adapter_is_gone_before_its_rows_are(
    database: Database, tenants: Tenants, catalog: Catalog, listings: Listings, content: Content
) -> None:
    """A deleted adapter resolves no more and counts no more, while a namesake does."""
    for word in "xy":
        catalog.add_version("acme", "a", content(word), BY, make_tenant=True)
    catalog.put_alias("acme", "a", "prod", 1, BY)
    catalog.delete("acme", parse_reference("a"), BY)
    assert rows(database)["versions"] == 2
    assert (tenants.get("acme").adapters, tenants.get("acme").bytes) == (0, 0)
    assert listings.adapters("acme", after=None, limit=9) == []
    assert listings.index("acme", after=None, limit=9) == []
    assert catalog.add_version("acme", "a", content("x"), BY)[0].number == 3
    assert catalog.aliases_of("acme", "a") == {}
    remove_deleted(database)
    assert (rows(database)["versions"], rows(database)["aliases"]) == (1, 0)
    assert (tenants.get("acme").adapters, tenants.get("acme").bytes) == (1, 100)


@pytest.mark.parametrize(
    "sizes", [[SLICE + 1], [3 * SLICE], [1] * (SLICE + 2), [SLICE - 1, 1, 1], [2, 2 * SLICE, 2]], ids=str
)
def test_slices_are_bounded_and_leave_nothing(database: Database, sizes: list[int]) -> None:
    """No transaction removes more than a slice, whatever was deleted; in the end nothing of it is left, and other
    tenants keep everything."""
    fill(database, "acme", sizes)
    fill(database, "beta", [2])
    Tenants(database).delete("acme", BY)
    deletions, before = Deletions(database), rows(database)
    while deletions.remove_slice():
        now = rows(database)
        removed = sum(before[name] - now[name] for name in ("tenants", "adapters", "versions", "aliases"))
        assert 0 <= removed <= SLICE
        before = now
    assert {name: before[name] for name in ("tenants", "adapters", "versions")} == {
        "tenants": 1,
        "adapters": 1,
        "versions": 2,
    }
    assert before["garbage"] == 2 * sum(sizes)


def test_many_aliases_are_removed_in_slices(database: Database, catalog: Catalog, content: Content) -> None:
    """The most aliases that an adapter may have, more than a slice, are removed in several transactions."""
    catalog.add_version("acme", "a", content("x"), BY, make_tenant=True)

    with database.writing() as connection:
        adapter_id = connection.scalar(sa.select(schema.adapters.c.id)) or 0
        made = [{"adapter_id": adapter_id, "name": f"n{n}", "number": 1} for n in range(MOST_ALIASES)]
        connection.execute(sa.insert(schema.aliases), made)
    with pytest.raises(Conflict, match=f"acme/a has {MOST_ALIASES} aliases, and may have {MOST_ALIASES}: delete one"):
        catalog.put_alias("acme", "a", "prod", 1, BY)
    assert catalog.put_alias("acme", "a", "n1", 1, BY) is False
    catalog.delete("acme", parse_reference("a"), BY)
    deletions = Deletions(database)
    assert deletions.remove_slice()
    assert rows(database)["aliases"] == MOST_ALIASES - SLICE
    remove_deleted(database)
    assert rows(database)["aliases"] == 0


def test_the_audit_of_a_deleted_tenant_stays(database: Database, tenants: Tenants, content: Content) -> None:
    """Entries of a deleted tenant lose their owner in slices; the platform reads them, and a namesake does not."""
    tenants.put("acme", BY)
    with database.writing() as connection:
        owner = connection.scalar(sa.select(schema.tenants.c.id))
        entry = {"tenant_id": owner, "tenant": "acme", "actor": "acme", "key_id": "k", "action": "x", "target": "acme"}
        connection.execute(sa.insert(schema.audit), [entry | {"details": {}} for _ in range(2 * SLICE)])
    tenants.delete("acme", BY)
    tenants.put("acme", BY)
    remove_deleted(database)
    log = AuditLog(database)
    assert len(log.listed(None, before=None, limit=5 * SLICE)) == 2 * SLICE + 3
    assert [entry.action for entry in log.listed("acme", before=None, limit=9)] == ["tenant.created"]


def test_listeners_hear_of_one_deletion(database: Database, tenants: Tenants) -> None:
    """Listeners get one change for a deletion, however many slices remove its rows."""
    fill(database, "acme", [SLICE + 1])
    feed, heard = ChangeFeed(database), list[Change]()
    feed.listen(heard.extend)
    tenants.delete("acme", BY)
    remove_deleted(database)
    feed.catch_up()
    assert heard == [TenantDeleted("acme")]


REMOVING = textwrap.dedent(
    """
    import pathlib, signal, sys
    from prefix_service.catalog.database import Database
    from prefix_service.catalog.deletions import Deletions

    deletions = Deletions(Database(pathlib.Path(sys.argv[1])))
    deletions.remove_slice()
    print("one", flush=True)
    for _ in range(9):
        deletions.remove_slice()
    signal.pause()
    """
)


@on_sqlite
def test_a_removal_that_was_killed_goes_on(database: Database, place: Place) -> None:
    """After a process is killed in any slice, the next one finishes the removal, and other tenants have lost
    nothing."""
    fill(database, "acme", [1] * 20 * SLICE)
    fill(database, "beta", [3])
    Tenants(database).delete("acme", BY)
    with subprocess.Popen([sys.executable, "-c", REMOVING, str(place)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        process.kill()
    assert 3 < rows(database)["versions"] < 20 * SLICE + 3
    remove_deleted(database)
    left = rows(database)
    assert {name: left[name] for name in ("tenants", "adapters", "versions")} == {
        "tenants": 1,
        "adapters": 1,
        "versions": 3,
    }
    assert left["garbage"] == 2 * 20 * SLICE
    assert Tenants(database).get("beta").bytes == 12
