"""`catalog.tenants` and `catalog.quotas`: tenants are made, changed, listed and deleted; quotas hold to the byte."""

import contextlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.database import Database
from prefix_service.catalog.keys import Keyring
from prefix_service.catalog.listings import Listings
from prefix_service.catalog.records import NewVersion, Quotas
from prefix_service.catalog.schema import metadata
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import NotFound, QuotaExceeded, Unauthenticated
from prefix_service.prefix.references import parse_reference
from tests.catalog.conftest import BY, Content, HoldingCatalog, Place, remove_deleted

VERSION_BYTES = 100
"""What `content` makes: 10 of weights, 20 of keys and values, 70 of the manifest."""


def test_a_tenant_is_made_once(tenants: Tenants) -> None:
    """Making a tenant again reports that it exists."""
    assert tenants.put("acme", BY)
    assert not tenants.put("acme", BY)
    tenants.require("acme")
    for look in (tenants.get, tenants.require):
        with pytest.raises(NotFound, match="there is no tenant 'ghost'"):
            look("ghost")


def test_listings_come_in_pages(tenants: Tenants, catalog: Catalog, content: Content) -> None:
    """Tenants come in the byte order of their names, whatever the database's collation, each with what it has."""
    names = ["a", "a-b", "a.b", "a_b", "a0", "ab", "b"]
    for name in reversed(names):
        tenants.put(name, BY)
    catalog.add_version("ab", "x", content("x"), BY)
    assert [tenant.name for tenant in tenants.listed("", 100)] == sorted(names)
    assert [tenant.name for tenant in tenants.listed("a-b", 2)] == ["a.b", "a0"]
    has = {tenant.name: (tenant.adapters, tenant.bytes) for tenant in tenants.listed("", 100)}
    assert has == {**dict.fromkeys(names, (0, 0)), "ab": (1, VERSION_BYTES)}


def test_quotas_are_put_and_kept(tenants: Tenants) -> None:
    """A put without quotas leaves them as they are; one with quotas sets all three."""
    quotas = Quotas(3, 10**15, 7)
    tenants.put("acme", BY, quotas)
    tenants.put("acme", BY)
    assert tenants.get("acme").quotas == quotas
    tenants.put("acme", BY, Quotas(max_bytes=5))
    assert tenants.get("acme").quotas == Quotas(max_bytes=5)
    tenants.put("beta", BY)
    assert tenants.get("beta").quotas == Quotas()


def test_a_rate_is_the_tenants(tenants: Tenants) -> None:
    """The rate of a tenant is its own; it is None without a limit, and for a missing tenant."""
    tenants.put("acme", BY, Quotas(requests_per_second=7))
    tenants.put("beta", BY)
    assert [tenants.requests_per_second(name) for name in ("acme", "beta", "ghost")] == [7, None, None]


def test_what_a_tenant_has(tenants: Tenants, catalog: Catalog, content: Content) -> None:
    """A tenant's bytes are those of all its versions, also if adapters or tenants share blobs."""
    for tenant in ("acme", "beta"):
        for adapter, word in (("a", "x"), ("a", "y"), ("b", "x")):
            catalog.add_version(tenant, adapter, content(word), BY, make_tenant=True)
    assert (tenants.get("acme").adapters, tenants.get("acme").bytes) == (2, 3 * VERSION_BYTES)
    catalog.delete("acme", parse_reference("b"), BY)
    assert (tenants.get("acme").adapters, tenants.get("acme").bytes) == (1, 2 * VERSION_BYTES)


def test_adapters_up_to_the_quota(tenants: Tenants, catalog: Catalog, content: Content) -> None:
    """The last adapter of the quota fits and the next does not; a version of an existing adapter always does."""
    tenants.put("acme", BY, Quotas(max_adapters=2))
    for adapter in "ab":
        catalog.add_version("acme", adapter, content("x"), BY)
    with pytest.raises(QuotaExceeded, match=r"'acme' has 2 adapters and may have 2: delete one, or ask the platform"):
        catalog.add_version("acme", "c", content("x"), BY)
    with pytest.raises(QuotaExceeded):
        catalog.find("acme", "c", content("x").digest, VERSION_BYTES, BY)
    assert catalog.add_version("acme", "a", content("y"), BY)[0].number == 2
    catalog.delete("acme", parse_reference("b"), BY)
    assert catalog.add_version("acme", "c", content("x"), BY)[1]


def test_bytes_up_to_the_quota(tenants: Tenants, catalog: Catalog, content: Content) -> None:
    """A version that fills the quota to the byte fits, and one byte more does not."""
    tenants.put("acme", BY, Quotas(max_bytes=2 * VERSION_BYTES))
    catalog.add_version("acme", "a", content("x"), BY)
    assert catalog.find("acme", "a", content("y").digest, VERSION_BYTES, BY) is None
    with pytest.raises(QuotaExceeded, match=r"'acme' has 100 of 200 bytes, and this version takes 101: delete"):
        catalog.find("acme", "a", content("y").digest, VERSION_BYTES + 1, BY)
    catalog.add_version("acme", "a", content("y"), BY)
    with pytest.raises(QuotaExceeded, match="has 200 of 200 bytes"):
        catalog.add_version("acme", "a", content("z"), BY)


def test_a_refusal_leaves_nothing(tenants: Tenants, catalog: Catalog, content: Content) -> None:
    """A refused publication leaves no empty adapter and takes no number."""
    tenants.put("acme", BY, Quotas(max_bytes=VERSION_BYTES - 1))
    with pytest.raises(QuotaExceeded):
        catalog.add_version("acme", "a", content("x"), BY)
    assert tenants.get("acme").adapters == 0
    tenants.put("acme", BY, Quotas())
    assert catalog.add_version("acme", "a", content("x"), BY)[0].number == 1


@pytest.mark.parametrize("quotas", [Quotas(max_adapters=1), Quotas(max_bytes=VERSION_BYTES), Quotas(0, 0)])
def test_the_same_content_needs_no_room(tenants: Tenants, catalog: Catalog, content: Content, quotas: Quotas) -> None:
    """Known content is its existing version at a full quota and above a lowered one."""
    catalog.add_version("acme", "a", content("x"), BY, make_tenant=True)
    tenants.put("acme", BY, quotas)
    version, is_new = catalog.add_version("acme", "a", content("x"), BY)
    assert (version.number, is_new) == (1, False)
    assert catalog.find("acme", "a", content("x").digest, VERSION_BYTES, BY) == version


def test_room_for_a_tenant_that_is_yet_to_be(catalog: Catalog) -> None:
    """A tenant that will be made has no quotas; without permission to make it, it is NotFound."""
    assert catalog.find("ghost", "a", "sha256:0", 1, BY, make_tenant=True) is None
    with pytest.raises(NotFound, match="there is no tenant 'ghost'"):
        catalog.find("ghost", "a", "sha256:0", 1, BY)


def publish(place: Place, adapters: list[str], contents: list[NewVersion]) -> int:
    """Publishes as another process does, and returns how many versions it could make."""
    database = Database(place)
    made = 0
    for adapter, new in zip(adapters, contents, strict=True):
        with contextlib.suppress(QuotaExceeded):
            made += HoldingCatalog(database).add_version("acme", adapter, new, BY)[1]
    database.close()
    return made


@pytest.fixture(params=["threads", "processes"])
def pool(request: pytest.FixtureRequest) -> Iterator[Executor]:
    spawn = multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(8) if request.param == "threads" else ProcessPoolExecutor(2, mp_context=spawn) as started:
        yield started


@pytest.mark.parametrize("quotas", [Quotas(max_adapters=5), Quotas(max_bytes=5 * VERSION_BYTES + 1)], ids=str)
def test_many_who_publish_at_once_do_not_exceed_a_quota(
    tenants: Tenants, place: Place, content: Content, quotas: Quotas, pool: Executor
) -> None:
    """Of forty parallel publications exactly the five that fit the quota succeed."""
    tenants.put("acme", BY, quotas)
    jobs = [[f"{worker}-{n}" for n in range(5)] for worker in range(8)]
    futures = [pool.submit(publish, place, job, [content(word) for word in job]) for job in jobs]
    assert sum(future.result(180) for future in futures) == 5
    assert (tenants.get("acme").adapters, tenants.get("acme").bytes) == (5, 5 * VERSION_BYTES)


def test_a_tenant_goes_with_everything(
    tenants: Tenants, catalog: Catalog, keyring: Keyring, database: Database, content: Content
) -> None:
    """Deleting a tenant removes its keys, adapters, versions and aliases; numbers, audit, changes and garbage stay."""
    tenants.put("acme", BY)
    _, text = keyring.create("acme", "admin", "", BY)
    catalog.add_version("acme", "a", content("x"), BY)
    catalog.put_alias("acme", "a", "prod", 1, BY)
    tenants.delete("acme", BY)
    with pytest.raises(Unauthenticated):
        keyring.verify(text)
    remove_deleted(database)
    with database.reading() as connection:
        counts = {
            name: connection.scalar(sa.select(sa.func.count()).select_from(table))
            for name, table in metadata.tables.items()
        }
    left = {"numbers": 1, "audit": 5, "garbage": 1, "freed": 1, "catalog": 1, "changes": 5}
    assert counts == {**dict.fromkeys(counts, 0), **left}
    with pytest.raises(NotFound, match="there is no tenant 'acme'"):
        tenants.delete("acme", BY)


def test_the_others_stay(tenants: Tenants, catalog: Catalog, content: Content) -> None:
    """Deleting a tenant leaves another with the same adapter and the same bytes as it was."""
    for tenant in ("acme", "beta"):
        catalog.add_version(tenant, "a", content("x"), BY, make_tenant=True)
    tenants.delete("acme", BY)
    assert catalog.resolve("beta", parse_reference("a@1")).digest == content("x").digest
    assert [tenant.name for tenant in tenants.listed("", 9)] == ["beta"]


def test_numbers_outlive_their_tenant(tenants: Tenants, catalog: Catalog, database: Database, content: Content) -> None:
    """A tenant that was made again goes on counting numbers, and has nothing else of its namesake."""
    for word in "xy":
        catalog.add_version("acme", "a", content(word), BY, make_tenant=True)
    tenants.put("acme", BY, Quotas(max_adapters=9))
    tenants.delete("acme", BY)
    assert tenants.put("acme", BY)
    assert tenants.get("acme").quotas == Quotas()
    assert catalog.add_version("acme", "a", content("x"), BY)[0].number == 3
    assert [version.number for version in Listings(database).versions("acme", "a", before=None, limit=9)] == [3]
