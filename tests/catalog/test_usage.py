"""`catalog.usage`: uses are summed by hour, listed in pages, and kept for a number of days."""

from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise

import pytest
import sqlalchemy as sa

from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database, now
from prefix_service.catalog.deletions import Deletions
from prefix_service.catalog.records import Use, VersionName
from prefix_service.catalog.retention import expire_usage
from prefix_service.catalog.schema import usage as table
from prefix_service.catalog.schema import versions
from prefix_service.catalog.tenants import Tenants
from prefix_service.catalog.usage import UsageStore
from prefix_service.errors import NotFound
from tests.catalog.conftest import BY, Content, remove_deleted

FIRST = datetime.fromisoformat("2026-11-26T04:00:00")
SECOND = FIRST + timedelta(hours=1)
KEY, OTHER = "0123456789abcdef", "f" * 16
PLATFORM = "platform:00000000000000aa"
USES = [
    Use(FIRST, "acme", "a", 1, KEY, 1, 10, 1, 20),
    Use(FIRST, "acme", "a", 1, PLATFORM, 2, 0, 0, 40),
    Use(FIRST, "acme", "a", 1, "platform:dev", 1, 7, 0, 20),
    Use(FIRST, "acme", "a", 2, KEY, 4, 1 << 40, 0, 80),
    Use(FIRST, "acme", "b", 1, OTHER, 8, 10, 0, 160),
    Use(FIRST, "acme", "", 0, "", 5, 5, 5, 5),
    Use(SECOND, "acme", "a", 1, KEY, 16, 10, 2, 320),
    Use(FIRST, "beta", "a", 1, PLATFORM, 32, 10, 0, 640),
]


@pytest.fixture
def store(database: Database, tenants: Tenants) -> UsageStore:
    """Returns a store with USES of two tenants."""
    for tenant in ("acme", "beta"):
        tenants.put(tenant, BY)
    store = UsageStore(database)
    store.add(USES)
    return store


def listed(store: UsageStore, tenant: str | None, *by: str, **options: object) -> list[Use]:
    return store.listed(tenant, by, **{"limit": 99, **options})  # type: ignore[arg-type]


def rows(database: Database) -> int:
    with database.reading() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def test_sums_by_hour(store: UsageStore) -> None:
    """Uses are summed by hour, of one tenant and of each tenant."""
    acme = [Use(FIRST, "acme", "", 0, "", 21, (1 << 40) + 32, 6, 325), Use(SECOND, "acme", "", 0, "", 16, 10, 2, 320)]
    assert listed(store, "acme") == acme
    assert listed(store, None) == [acme[0], Use(FIRST, "beta", "", 0, "", 32, 10, 0, 640), acme[1]]


def test_sums_by_what_is_named(store: UsageStore) -> None:
    """Uses are summed by each column; for a tenant all keys of the platform are one, for the platform each is its
    own."""
    by_adapter = [(use.adapter, use.requests) for use in listed(store, "acme", "adapter", until=SECOND)]
    assert by_adapter == [("", 5), ("a", 8), ("b", 8)]
    by_key = [(use.key, use.requests) for use in listed(store, "acme", "key", until=SECOND)]
    assert by_key == [("", 5), (KEY, 5), (OTHER, 8), ("platform", 3)]
    of_all = [(use.tenant, use.key) for use in listed(store, None, "key", until=SECOND)]
    assert of_all == [
        *(("acme", key) for key in ("", KEY, OTHER, PLATFORM, "platform:dev")),
        ("beta", PLATFORM),
    ]
    by_all = listed(store, "beta", "adapter", "version", "key")
    assert by_all == [replace(USES[-1], key="platform")]
    by_version = [(use.adapter, use.version, use.requests) for use in listed(store, "acme", "adapter", "version")]
    assert by_version == [("", 0, 5), ("a", 1, 4), ("a", 2, 4), ("b", 1, 8), ("a", 1, 16)]


def test_hours_in_a_range(store: UsageStore) -> None:
    """A range of hours has its first hour, and not its last."""
    for since, until, found in (
        (FIRST, SECOND, [FIRST]),
        (SECOND, None, [SECOND]),
        (FIRST, SECOND + timedelta(hours=1), [FIRST, SECOND]),
        (FIRST - timedelta(hours=9), FIRST, []),
    ):
        assert [use.hour for use in listed(store, "acme", since=since, until=until)] == found


@pytest.mark.parametrize("by", [(), ("adapter",), ("adapter", "version"), ("key",), ("adapter", "version", "key")])
@pytest.mark.parametrize("tenant", ["acme", None])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_pages(store: UsageStore, tenant: str | None, by: tuple[str, ...], size: int) -> None:
    """Pages together are the whole listing, in order."""
    whole, found = listed(store, tenant, *by), list[Use]()
    while page := listed(store, tenant, *by, after=found[-1] if found else None, limit=size):
        assert len(page) <= size
        found += page
    assert found == whole
    assert all(one.place < other.place for one, other in pairwise(whole))


def test_counts_add_up(store: UsageStore) -> None:
    """Counts that several processes write for one hour are added."""
    store.add(USES)
    store.add(reversed(USES))
    assert listed(store, "beta", "adapter", "version") == [Use(FIRST, "beta", "a", 1, "", 96, 30, 0, 1920)]


def test_what_is_used_of_a_tenant_that_is_gone(store: UsageStore, tenants: Tenants, database: Database) -> None:
    """Uses of a deleted tenant are removed with it, and its namesake has none."""
    store.add([Use(FIRST, "nobody", "a", 1, KEY, 1)])
    tenants.delete("acme", BY)
    with pytest.raises(NotFound, match="there is no tenant 'acme'"):
        listed(store, "acme")
    assert {use.tenant for use in listed(store, None)} == {"beta"}
    store.add(USES)
    tenants.put("acme", BY)
    assert listed(store, "acme") == []
    remove_deleted(database)
    assert rows(database) == 1


def test_a_deleted_tenant_s_hours_go_one_by_one(store: UsageStore, tenants: Tenants, database: Database) -> None:
    """The hours of a deleted tenant are removed in one transaction each, so that others can write in between."""
    tenants.delete("acme", BY)
    left = []
    while Deletions(database).remove_slice():
        left.append(rows(database))
    assert left[:2] == [2, 1]


def test_old_hours_are_removed(store: UsageStore, database: Database) -> None:
    """Hours that began more days ago than they are kept are removed, a slice at a time."""
    with database.reading() as connection:
        today = now(connection).replace(minute=0, second=0, microsecond=0)
    old, young = today - timedelta(days=3, hours=1), today - timedelta(days=2, hours=23)
    store.add([Use(old, "acme", "old", number, KEY, 1) for number in range(1, 301)] + [Use(young, "acme", "young")])
    with database.writing() as connection:
        connection.execute(sa.delete(table).where(table.c.hour.in_([FIRST, SECOND])))
    assert expire_usage(database, 3) is True
    assert rows(database) == 51
    assert expire_usage(database, 3) is False
    assert [use.adapter for use in listed(store, "acme", "adapter")] == ["young"]
    assert expire_usage(database, 3) is False


def test_versions_that_nobody_reads(catalog: Catalog, content: Content, database: Database) -> None:
    """Published long enough ago, and not handed out since; what was counted together may have been any."""
    store, names = UsageStore(database), []
    for tenant in ("acme", "beta"):
        for word in "xyz":
            version, _ = catalog.add_version(tenant, "a", content(word), BY, make_tenant=True)
            names.append(VersionName(tenant, "a", version.number, version.digest))
    with database.writing() as connection:
        today = now(connection)
        old = sa.update(versions).where(versions.c.number < 3).values(created=today - timedelta(days=8))
        connection.execute(old)
    gone = VersionName("acme", "a", 9, names[0].digest)
    assert store.unread([*names, gone], 7) == [name for name in names if name.number < 3]
    hour = today.replace(minute=0, second=0, microsecond=0)
    store.add([Use(hour - timedelta(days=6), "acme", "a", 1, KEY, 1), Use(hour, "beta", "a", 2, KEY, 1)])
    store.add([Use(hour - timedelta(days=8), "acme", "a", 2, KEY, 1), Use(hour, "acme", "a", 1, PLATFORM, 1)])
    assert store.unread(names, 7) == [names[1], names[3]]
    assert store.read_hours(names[0]) == (hour - timedelta(days=6), hour)
    assert store.read_hours(names[4]) == (hour, hour)
    assert store.read_hours(names[5]) is None
    store.add([Use(hour, "acme", requests=1)])
    assert store.unread(names, 7) == [names[3]]
