"""`catalog.catalog`: numbers, digests, aliases, listings and deletions, one by one and in parallel."""

import multiprocessing
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict

import pytest

from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.records import AdapterPlace, NewVersion, Version
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import Conflict, NotFound, PreconditionFailed
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, Content, HoldingCatalog, Place


@pytest.fixture(autouse=True)
def acme(tenants: Tenants) -> None:
    """Makes a tenant for every test."""
    assert tenants.put("acme", BY)


def publish(catalog: Catalog, new: NewVersion, adapter: str = "a", tenant: str = "acme") -> int:
    return catalog.add_version(tenant, adapter, new, BY)[0].number


def resolve(catalog: Catalog, reference: str, tenant: str = "acme") -> Version:
    return catalog.resolve(tenant, parse_reference(reference))


def delete(catalog: Catalog, reference: str) -> None:
    catalog.delete("acme", parse_reference(reference), BY)


def test_a_version_is_what_was_published(catalog: Catalog, content: Content) -> None:
    """A published version comes back with every field, its number, its owner and a time."""
    new = content("x")
    version, is_new = catalog.add_version("acme", "a", new, BY)
    assert is_new
    assert (version.tenant, version.adapter, version.number) == ("acme", "a", 1)
    assert asdict(version).items() >= asdict(new).items()
    assert version.config == {"word": "x"}
    assert resolve(catalog, "a") == version


def test_the_same_digest_is_the_same_version(catalog: Catalog, content: Content) -> None:
    """Publishing the same content again returns the same version, and `latest` does not move; in another adapter it is
    another version."""
    first, _ = catalog.add_version("acme", "a", content("x"), BY)
    publish(catalog, content("y"))
    assert catalog.add_version("acme", "a", content("x"), BY) == (first, False)
    assert resolve(catalog, "a").number == 2
    assert catalog.add_version("acme", "b", content("x"), BY)[1]


def test_a_version_needs_a_tenant(catalog: Catalog, tenants: Tenants, content: Content) -> None:
    """Publishing for a missing tenant is NotFound, unless the publication may make the tenant."""
    with pytest.raises(NotFound, match="there is no tenant 'ghost'"):
        publish(catalog, content("x"), tenant="ghost")
    version, is_new = catalog.add_version("ghost", "a", content("x"), BY, make_tenant=True)
    assert (is_new, version.tenant, tenants.get("ghost").adapters) == (True, "ghost", 1)


def test_every_way_to_name_a_version(catalog: Catalog, content: Content) -> None:
    """A version is resolved by number, digest, alias and `latest`, and without a selector."""
    for word in "xyz":
        publish(catalog, content(word))
    catalog.put_alias("acme", "a", "prod", 2, BY)
    digest = content("x").digest
    references = {"a": 3, "a@latest": 3, "a@1": 1, "a@prod": 2, f"a@{digest}": 1}
    assert {reference: resolve(catalog, reference).number for reference in references} == references


@pytest.mark.parametrize("reference", ["a@2", "a@prod", "a@sha256:" + "0" * 64, "b", "b@1", f"a@{10**17}"])
def test_what_is_not_there(catalog: Catalog, content: Content, reference: str) -> None:
    """Resolving a missing reference is NotFound, and the message names the reference."""
    publish(catalog, content("x"))
    with pytest.raises(NotFound, match=f"there is no acme/{reference[0]}"):
        resolve(catalog, reference)


def test_tenants_do_not_see_each_other(catalog: Catalog, tenants: Tenants, content: Content) -> None:
    """One adapter name is two adapters in two tenants."""
    tenants.put("beta", BY)
    publish(catalog, content("x"))
    with pytest.raises(NotFound):
        resolve(catalog, "a", tenant="beta")
    assert publish(catalog, content("y"), tenant="beta") == 1
    assert resolve(catalog, "a").digest == content("x").digest


def test_a_number_is_never_given_twice(catalog: Catalog, content: Content) -> None:
    """Numbers go on after the newest version was deleted, and after the adapter was."""
    for word in "xy":
        publish(catalog, content(word))
    delete(catalog, "a@2")
    assert resolve(catalog, "a").number == 1
    assert publish(catalog, content("y")) == 3
    delete(catalog, "a")
    assert publish(catalog, content("y")) == 4


def test_an_idempotent_publication_takes_no_number(catalog: Catalog, content: Content) -> None:
    """Publishing known content takes no number."""
    assert [publish(catalog, content(word)) for word in ("x", "x", "x", "y")] == [1, 1, 1, 2]


def test_an_alias_moves(catalog: Catalog, content: Content) -> None:
    """An alias moves to any existing version, and only its first move reports it as new."""
    for word in "xy":
        publish(catalog, content(word))
    assert catalog.put_alias("acme", "a", "prod", 1, BY)
    assert not catalog.put_alias("acme", "a", "prod", 2, BY)
    assert catalog.aliases_of("acme", "a") == {"prod": 2}
    catalog.delete_alias("acme", "a", "prod", BY)
    assert catalog.aliases_of("acme", "a") == {}


@pytest.mark.parametrize(
    ("before", "expected", "moves"),
    [
        (None, None, True),
        (1, None, False),
        (1, 1, True),
        (1, 2, False),
        (None, 1, False),
        (None, -1, True),
        (1, -1, True),
    ],
)
def test_an_alias_moves_from_where_it_is_expected(
    catalog: Catalog, content: Content, before: int | None, expected: int | None, moves: bool
) -> None:
    """An alias moves only if it points at the expected number, or if it is new for None; -1 allows any state. Otherwise
    nothing changes."""
    for word in "xyz":
        publish(catalog, content(word))
    if before is not None:
        catalog.put_alias("acme", "a", "prod", before, BY)
    if moves:
        catalog.put_alias("acme", "a", "prod", 3, BY, expected)
    else:
        with pytest.raises(PreconditionFailed, match=f"alias 'prod' points at {before or 'nothing'}"):
            catalog.put_alias("acme", "a", "prod", 3, BY, expected)
    assert catalog.aliases_of("acme", "a").get("prod") == (3 if moves else before)


def test_an_alias_is_deleted_where_it_is_expected(catalog: Catalog, content: Content) -> None:
    """An alias is deleted only if it points at the expected number; -1 allows any."""
    publish(catalog, content("x"))
    catalog.put_alias("acme", "a", "prod", 1, BY)
    with pytest.raises(PreconditionFailed):
        catalog.delete_alias("acme", "a", "prod", BY, expected=2)
    catalog.delete_alias("acme", "a", "prod", BY, expected=1)
    with pytest.raises(NotFound, match="has no alias 'prod'"):
        catalog.delete_alias("acme", "a", "prod", BY)


def test_an_alias_needs_its_version(catalog: Catalog, content: Content) -> None:
    """An alias cannot be moved to a version that does not exist."""
    with pytest.raises(NotFound, match="there is no acme/a"):
        catalog.put_alias("acme", "a", "prod", 1, BY)
    publish(catalog, content("x"))
    with pytest.raises(NotFound, match="there is no acme/a@2"):
        catalog.put_alias("acme", "a", "prod", 2, BY)


def test_a_version_behind_an_alias_stays(catalog: Catalog, content: Content) -> None:
    """Deleting a version that aliases point at is a Conflict that names them, by number and by digest."""
    for word in "xy":
        publish(catalog, content(word))
    for alias in ("prod", "eu"):
        catalog.put_alias("acme", "a", alias, 1, BY)
    for reference in ("a@1", f"a@{content('x').digest}"):
        with pytest.raises(Conflict, match="alias eu, prod points at acme/a@"):
            delete(catalog, reference)
    assert resolve(catalog, "a@1").number == 1


def test_an_adapter_goes_with_everything(catalog: Catalog, listings: Listings, content: Content) -> None:
    """Deleting an adapter deletes its aliases, and a new adapter of the same name has none of them."""
    publish(catalog, content("x"))
    catalog.put_alias("acme", "a", "prod", 1, BY)
    delete(catalog, "a")
    with pytest.raises(NotFound, match="there is no acme/a"):
        catalog.aliases_of("acme", "a")
    with pytest.raises(NotFound, match="there is no acme/a"):
        listings.versions("acme", "a", before=None, limit=9)
    publish(catalog, content("x"))
    assert catalog.aliases_of("acme", "a") == {}


def test_an_adapter_goes_with_its_last_version(catalog: Catalog, listings: Listings, content: Content) -> None:
    """Deleting the last version deletes the adapter."""
    publish(catalog, content("x"))
    delete(catalog, "a@1")
    with pytest.raises(NotFound):
        listings.versions("acme", "a", before=None, limit=99)
    assert listings.adapters("acme", after=None, limit=9) == []


@pytest.mark.parametrize("reference", ["a", "a@1", "b@1"])
def test_what_is_not_there_cannot_be_deleted(catalog: Catalog, content: Content, reference: str) -> None:
    """Deleting something that does not exist is NotFound, and nothing else is deleted."""
    publish(catalog, content("x"), "b")
    delete(catalog, "b@1") if reference == "b@1" else None
    with pytest.raises(NotFound):
        delete(catalog, reference)


def test_versions_come_newest_first(catalog: Catalog, listings: Listings, content: Content) -> None:
    """A listing has all versions, the newest first."""
    for word in "xyz":
        publish(catalog, content(word))
    assert [version.number for version in listings.versions("acme", "a", before=None, limit=99)] == [3, 2, 1]


def test_adapters_come_in_pages(catalog: Catalog, listings: Listings, content: Content) -> None:
    """Adapters come in the order of their names, each with its newest version, its count and its aliases."""
    for name in ("c", "a", "b"):
        publish(catalog, content(name), name)
    publish(catalog, content("new"), "b")
    catalog.put_alias("acme", "b", "prod", 1, BY)
    first = listings.adapters("acme", after=None, limit=2)
    assert [(item.latest.adapter, item.latest.number, item.versions) for item in first] == [("a", 1, 1), ("b", 2, 2)]
    assert first[1].aliases == {"prod": 1}
    rest = listings.adapters("acme", after=AdapterPlace(None, "b"), limit=2)
    assert [item.latest.adapter for item in rest] == ["c"]


def test_the_index_names_every_version(
    catalog: Catalog, listings: Listings, tenants: Tenants, content: Content
) -> None:
    """The index of an adapter, a tenant or all has each version once, by names and numbers, page by page; a deletion
    between two pages skips none."""
    tenants.put("beta", BY)
    published = [("acme", "b", "w"), ("beta", "a", "x"), ("acme", "a", "y"), ("acme", "b", "z")]
    for tenant, adapter, word in published:
        publish(catalog, content(word), adapter, tenant)
    every = listings.index(None, after=None, limit=9)
    assert [(one.tenant, one.adapter, one.number) for one in every] == [
        ("acme", "a", 1),
        ("acme", "b", 1),
        ("acme", "b", 2),
        ("beta", "a", 1),
    ]
    assert [one.digest for one in every] == [content(word).digest for word in "ywzx"]
    assert listings.index("acme", after=None, limit=9) == every[:3]
    assert listings.index("acme", "b", after=None, limit=9) == every[1:3]
    for limit in (1, 2, 9):
        for at, after in enumerate(every, 1):
            assert listings.index(None, after=after, limit=limit) == every[at : at + limit]
            assert listings.index("acme", after=every[min(at, 3) - 1], limit=limit) == every[min(at, 3) : 3][:limit]
    delete(catalog, "b@1")
    assert listings.index(None, after=every[1], limit=2) == every[2:]
    assert listings.index("none", after=None, limit=9) == []


def test_adapters_of_one_base_model(catalog: Catalog, listings: Listings, content: Content) -> None:
    """A listing for a base model has the adapters whose newest version has that base model."""
    publish(catalog, content("x", "llama"), "a")
    publish(catalog, content("y", "gpt2"), "a")
    publish(catalog, content("z", "llama"), "b")
    found = listings.adapters("acme", after=None, limit=9, base_model="llama")
    assert [item.latest.adapter for item in found] == ["b"]


def publish_from(place: Place, contents: list[NewVersion]) -> list[tuple[int, bool]]:
    """Publishes as another process does, with a catalog of its own on the same database."""
    database = Database(place)
    try:
        published = [HoldingCatalog(database).add_version("acme", "a", new, BY) for new in contents]
        return [(version.number, is_new) for version, is_new in published]
    finally:
        database.close()


def pool_of(kind: str, workers: int) -> Executor:
    if kind == "threads":
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


@pytest.mark.parametrize(("kind", "workers"), [("threads", 8), ("processes", 2)])
def test_many_who_publish_at_once(listings: Listings, place: Place, content: Content, kind: str, workers: int) -> None:
    """Of parallel publications of one content one is new and the rest get its version; different contents get
    consecutive numbers."""
    same = [content("same")] * 5
    own = [[content(f"{worker}-{n}") for n in range(5)] for worker in range(workers)]
    with pool_of(kind, workers) as pool:
        futures = [pool.submit(publish_from, place, same + contents) for contents in own]
        results = [result for future in futures for result in future.result(180)]
    numbers = {number for number, is_new in results if is_new}
    assert len([1 for _, is_new in results if is_new]) == len(numbers) == 5 * workers + 1
    assert numbers == set(range(1, 5 * workers + 2))
    assert [version.number for version in listings.versions("acme", "a", before=None, limit=99)] == sorted(
        numbers, reverse=True
    )


def test_many_who_move_an_alias_at_once(catalog: Catalog, content: Content) -> None:
    """Of parallel moves that expect the same target exactly one succeeds."""
    for word in "xyz":
        publish(catalog, content(word))
    catalog.put_alias("acme", "a", "prod", 1, BY)

    def move(number: int) -> bool:
        try:
            catalog.put_alias("acme", "a", "prod", number, BY, expected=1)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(move, [2, 3] * 4)) == 1


def test_the_database_answers(catalog: Catalog) -> None:
    """`check` raises nothing while the database answers."""
    catalog.check()
