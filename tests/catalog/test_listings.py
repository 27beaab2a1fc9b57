"""`catalog.listings`: adapters sorted, searched, and page by page."""

from datetime import datetime, timedelta

import pytest
import sqlalchemy as sa

from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.records import AdapterOrder, AdapterPlace, Use
from prefix_service.catalog.schema import versions
from prefix_service.catalog.tenants import Tenants
from prefix_service.catalog.usage import UsageStore
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, Content

_NOON = datetime(2026, 11, 26, 12)  # noqa: DTZ001 - as the catalog has it, in UTC


@pytest.fixture(autouse=True)
def adapters(catalog: Catalog, tenants: Tenants, database: Database, content: Content) -> None:
    """Makes six adapters of a tenant and one of another. The newest versions of `new-a` and `new-b` are of the same
    second, all other versions of the one before; `mid` has three versions and `new-b` two."""
    tenants.put("beta", BY)
    catalog.add_version("beta", "mid", content("other"), BY)
    tenants.put("acme", BY)
    for name, count in {"new-b": 2, "old.c": 1, "mid": 3, "old_a": 1, "new-a": 1, "oldxb": 1}.items():
        for number in range(count):
            catalog.add_version("acme", name, content(f"{name} {number}", f"base-{number}"), BY)
    newest = [catalog.resolve("acme", parse_reference(name)).digest for name in ("new-a", "new-b")]
    with database.writing() as connection:
        connection.execute(sa.update(versions).values(created=_NOON))
        late = sa.update(versions).where(versions.c.digest.in_(newest))
        connection.execute(late.values(created=_NOON + timedelta(seconds=1)))


def walked(listings: Listings, order: AdapterOrder, limit: int, search: str | None = None) -> list[str]:
    """Returns the names in a listing of the tenant `acme`, read page by page."""
    names: list[str] = []
    after: AdapterPlace | None = None
    while page := listings.adapters("acme", after=after, limit=limit, order=order, search=search):
        assert len(page) <= limit
        names += [adapter.latest.adapter for adapter in page]
        after = AdapterPlace.of(page[-1], order)
    return names


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_every_order_comes_in_pages(listings: Listings, limit: int) -> None:
    """Every order has each adapter once for any size of a page; adapters that are equal in it come by name."""
    assert walked(listings, "name", limit) == ["mid", "new-a", "new-b", "old.c", "old_a", "oldxb"]
    assert walked(listings, "-created", limit) == ["new-a", "new-b", "mid", "old.c", "old_a", "oldxb"]
    assert walked(listings, "-bytes", limit) == ["mid", "new-b", "new-a", "old.c", "old_a", "oldxb"]


def test_bytes_are_those_of_all_versions(listings: Listings) -> None:
    """The bytes of an adapter are those of all its versions, as they count towards the quota."""
    found = listings.adapters("acme", after=None, limit=9)
    assert {one.latest.adapter: one.bytes for one in found if one.versions > 1} == {"mid": 300, "new-b": 200}


@pytest.fixture
def used(database: Database) -> UsageStore:
    """Notes uses: `old_a` most, `new-b` and `mid` equally often by several versions and keys, the others never."""
    store = UsageStore(database)
    store.add([Use(_NOON, "acme", "mid", number, "k", requests=1) for number in (1, 2)])
    store.add([Use(_NOON, "acme", "new-b", 1, key, requests=1) for key in "kl"])
    store.add([Use(_NOON, "acme", "old_a", 1, "k", requests=1 << 40), Use(_NOON, "acme", "", 0, "", requests=7)])
    return store


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_the_most_used_come_first(listings: Listings, used: UsageStore, limit: int) -> None:
    """Adapters come by the requests of all their versions and keys; equally used ones and unused ones by name."""
    assert walked(listings, "-used", limit) == ["old_a", "mid", "new-b", "new-a", "old.c", "oldxb"]
    used.add([Use(_NOON + timedelta(hours=1), "acme", "oldxb", 1, "k", requests=1 << 41)])
    assert walked(listings, "-used", limit, "old") == ["oldxb", "old_a", "old.c"]
    assert {one.latest.adapter: one.used for one in listings.adapters("acme", after=None, limit=9)} == {
        **dict.fromkeys(("new-a", "old.c"), 0),
        **dict.fromkeys(("mid", "new-b"), 2),
        "old_a": 1 << 40,
        "oldxb": 1 << 41,
    }


def test_what_was_deleted_was_used_by_nobody_s_namesake(
    listings: Listings, used: UsageStore, catalog: Catalog, content: Content
) -> None:
    """An adapter that was made again begins with 0 uses, as does another tenant's of the same name."""
    catalog.delete("acme", parse_reference("old_a"), BY)
    used.add([Use(_NOON, "acme", "old_a", 1, "k", requests=1)])
    catalog.add_version("acme", "old_a", content("again"), BY)
    (found,) = listings.adapters("acme", after=None, limit=9, search="old_a")
    assert found.used == 0
    assert [one.used for one in listings.adapters("beta", after=None, limit=9, order="-used")] == [0]


def test_a_search_is_a_part_of_the_name(listings: Listings) -> None:
    """A search finds its text at the beginning, in the middle and at the end of names, in capitals too."""
    assert walked(listings, "name", 2, "new") == ["new-a", "new-b"]
    assert walked(listings, "-bytes", 1, "-") == ["new-b", "new-a"]
    assert walked(listings, "-created", 9, "LD") == ["old.c", "old_a", "oldxb"]
    assert walked(listings, "name", 9, "") == walked(listings, "name", 9)
    assert walked(listings, "name", 9, "none") == []


@pytest.mark.parametrize(("search", "found"), [("_", ["old_a"]), ("%", []), ("/", []), ("\\", []), ("d_", ["old_a"])])
def test_wildcards_mean_themselves(listings: Listings, search: str, found: list[str]) -> None:
    """In a search `_` matches itself alone, and `%` matches nothing."""
    assert walked(listings, "name", 9, search) == found


def test_a_search_and_a_base_model_both_hold(listings: Listings) -> None:
    """A listing with a search and a base model has adapters that match both; the newest version's base model counts."""
    found = listings.adapters("acme", after=None, limit=9, order="-bytes", search="m", base_model="base-2")
    assert [one.latest.adapter for one in found] == ["mid"]
    assert listings.adapters("acme", after=None, limit=9, search="new", base_model="base-2") == []
