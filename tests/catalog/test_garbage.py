"""`catalog.garbage`: a blob is wanted while a version names it, and for the grace period afterwards."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database, now
from prefix_service.catalog.garbage import CONDEMNED, Garbage, require_held
from prefix_service.catalog.records import NewVersion
from prefix_service.catalog.schema import garbage as let_go
from prefix_service.catalog.schema import versions
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import Conflict, Unavailable
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, on_postgresql, remove_deleted
from tests.processes import eventually

GRACE = 3600.0
BLOBS = {"w1", "kv1", "w2", "kv2"}


def version(n: int, weights: int | None = None) -> NewVersion:
    """Returns version `n`, whose weights may be those of another one."""
    return NewVersion(f"d{n}", "{}", None, f"w{weights or n}", 10, "bfloat16", f"kv{n}", 20)


def publish(catalog: Catalog, tenant: str, adapter: str, new: NewVersion) -> None:
    """Publishes a version, long enough ago that nobody knows that its blobs were held."""
    catalog.add_version(tenant, adapter, new, BY, make_tenant=True)
    with catalog._database.writing() as connection:
        connection.execute(sa.delete(let_go).where(let_go.c.digest.in_((new.weights, new.key_values))))


def delete(catalog: Catalog, tenant: str, reference: str) -> None:
    catalog.delete(tenant, parse_reference(reference), BY)
    remove_deleted(catalog._database)


def age(database: Database, seconds: float) -> None:
    """Moves the moments of all deletions back, by the database's time."""
    with database.writing() as connection:
        connection.execute(sa.update(let_go).values(since=now(connection) - timedelta(seconds=seconds)))


def held(database: Database) -> set[str]:
    with database.reading() as connection:
        return set(connection.scalars(sa.select(let_go.c.digest)))


def test_forgetting_nothing_waits_for_no_writer(catalog: Catalog, garbage: Garbage) -> None:
    """A collector with nothing to forget opens no transaction that writes, which would lend the reserve of the disk."""
    publish(catalog, "acme", "a", version(1))
    before = garbage.expired(0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Database, "writing", lambda *_, **__: pytest.fail("it writes"))
        assert not garbage.forget(before)
    delete(catalog, "acme", "a")
    garbage.forget(garbage.expired(-60))
    assert held(catalog._database) == set()


def test_what_a_version_names_is_wanted(catalog: Catalog, garbage: Garbage) -> None:
    """The weights and the keys and values of versions are wanted; other digests are not."""
    publish(catalog, "acme", "a", version(1))
    assert garbage.wanted(BLOBS, 0) == {"w1", "kv1"}
    assert garbage.wanted([], 0) == set()


@pytest.mark.parametrize("reference", ["a@1", "a", None])
def test_what_was_let_go_is_wanted_for_a_while(
    catalog: Catalog, tenants: Tenants, garbage: Garbage, database: Database, reference: str | None
) -> None:
    """Blobs of a deleted version, adapter or tenant are wanted for the grace period."""
    publish(catalog, "acme", "a", version(1))
    if reference is None:
        tenants.delete("acme", BY)
        remove_deleted(database)
    else:
        delete(catalog, "acme", reference)
    assert garbage.wanted(BLOBS, GRACE) == {"w1", "kv1"}
    age(database, GRACE - 60)
    assert garbage.wanted(BLOBS, GRACE) == {"w1", "kv1"}
    age(database, GRACE + 1)
    assert garbage.wanted(BLOBS, GRACE) == set()


@pytest.mark.parametrize(("tenant", "adapter"), [("acme", "b"), ("beta", "a")])
def test_what_another_version_names_stays(
    catalog: Catalog, garbage: Garbage, database: Database, tenant: str, adapter: str
) -> None:
    """A blob that another version names is wanted, also one of another tenant, however long ago the first was
    deleted."""
    publish(catalog, "acme", "a", version(1))
    publish(catalog, tenant, adapter, version(2, weights=1))
    delete(catalog, "acme", "a")
    age(database, GRACE + 1)
    assert garbage.wanted(BLOBS, GRACE) == {"w1", "kv2"}


def test_the_grace_begins_anew(catalog: Catalog, garbage: Garbage, database: Database) -> None:
    """Each deletion begins a new grace period of its blobs."""
    for adapter in "ab":
        publish(catalog, "acme", adapter, version(1))
    delete(catalog, "acme", "a")
    age(database, GRACE + 1)
    delete(catalog, "acme", "b")
    assert garbage.wanted(BLOBS, GRACE) == {"w1", "kv1"}


def test_a_deletion_that_is_refused_lets_nothing_go(catalog: Catalog, database: Database) -> None:
    """A deletion that is rolled back notes no blobs."""
    publish(catalog, "acme", "a", version(1))
    catalog.put_alias("acme", "a", "prod", 1, BY)
    with pytest.raises(Conflict):
        delete(catalog, "acme", "a@1")
    assert held(database) == set()


def test_other_versions_are_not_let_go(catalog: Catalog, tenants: Tenants, database: Database) -> None:
    """A deletion notes only the blobs of what it deletes."""
    for n in (1, 2):
        publish(catalog, "acme", "a", version(n))
    publish(catalog, "beta", "a", version(3))
    delete(catalog, "acme", "a@2")
    assert held(database) == {"w2", "kv2"}
    tenants.delete("acme", BY)
    remove_deleted(database)
    assert held(database) == BLOBS


def test_what_was_let_go_long_ago_is_forgotten(catalog: Catalog, garbage: Garbage, database: Database) -> None:
    """Notes that are older than the grace period are removed, and younger ones stay."""
    publish(catalog, "acme", "a", version(1))
    delete(catalog, "acme", "a")
    garbage.forget(garbage.expired(GRACE))
    assert held(database) == {"w1", "kv1"}
    age(database, GRACE + 1)
    publish(catalog, "acme", "a", version(2))
    delete(catalog, "acme", "a")
    garbage.forget(garbage.expired(GRACE))
    assert held(database) == {"w2", "kv2"}


@on_postgresql
def test_what_is_being_let_go_again_is_not_forgotten(catalog: Catalog, garbage: Garbage, database: Database) -> None:
    """Forgetting skips rows that another transaction has locked, and does not wait for them."""
    publish(catalog, "acme", "a", version(1))
    delete(catalog, "acme", "a")
    again = sa.update(let_go).values(since=sa.func.now()).where(let_go.c.digest == "w1")
    with ThreadPoolExecutor(1) as pool, database.writing() as connection:
        connection.execute(again)
        pool.submit(garbage.forget, garbage.expired(0)).result(60)
    assert held(database) == {"w1"}


def test_keys_and_values_that_were_made_anew(catalog: Catalog, garbage: Garbage, database: Database) -> None:
    """After keys and values were made again, their version names the new blob alone."""
    publish(catalog, "acme", "a", version(1))
    catalog.replace_key_values(catalog.resolve("acme", parse_reference("a")), "kv2")
    age(database, GRACE + 1)
    assert garbage.wanted(BLOBS, GRACE) == {"w1", "kv2"}


def test_a_blob_that_is_held_is_wanted(catalog: Catalog, garbage: Garbage, database: Database) -> None:
    """It is neither forgotten nor condemned for the grace period, as if it had been let go."""
    assert catalog.hold(("w1", "kv1"))
    garbage.forget(garbage.expired(GRACE))
    assert garbage.wanted(BLOBS, GRACE) == {"w1", "kv1"}
    assert garbage.condemn(["w1", "w2"], GRACE).digests == {"w2"}
    age(database, GRACE + 1)
    assert garbage.condemn(["w1", "kv1"], GRACE).digests == {"w1", "kv1"}


def test_what_is_condemned_cannot_be_held(catalog: Catalog, garbage: Garbage, database: Database) -> None:
    """Until it is acquitted, by the collector that condemned it, or two minutes have passed; nor condemned again."""
    condemned = garbage.condemn(["w1"], GRACE)
    assert not catalog.hold(("kv1", "w1"))
    assert garbage.condemn(["w1"], GRACE).digests == set()
    garbage.acquit(replace(condemned, moment=condemned.moment - timedelta(seconds=1)))
    assert not catalog.hold(("w1",))
    garbage.acquit(condemned)
    assert catalog.hold(("kv1", "w1"))
    assert held(database) == {"kv1", "w1"}
    garbage.condemn(["w2"], GRACE)
    garbage.forget(garbage.expired(0))
    assert held(database) >= {"w2"}
    let_time_pass(database, CONDEMNED)
    assert garbage.condemn(["w2"], GRACE).digests == {"w2"}
    let_time_pass(database, CONDEMNED)
    assert catalog.hold(("w2",))


def let_time_pass(database: Database, seconds: float) -> None:
    """Moves the moments of all garbage back."""
    passed = timedelta(seconds=seconds)
    with database.writing() as connection:
        for row in connection.execute(sa.select(let_go)).all():
            values = {"since": row.since - passed, "condemned": row.condemned and row.condemned - passed}
            connection.execute(sa.update(let_go).where(let_go.c.digest == row.digest).values(values))


def test_a_digest_whose_collector_died_is_forgotten(garbage: Garbage, database: Database) -> None:
    """Its blob may be gone, so no collection would find it again."""
    garbage.condemn(["w1"], GRACE)
    let_time_pass(database, GRACE + 1)
    garbage.forget(garbage.expired(GRACE))
    assert held(database) == set()


def test_what_a_version_names_is_not_condemned(catalog: Catalog, garbage: Garbage) -> None:
    """Nor is it condemned afterwards."""
    publish(catalog, "acme", "a", version(1))
    assert garbage.condemn(["w1", "kv1", "w2"], GRACE).digests == {"w2"}
    assert catalog.hold(("w1", "kv1"))


def test_only_what_is_held_can_be_named(garbage: Garbage, database: Database) -> None:
    """A publication that took longer than the grace period is refused, since its blobs may be gone."""
    catalog = Catalog(database)
    new = version(1)
    with pytest.raises(Unavailable, match="longer than PREFIX_GARBAGE_GRACE"):
        catalog.add_version("acme", "a", new, BY, make_tenant=True)
    assert catalog.hold((new.weights, new.key_values))
    age(database, GRACE + 1)
    condemned = garbage.condemn(["w1"], GRACE)
    for _ in range(2):
        with pytest.raises(Unavailable, match="publish again"):
            catalog.add_version("acme", "a", new, BY, make_tenant=True)
        garbage.acquit(condemned)
    assert catalog.hold((new.weights, new.key_values))
    assert catalog.add_version("acme", "a", new, BY, make_tenant=True)[1]
    assert catalog.hold(("kv2",))
    made = catalog.resolve("acme", parse_reference("a"))
    with pytest.raises(Unavailable):
        catalog.replace_key_values(made, "kv3")
    assert catalog.replace_key_values(made, "kv2").key_values == "kv2"


@on_postgresql
def test_what_is_being_named_is_not_condemned(catalog: Catalog, garbage: Garbage, database: Database) -> None:
    """A collector waits for the transaction that names a blob, however long ago the blob was held."""
    publish(catalog, "acme", "a", version(1))
    assert catalog.hold(("w2",))
    age(database, GRACE + 1)
    with ThreadPoolExecutor(1) as pool:
        with database.writing() as connection:
            require_held(connection, ("w2",))
            condemned = pool.submit(garbage.condemn, ["w2"], GRACE)
            eventually(lambda: waiting(database))
            connection.execute(sa.update(versions).values(weights="w2"))
        assert condemned.result(60).digests == set()


def waiting(database: Database) -> bool:
    """Whether a connection waits for a lock."""
    query = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    with database.reading() as connection:
        return bool(connection.scalar(query))


@pytest.mark.parametrize("count", [0, 1, 1000, 1001])
def test_every_version_is_named_once(catalog: Catalog, garbage: Garbage, database: Database, count: int) -> None:
    """`named` yields every version once, also if the last page is full."""
    publish(catalog, "acme", "a", version(0))
    publish(catalog, "beta", "a", version(0))
    with database.writing() as connection:
        row = connection.execute(sa.select(versions).where(versions.c.number == 1).limit(1)).one()._asdict()
        row.pop("id")
        for n in range(1, count + 1):
            connection.execute(sa.insert(versions).values(row | {"number": 1 + n, "digest": f"d{n}"}))
    named = list(garbage.named())
    assert len(named) == len(set(named)) == count + 2
    assert set(named) >= {("acme/a@1", "w0", "kv0"), ("beta/a@1", "w0", "kv0")}
