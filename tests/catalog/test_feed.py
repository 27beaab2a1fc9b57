"""`catalog.feed` and `catalog.remembered`: which changes listeners get, when, and what may be remembered."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import sqlalchemy as sa

from prefix_service.catalog import feed as module
from prefix_service.catalog import remembered as remembered_module
from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.changes import AliasMoved, Change, EverythingChanged, VersionDeleted
from prefix_service.catalog.database import Database
from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.remembered import RememberedVersions
from prefix_service.catalog.schema import catalog as catalog_table
from prefix_service.catalog.schema import changes as changes_table
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import NotFound, StorageFailed
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, Content, HoldingCatalog, Place, on_sqlite
from tests.processes import eventually


@pytest.fixture
def feed(database: Database) -> ChangeFeed:
    return ChangeFeed(database)


@pytest.fixture
def heard(feed: ChangeFeed) -> list[str]:
    """Returns a list that gets the kinds of changes that a listener is called with."""
    kinds: list[str] = []
    feed.listen(lambda changes: kinds.extend(change.kind for change in changes))
    return kinds


@pytest.fixture
def elsewhere(place: Place) -> Iterator[Database]:
    """Opens the same database once more, as another process does."""
    opened = Database(place)
    yield opened
    opened.close()


@pytest.fixture
def remembered(catalog: Catalog, feed: ChangeFeed) -> RememberedVersions:
    return RememberedVersions(catalog, feed)


@pytest.fixture(autouse=True)
def acme(tenants: Tenants, catalog: Catalog, content: Content) -> None:
    """Makes a tenant with two versions of an adapter, the first behind an alias."""
    tenants.put("acme", BY)
    for word in "xy":
        catalog.add_version("acme", "a", content(word), BY)
    catalog.put_alias("acme", "a", "prod", 1, BY)


def test_own_changes_are_heard_before_the_writer_goes_on(catalog: Catalog, heard: list[str]) -> None:
    """Listeners have a process's own change when the writing call returns, and get it once."""
    catalog.put_alias("acme", "a", "prod", 2, BY)
    assert heard == ["alias-moved"]
    catalog.put_alias("acme", "a", "dev", 2, BY)
    assert heard == ["alias-moved", "alias-moved"]


def test_own_changes_need_no_read(
    feed: ChangeFeed, catalog: Catalog, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer's own changes reach listeners without a read, which would wait behind the next commit."""
    monkeypatch.setattr(feed, "catch_up", lambda: pytest.fail("it was read"))
    catalog.put_alias("acme", "a", "prod", 2, BY)
    catalog.put_alias("acme", "a", "prod", 2, BY)  # changes nothing
    catalog.delete("acme", parse_reference("a@1"), BY)
    assert heard == ["alias-moved", "version-deleted"]


def test_changes_of_others_before_ones_own_are_heard_before_them(
    catalog: Catalog, heard: list[str], elsewhere: Database
) -> None:
    """If another process wrote first, its changes reach listeners before the own one, and each comes once."""
    Tenants(elsewhere).put("beta", BY)
    catalog.put_alias("acme", "a", "prod", 2, BY)
    assert heard == ["tenant-created", "alias-moved"]
    catalog.delete_alias("acme", "a", "prod", BY)
    assert heard == ["tenant-created", "alias-moved", "alias-deleted"]


def test_a_listener_that_raises_keeps_no_other_from_hearing(
    feed: ChangeFeed, catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    """After a listener raises, the others and later changes still come, and the failure is logged with its
    traceback."""
    kinds, failed = list[str](), list[str]()

    def fail(changes: Sequence[Change]) -> None:
        failed.extend(change.kind for change in changes)
        raise ZeroDivisionError

    feed.listen(fail)
    feed.listen(lambda changes: kinds.extend(change.kind for change in changes))
    for number in (2, 1):
        catalog.put_alias("acme", "a", "prod", number, BY)
    assert kinds == failed == ["alias-moved"] * 2
    assert [record.exc_info is not None for record in caplog.records] == [True] * 2
    assert feed.are_known


def test_what_was_before_is_not_heard(feed: ChangeFeed, heard: list[str]) -> None:
    """A new listener gets no earlier changes."""
    feed.catch_up()
    assert heard == []


def test_changes_of_others_are_heard_within_a_moment(
    feed: ChangeFeed, heard: list[str], elsewhere: Database, content: Content
) -> None:
    """Changes of another process come soon, each once and in order."""
    with feed.followed():
        HoldingCatalog(elsewhere).add_version("acme", "b", content("z"), BY)
        Tenants(elsewhere).delete("acme", BY)
        began = time.monotonic()
        while len(heard) < 2 and time.monotonic() - began < 60:
            time.sleep(0.01)
        time.sleep(2 * module._PAUSE)
    assert heard == ["version-published", "tenant-deleted"]


@on_sqlite
def test_a_look_that_finds_nothing_reads_nothing(
    feed: ChangeFeed, elsewhere: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The feed reads changes only if another process has written, not at each poll."""
    reads: list[float] = []
    catch_up = feed.catch_up
    monkeypatch.setattr(module, "_PAUSE", 0.02)

    def counted() -> None:
        reads.append(time.monotonic())
        catch_up()

    monkeypatch.setattr(feed, "catch_up", counted)
    with feed.followed():
        for seen in (1, 2):
            eventually(lambda seen=seen: len(reads) >= seen)  # type: ignore[misc]
            time.sleep(0.2)
            assert len(reads) == seen
            assert feed.are_known
            if seen == 1:
                Tenants(elsewhere).delete("acme", BY)


@on_sqlite
def test_a_glance_that_fails_is_told_and_repeated(
    feed: ChangeFeed,
    heard: list[str],
    elsewhere: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A database that refuses for a while is logged once, and the changes of that time come afterwards."""
    monkeypatch.setattr(module, "_PAUSE", 0.02)
    with feed.followed():
        with elsewhere.writing() as connection:
            connection.exec_driver_sql("ALTER TABLE changes RENAME TO away")
        eventually(lambda: "cannot be read" in caplog.text)
        time.sleep(0.1)  # several more looks
        with elsewhere.writing() as connection:
            connection.exec_driver_sql("ALTER TABLE away RENAME TO changes")
        Tenants(elsewhere).delete("acme", BY)
        eventually(lambda: heard)
    assert heard == ["tenant-deleted"]
    assert [record.message for record in caplog.records if "cannot be read" in record.message] == [
        "changes of the catalog cannot be read: the catalog refused: OperationalError"
    ]


@on_sqlite
def test_many_writers_are_heard_once_each(
    feed: ChangeFeed, heard: list[str], database: Database, elsewhere: Database, secret: Path
) -> None:
    """With many writers each change reaches listeners exactly once."""
    mine, theirs = Keyring(database, secret), Keyring(elsewhere, secret)

    def make(keyring: Keyring) -> None:
        for _ in range(10):
            keyring.create("acme", "read", "", BY)

    with feed.followed():
        threads = [threading.Thread(target=make, args=(keyring,)) for keyring in (mine, mine, theirs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    feed.catch_up()
    assert heard == ["key-created"] * 30


REFERENCES = ["a", "a@latest", "a@1", "a@prod"]

CHANGES: dict[str, Callable[[Database, Content], object]] = {
    "publish": lambda database, content: HoldingCatalog(database).add_version("acme", "a", content("z"), BY),
    "move": lambda database, _: HoldingCatalog(database).put_alias("acme", "a", "prod", 2, BY),
    "forget": lambda database, _: HoldingCatalog(database).delete_alias("acme", "a", "prod", BY),
    "delete version": lambda database, _: HoldingCatalog(database).delete("acme", parse_reference("a@2"), BY),
    "delete adapter": lambda database, _: HoldingCatalog(database).delete("acme", parse_reference("a"), BY),
    "delete tenant": lambda database, _: Tenants(database).delete("acme", BY),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("own", [True, False], ids=["own", "others"])
def test_a_change_is_forgotten_nowhere(
    remembered: RememberedVersions,
    catalog: Catalog,
    feed: ChangeFeed,
    database: Database,
    elsewhere: Database,
    content: Content,
    change: str,
    own: bool,
) -> None:
    """After each change of an adapter its versions are looked up again, and are what the catalog has."""
    parsed = [parse_reference(reference) for reference in REFERENCES]
    for reference in parsed:
        version = remembered.resolve("acme", reference)
        assert remembered.get("acme", reference) is version
    CHANGES[change](database if own else elsewhere, content)
    if not own:
        feed.catch_up()
    assert [remembered.get("acme", reference) for reference in parsed] == [None] * len(parsed)
    for reference in parsed:
        try:
            expected = catalog.resolve("acme", reference)
        except NotFound:
            with pytest.raises(NotFound):
                remembered.resolve("acme", reference)
        else:
            assert remembered.resolve("acme", reference) == expected


def test_other_adapters_stay_remembered(
    remembered: RememberedVersions, catalog: Catalog, tenants: Tenants, content: Content
) -> None:
    """Publishing an adapter forgets nothing of others."""
    tenants.put("beta", BY)
    for tenant, adapter in (("acme", "b"), ("beta", "a")):
        catalog.add_version(tenant, adapter, content("x"), BY)
        remembered.resolve(tenant, parse_reference(adapter))
    catalog.add_version("acme", "a", content("z"), BY)
    assert remembered.get("acme", parse_reference("b")) is not None
    assert remembered.get("beta", parse_reference("a")) is not None
    tenants.delete("acme", BY)
    assert remembered.get("acme", parse_reference("b")) is None
    assert remembered.get("beta", parse_reference("a")) is not None


class _Slow(Catalog):
    """A catalog in which something happens between a read and its return."""

    meanwhile: Callable[[], object]

    def resolve(self, tenant: str, reference: object) -> object:  # type: ignore[override]
        version = super().resolve(tenant, reference)  # type: ignore[arg-type]
        self.meanwhile()
        return version


def test_what_was_read_before_a_change_is_not_remembered_after_it(
    database: Database, feed: ChangeFeed, catalog: Catalog
) -> None:
    """A version that was read before a change is not remembered if the change comes before the read returns."""
    slow = _Slow(database)
    slow.meanwhile = lambda: catalog.put_alias("acme", "a", "prod", 2, BY)
    remembered = RememberedVersions(slow, feed)
    reference = parse_reference("a@prod")
    assert remembered.resolve("acme", reference).number == 1
    assert remembered.get("acme", reference) is None
    slow.meanwhile = lambda: None
    assert remembered.resolve("acme", reference).number == 2


def test_selectors_of_an_adapter_are_bounded(
    remembered: RememberedVersions, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The selectors that are remembered of one adapter are bounded; the oldest is forgotten first."""
    monkeypatch.setattr(remembered_module, "_OF_ADAPTER", 3)
    for number in range(5):
        catalog.put_alias("acme", "a", f"alias{number}", 1, BY)
    parsed = [parse_reference(f"a@alias{number}") for number in range(5)]
    for reference in parsed:
        remembered.resolve("acme", reference)
    assert [remembered.get("acme", reference) is not None for reference in parsed] == [False, False, True, True, True]


def test_a_tenant_displaces_what_is_remembered_of_its_own(
    catalog: Catalog, feed: ChangeFeed, tenants: Tenants, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant with many adapters displaces only what is remembered of itself."""
    tenants.put("beta", BY)
    catalog.add_version("beta", "a", content("x"), BY)
    size = catalog.resolve("beta", parse_reference("a")).memory
    monkeypatch.setattr(remembered_module, "_MOST_BYTES", 4 * size)
    remembered = RememberedVersions(catalog, feed)
    for number in range(6):
        catalog.add_version("acme", f"b{number}", content("x"), BY)
    remembered.resolve("beta", parse_reference("a"))
    for number in range(6):
        remembered.resolve("acme", parse_reference(f"b{number}"))
    assert remembered.get("beta", parse_reference("a")) is not None
    assert remembered.get("acme", parse_reference("b0")) is None
    assert remembered.get("acme", parse_reference("b5")) is not None


def refuse(*_: object) -> NoReturn:
    raise StorageFailed("the catalog is away")


@on_sqlite
def test_without_the_catalog_what_is_remembered_holds_for_a_while(
    remembered: RememberedVersions,
    feed: ChangeFeed,
    tenants: Tenants,
    elsewhere: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the catalog cannot be read, remembered versions are used for the stated time, and are then refused."""
    reference = parse_reference("a@prod")
    remembered.resolve("acme", reference)
    Tenants(elsewhere).put("beta", BY)
    with monkeypatch.context() as away:
        away.setattr(module, "changes_after", refuse)
        tenants.put("gamma", BY)
        # What another process did before is not known: nothing is relied on until a look succeeds.
        assert remembered.get("acme", reference) is None
        with pytest.raises(StorageFailed):
            feed.catch_up()
    feed.catch_up()
    assert remembered.get("acme", reference) is not None
    monkeypatch.setattr(feed, "_read_at", time.monotonic() - module._STALE)
    assert remembered.get("acme", reference) is None
    feed.catch_up()
    assert remembered.get("acme", reference) is not None


def test_a_listener_is_told_what_happened(feed: ChangeFeed, catalog: Catalog) -> None:
    """A listener gets the names of everything that a change concerns."""
    told: list[Change] = []
    feed.listen(told.extend)
    gone, kept = (catalog.resolve("acme", parse_reference(f"a@{number}")) for number in (2, 1))
    catalog.put_alias("acme", "a", "dev", 1, BY)
    catalog.delete("acme", parse_reference("a@2"), BY)
    assert told == [AliasMoved("acme", "a", "dev", 1, kept.digest), VersionDeleted("acme", "a", 2, gone.digest)]


def test_who_was_away_reads_on_from_its_revision(
    feed: ChangeFeed, heard: list[str], elsewhere: Database, content: Content
) -> None:
    """A process that did not read for long gets all later changes in order."""
    others = HoldingCatalog(elsewhere)
    others.add_version("acme", "b", content("z"), BY)
    others.put_alias("acme", "b", "prod", 1, BY)
    others.delete_alias("acme", "b", "prod", BY)
    before = feed.revision
    feed.catch_up()
    assert heard == ["version-published", "alias-moved", "alias-deleted"]
    assert feed.revision == before + 3


@pytest.mark.parametrize("kept", [0, 1], ids=["none is kept", "one is kept"])
def test_who_was_away_for_longer_than_changes_are_kept_forgets_everything(
    feed: ChangeFeed, remembered: RememberedVersions, elsewhere: Database, kept: int
) -> None:
    """A process whose next changes are no longer kept forgets everything, and then reads on."""
    told: list[Change] = []
    feed.listen(told.extend)
    reference = parse_reference("a@prod")
    remembered.resolve("acme", reference)
    others = HoldingCatalog(elsewhere)
    for number in (2, 1, 2):
        others.put_alias("acme", "a", "prod", number, BY)
    with elsewhere.writing() as connection:
        last = feed.revision + 3 - kept
        connection.execute(sa.delete(changes_table).where(changes_table.c.revision <= last))
    feed.catch_up()
    assert told == [EverythingChanged()]
    assert remembered.get("acme", reference) is None
    assert remembered.resolve("acme", reference).number == 2
    others.put_alias("acme", "a", "prod", 1, BY)
    feed.catch_up()
    assert len(told) == 2
    assert isinstance(told[1], AliasMoved)
    assert remembered.resolve("acme", reference).number == 1


def test_who_missed_too_much_forgets_everything(
    feed: ChangeFeed, elsewhere: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has missed more than a bounded number of changes forgets everything instead of reading them."""
    monkeypatch.setattr(module, "_MOST", 2)
    told: list[Change] = []
    feed.listen(told.extend)
    others = HoldingCatalog(elsewhere)
    for number in (2, 1):
        others.put_alias("acme", "a", "prod", number, BY)
    feed.catch_up()
    assert [type(change) for change in told] == [AliasMoved] * 2
    for number in (2, 1, 2):
        others.put_alias("acme", "a", "prod", number, BY)
    feed.catch_up()
    assert told[2:] == [EverythingChanged()]


def test_an_older_copy_in_the_place_of_the_catalog(feed: ChangeFeed, elsewhere: Database) -> None:
    """If an older copy replaces the catalog, its smaller revision makes the process forget everything."""
    told: list[Change] = []
    feed.listen(told.extend)
    with elsewhere.writing() as connection:
        connection.execute(sa.update(catalog_table).values(revision=1))
    feed.catch_up()
    assert told == [EverythingChanged()]
    assert feed.revision == 1
