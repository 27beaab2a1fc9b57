"""`library.watching`: when waiting for changes ends, and what it costs the catalog."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefix_service.catalog.changes import SeenChanges
from prefix_service.catalog.database import Database
from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.records import Principal
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import Overloaded, Unauthenticated
from prefix_service.library.watching import SHARE, Watchers
from tests.catalog.conftest import BY

pytestmark = pytest.mark.anyio
LONG = 30.0


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "catalog.sqlite")
    for tenant in ("acme", "beta"):
        Tenants(opened).put(tenant, BY)
    yield opened
    opened.close()


@pytest.fixture
def feed(database: Database) -> ChangeFeed:
    return ChangeFeed(database)


@pytest.fixture
async def watchers(database: Database, feed: ChangeFeed) -> Watchers:
    made = Watchers(database, 100, lambda: True)
    feed.listen(made.on_changes)
    return made


def of(database: Database, tenant: str) -> Principal:
    return Principal("k", tenant, "read", Tenants(database).require(tenant))


async def for_ever() -> float:
    """The key is good, and has no end."""
    return float("inf")


async def test_waiting_ends_after_its_time(watchers: Watchers, database: Database, feed: ChangeFeed) -> None:
    """With nothing, and the revision to go on from, though others changed something meanwhile."""
    by = of(database, "acme")
    since = feed.revision
    Tenants(database).put("gamma", BY)
    with watchers.begin(by, for_ever) as watcher:
        assert await watcher.next(since, 0.01) == SeenChanges(since + 1, [])


async def test_waiting_ends_with_the_key(watchers: Watchers, database: Database, feed: ChangeFeed) -> None:
    """At the moment that it ends, without a change of it."""
    moments = [time.monotonic() + 0.05]

    async def admit() -> float:
        if not moments:
            raise Unauthenticated("the key has expired")
        return moments.pop()

    with watchers.begin(of(database, "acme"), admit) as watcher, pytest.raises(Unauthenticated):
        await asyncio.wait_for(watcher.next(feed.revision, 20 * LONG), LONG)


async def test_many_that_wait_look_once(
    watchers: Watchers, database: Database, feed: ChangeFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All watchers of a tenant are woken by its change and share one look; those of other tenants sleep on."""
    looks: list[str | None] = []
    read = watchers._read

    def counted(by: Principal, since: int | None) -> SeenChanges:
        looks.append(by.tenant)
        return read(by, since)

    monkeypatch.setattr(watchers, "_read", counted)
    acme, beta, since = of(database, "acme"), of(database, "beta"), feed.revision

    async def watch(by: Principal) -> SeenChanges:
        with watchers.begin(by, for_ever) as watcher:
            return await watcher.next(since, LONG)

    sleeper = asyncio.create_task(watch(beta))
    tasks = [asyncio.create_task(watch(acme)) for _ in range(20)]
    while looks.count("acme") + looks.count("beta") < 2 or watchers._reads:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.01)
    assert (looks.count("acme"), looks.count("beta")) == (1, 1)
    Tenants(database).delete("acme", BY)
    found = await asyncio.wait_for(asyncio.gather(*tasks), LONG)
    assert [[stored.change.kind for stored in seen.changes] for seen in found] == [["tenant-deleted"]] * 20
    assert looks.count("acme") == 2
    assert looks.count("beta") == 1
    watchers.end()
    assert (await asyncio.wait_for(sleeper, LONG)).changes == []


async def test_who_waits_for_longer_looks_no_more(
    database: Database, feed: ChangeFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watcher that nothing woke sends no statement, as long as the changes of others arrive; without them it looks
    each time, so it learns that the catalog is away."""
    is_following, looks = True, 0
    watchers = Watchers(database, 100, lambda: is_following)
    feed.listen(watchers.on_changes)
    read = watchers._read

    def counted(by: Principal, since: int | None) -> SeenChanges:
        nonlocal looks
        looks += 1
        return read(by, since)

    monkeypatch.setattr(watchers, "_read", counted)
    since = feed.revision
    with watchers.begin(of(database, "acme"), for_ever) as watcher:
        for _ in range(3):
            assert await watcher.next(since, 0.01) == SeenChanges(since, [])
        assert looks == 1
        is_following = False
        await watcher.next(since, 0)
        assert looks == 2
        is_following = True
        Tenants(database).delete("acme", BY)
        assert [stored.change.kind for stored in (await watcher.next(since, LONG)).changes] == ["tenant-deleted"]
    assert looks == 3


async def test_a_look_that_began_before_a_change_is_not_shared_after_it(
    watchers: Watchers, database: Database, feed: ChangeFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes after the change would sleep over it: its wake-up was before."""
    has_looked, goes_on = threading.Event(), threading.Event()
    read = watchers._read

    def slow(by: Principal, since: int | None) -> SeenChanges:
        seen = read(by, since)
        if not has_looked.is_set():
            has_looked.set()
            goes_on.wait(LONG)
        return seen

    monkeypatch.setattr(watchers, "_read", slow)
    acme, since = of(database, "acme"), feed.revision

    async def watch() -> SeenChanges:
        with watchers.begin(acme, for_ever) as watcher:
            return await watcher.next(since, LONG)

    early = asyncio.create_task(watch())
    try:
        assert await asyncio.to_thread(has_looked.wait, LONG)
        Tenants(database).delete("acme", BY)
        late = await asyncio.wait_for(watch(), LONG)
    finally:
        goes_on.set()
        await asyncio.gather(early, return_exceptions=True)
    assert [stored.change.kind for stored in late.changes] == ["tenant-deleted"]


async def test_shares(database: Database) -> None:
    """A tenant may be a quarter of the watchers, the platform another; whoever leaves makes room."""
    watchers = Watchers(database, 2 * SHARE, lambda: True)
    acme = of(database, "acme")
    with watchers.begin(acme, for_ever), watchers.begin(acme, for_ever):
        with pytest.raises(Overloaded, match="tenant 'acme' has 2 watchers"), watchers.begin(acme, for_ever):
            pass
        with watchers.begin(BY, for_ever):
            pass
    with watchers.begin(acme, for_ever):
        pass
    few = Watchers(database, 1, lambda: True)
    with few.begin(acme, for_ever), pytest.raises(Overloaded, match="there are 1 watchers"), few.begin(BY, for_ever):
        pass
